from __future__ import annotations

import subprocess
import sys

import pytest

from fastcil.ops import _library, extension_available


def test_ops_run_without_the_extension(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(_library.importlib, "import_module", missing)
    assert _library._load_extension() is False


def test_says_that_a_broken_extension_is_not_used(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol")

    monkeypatch.setattr(_library.importlib, "import_module", broken)
    with pytest.warns(UserWarning, match="undefined symbol"):
        assert _library._load_extension() is False


@pytest.mark.skipif(not extension_available(), reason="the C++ kernels are not built")
@pytest.mark.parametrize("first", ["fastcil._C", "fastcil.ops"])
def test_the_extension_may_be_loaded_before_or_after(first):
    code = f"""
import torch, {first}, fastcil.ops, fastcil._C
for name in ("read", "reconstruct"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastcil::{{name}}", "CPU"), name
pixels = torch.tensor([7, 8, 9], dtype=torch.uint8)
geometry = torch.tensor([[1, 2, 0, 0, 0, 0, 1, 1]], dtype=torch.int16)
out = fastcil.ops.reconstruct(pixels, torch.zeros(1, dtype=torch.int64), geometry)[0]
assert out.tolist() == [7, 8, 9, 7, 8, 9]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
