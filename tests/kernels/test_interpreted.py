"""The tests of this folder that need Triton's interpreter, in two processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[2]
FILES = [
    file
    for file in sorted(Path(__file__).parent.glob("test_*.py"))
    if 'usefixtures("interpreted")' in file.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("half", [0, 1])
def test_under_the_interpreter(half: int) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # NumPy's warnings of infinities that the kernels provide for.
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    command = [sys.executable, "-m", "pytest", *options, *FILES[half::2]]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def test_every_kernel_has_such_tests() -> None:
    kernels = ROOT / "fastcil" / "kernels"
    wanted = {file.stem for file in kernels.glob("[!_]*.py") if "@triton.jit" in file.read_text()}
    assert {file.stem.removeprefix("test_") for file in FILES} >= wanted
