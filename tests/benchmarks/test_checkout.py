"""Checkouts of peers whose packages have the same names, and loaders that go on."""

import importlib
import sys

import checkout
import pytest
from torch.utils.data import DataLoader


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = dict(sys.modules)
    yield
    for name in set(sys.modules) - set(before):
        del sys.modules[name]
    sys.modules.update(before)


def make(folder, says):
    (folder / "models").mkdir(parents=True)
    (folder / "models" / "__init__.py").write_text("")
    (folder / "models" / "own.py").write_text(f"NAME = {says!r}\n")
    return folder


def test_each_gets_its_own_in_turn(tmp_path):
    one, other = make(tmp_path / "one", "one"), make(tmp_path / "other", "other")
    for folder in (one, other, one, one, other):
        checkout.load(folder, "models/own.py", "peer")
        found = importlib.import_module("models.own")
        assert folder.name == found.NAME
    assert len([path for path in sys.path if str(tmp_path) in path]) == 2


def test_a_folder_without_it(tmp_path):
    with pytest.raises(SystemExit, match=r"--peer is '.*', which holds no models/own\.py\."):
        checkout.load(tmp_path, "models/own.py", "peer")


def test_epochs_go_on_where_the_last_one_stopped():
    loader = checkout.Endless(DataLoader(list(range(7)), batch_size=2))
    loader.steps = 2
    assert len(loader) == 2 and len(loader.dataset) == 7
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3]]
    assert [batch.tolist() for batch in loader] == [[4, 5], [0, 1]]  # 6 would be alone
    loader.steps = None
    assert [next(iter(loader)).tolist() for _ in range(3)] == [[2, 3], [4, 5], [0, 1]]
