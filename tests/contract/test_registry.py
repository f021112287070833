"""Names of methods and addons, and how they compose."""

from __future__ import annotations

import pytest

from fastcil.contract import Addon, Method, lookup, parse_composition, register, registry
from fastcil.errors import CompositionError, FastcilError


@pytest.mark.parametrize(
    "text, parts",
    [
        ("foster", ("foster", ())),
        ("foster+cim", ("foster", ("cim",))),
        (" der + cam ", ("der", ("cam",))),
        ("ft-cnn", ("finetune", ())),
    ],
)
def test_compositions(text, parts) -> None:
    assert parse_composition(text) == parts


@pytest.mark.parametrize(
    "text, error, says",
    [
        ("fostre", FastcilError, "method 'fostre' is unknown; did you mean 'foster'?"),
        ("", FastcilError, "method '' is unknown"),
        ("foster+", FastcilError, "addon '' is unknown"),
        ("foster+cmi", FastcilError, "addon 'cmi' is unknown"),
        ("cim", CompositionError, "put a method before it, as in 'foster+cim'"),
        ("der+foster", CompositionError, "adds the method 'foster' to another"),
        ("der+ft-cnn", CompositionError, "adds the method 'ft-cnn' to another"),
        ("der+cim+cim", CompositionError, "names the addon 'cim' twice"),
    ],
)
def test_bad_compositions_are_a_sentence(text, error, says) -> None:
    with pytest.raises(error) as caught:
        parse_composition(text)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_every_name_leads_to_a_class_of_its_kind() -> None:
    for table, kind, base in (
        (registry.METHODS, "method", Method),
        (registry.ADDONS, "addon", Addon),
    ):
        for name in table:
            assert issubclass(lookup(kind, name), base)
            assert "+" not in name
    for alias, name in registry.ALIASES.items():
        assert alias not in registry.METHODS and lookup("method", alias) is lookup("method", name)


@pytest.fixture
def own_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    for kind, table in registry._KINDS.items():
        monkeypatch.setitem(registry._KINDS, kind, dict(table))


def test_a_users_own_name_may_be_given_again(own_tables) -> None:
    first, second = type("Mine", (), {}), type("Mine", (), {})
    register("method", "mine-2", first)
    assert lookup("method", "mine-2") is first
    register("method", "mine-2", second)
    assert lookup("method", "mine-2") is second
    with pytest.raises(FastcilError, match="did you mean 'mine-2'"):
        lookup("method", "mine")


@pytest.mark.parametrize(
    "kind, name, says",
    [
        ("method", "foster", "method name 'foster' is fastcil's own; choose another."),
        ("method", "ft-cnn", "is fastcil's own"),
        ("addon", "cim", "is fastcil's own"),
        ("method", "a+b", "it must be made of letters"),
        ("method", "a.b", "it must be made of letters"),
        ("method", "a,b", "it must be made of letters"),
        ("codec", "", "it must be made of letters"),
        ("method", "cim", "method name 'cim' is that of an addon; choose another."),
        ("addon", "foster", "addon name 'foster' is that of a method"),
        ("methods", "mine", "kind is 'methods', which is unknown; did you mean 'method'?"),
    ],
)
def test_bad_names_are_refused(kind, name, says, own_tables) -> None:
    with pytest.raises(FastcilError) as caught:
        register(kind, name, object)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_only_classes_are_registered(own_tables) -> None:
    with pytest.raises(FastcilError, match="pass a class, not what it makes"):
        register("method", "mine", object())  # type: ignore[arg-type]
