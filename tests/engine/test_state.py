"""Saved state comes back bit for bit, and damage is a sentence."""

from __future__ import annotations

import pytest
import torch

from fastcil.engine.state import load_state, save_state, write_atomically
from fastcil.errors import FastcilError


def test_nested_state_comes_back(tmp_path):
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.randn(3, 2))], lr=0.1)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3, 2)
    optimizer.step()
    state = {
        "optimizer": optimizer.state_dict(),
        "numbers": [1, 2.5, True, None, "text", (1, (2, torch.arange(3)))],
        "empty": {},
        "tensors": {
            "strided": torch.arange(12).reshape(3, 4).t(),
            "bool": torch.tensor([True, False]),
            "int16": torch.tensor([-5], dtype=torch.int16),
            "bf16": torch.randn(4).bfloat16(),
            "scalar": torch.tensor(1.5),
            "none": torch.empty(0, 3),
        },
        "shared": [torch.ones(2)] * 2,
    }
    save_state(tmp_path / "s.safetensors", state)
    back = load_state(tmp_path / "s.safetensors")

    def same(a, b):
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b)
        elif isinstance(a, dict):
            assert list(a) == list(b)
            for key in a:
                same(a[key], b[key])
        elif isinstance(a, (list, tuple)):
            assert type(a) is type(b) and len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                same(x, y)
        else:
            assert a == b and type(a) is type(b)

    same(state, back)


def test_objects_are_not_saved(tmp_path):
    with pytest.raises(TypeError, match="object"):
        save_state(tmp_path / "s", {"x": object()})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "absent"])
def test_damage_is_a_sentence(tmp_path, damage):
    path = tmp_path / "s.safetensors"
    save_state(path, {"x": torch.arange(1000)})
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        path.write_bytes(b"\xff" * 8 + data[8:])
    elif damage == "foreign":
        path.write_bytes(b"PK\x03\x04 a zip, or a pickle")
    else:
        path.unlink()
    with pytest.raises(FastcilError) as caught:
        load_state(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_failed_write_leaves_the_old_file_and_no_draft(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(FastcilError, match="file' can't be written: disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
