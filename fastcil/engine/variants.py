"""What a comparison compares: compositions, each under a label and with options of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from fastcil.contract import lookup, parse_composition
from fastcil.contract.registry import CODECS
from fastcil.engine.options import check_codec, check_keys, config_types, flatten, nest
from fastcil.errors import FastcilError
from fastcil.memory import Budget

Methods: TypeAlias = "str | Sequence[str] | Mapping[str, Mapping[str, Any] | None]"
"""Compositions, or label -> {``method``, ``codec``, ``memory``, options}."""

# A label is the name of a folder, on any system; the comparison's own files lie beside it.
_UNFIT = frozenset('/\\:*?"<>|')
_TAKEN = ("compare.json", "report.html")
_LONGEST = 80


@dataclass(frozen=True)
class Variant:
    """One line of a comparison.

    Args:
        label: What tables, plots and its folder call it.
        method: The composition, as in ``foster+cim``.
        codec: Codec of its own; None for the comparison's.
        options: Options of its own, nested; they win over those that all share.
        memory: Budget of its own; None for the comparison's.
    """

    label: str
    method: str
    codec: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    memory: Budget | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The composition's method and addons."""
        name, addons = parse_composition(self.method)
        return name, *addons

    def codec_beside(self, shared: str | None) -> str | None:
        """Its own codec, else the comparison's unless one of its addons brings one."""
        if self.codec is not None:
            return self.codec
        brings = any(
            getattr(lookup("addon", addon), "brings_codec", None) is not None
            for addon in self.parts[1:]
        )
        return None if brings else shared

    def options_over(
        self, shared: Mapping[str, Any], groups: Mapping[str, Any], codec: str | None = None
    ) -> dict[str, Any]:
        """The shared options that concern it, with its own on top, nested.

        Args:
            shared: Nested.
            groups: Option groups that concern every method.
            codec: What `codec_beside` said.
        """
        mine = {k: v for k, v in shared.items() if k in groups or k in (*self.parts, codec)}
        return nest({**flatten(mine), **flatten(self.options)})


def parse_variants(methods: Methods) -> list[Variant]:
    """The lines of a comparison, checked.

    Args:
        methods: Compositions, as a sequence or as text with commas between; or a mapping from
            label to what differs: ``method``, the composition, where the label is none;
            ``codec``; ``memory``, a budget of its own; and dotted or nested options. The same
            composition may stand under several labels.

    Returns:
        One variant each, in order.

    Raises:
        FastcilError: Nothing to compare, the same thing twice, an unknown name, or a label that
            no folder can have.

    Example:
        >>> from fastcil.engine.variants import parse_variants
        >>> [v.label for v in parse_variants("ft-cnn,foster+cim")]
        ['finetune', 'foster+cim']
        >>> sweep = {"foster+cim": {}, "mu 0": {"method": "foster+cim", "cim.mu": 0.0}}
        >>> [(v.label, v.method, dict(v.options)) for v in parse_variants(sweep)]
        [('foster+cim', 'foster+cim', {}), ('mu 0', 'foster+cim', {'cim': {'mu': 0.0}})]
        >>> str(parse_variants({"more": {"method": "er", "memory": "64 MiB"}})[0].memory)
        '64MiB'
    """
    if isinstance(methods, str):
        methods = methods.split(",")
    if isinstance(methods, Mapping):
        variants = [_variant(str(label), own) for label, own in methods.items()]
    else:
        variants = [Variant(name, name) for name in map(_composition, map(str, methods))]
    twice = [label for label, count in Counter(v.label for v in variants).items() if count > 1]
    if not variants or twice:
        raise FastcilError(
            f"methods is {tuple(methods)}; name one or more different methods, as in "
            f"'foster,foster+cim'."
        )
    return variants


def _variant(label: str, own: Any) -> Variant:
    """One entry of a mapping."""
    if own is not None and not isinstance(own, Mapping):
        raise FastcilError(
            f"methods has '{label}': {own!r}; give a mapping of method, codec, memory and "
            f"options, or nothing."
        )
    options = {str(name): value for name, value in (own or {}).items()}
    named = options.pop("method", None)
    codec, memory = options.pop("codec", None), options.pop("memory", None)
    method = _composition(label if named is None else str(named))
    if named is None:
        label = method
    _check_label(label)
    nested = nest(options)
    # The comparison's codec may be its own too: which, is seen when both are put together.
    codecs = [codec] if codec is not None else [name for name in nested if name in CODECS]
    check_keys(nested, config_types([method], codecs))
    budget = None if memory is None else Budget.parse(memory)
    return Variant(label, method, check_codec(method, codec), nested, budget)


def _composition(text: str) -> str:
    """A composition in its one spelling."""
    name, addons = parse_composition(text)
    return "+".join([name, *addons])


def _check_label(label: str) -> None:
    """Refuses what can't name a folder beside the comparison's own files."""
    fits = label.isprintable() and label == label.strip() and 0 < len(label) <= _LONGEST
    if not fits or _UNFIT & set(label) or label[0] in "._" or label in _TAKEN:
        raise FastcilError(
            f"methods has the label {label!r}, which names a folder: give 1 to {_LONGEST} "
            f"characters without {' '.join(sorted(_UNFIT))}, not starting with a dot or underscore."
        )
