"""How the kernels are tested without a GPU: by Triton's interpreter and by reading their code.

The interpreter must be asked for before triton is imported, and then nothing can be compiled. So a
file's tests that use the fixture ``interpreted`` are left out at first; its one test that calls
``interpret`` runs them, all in one process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = Path(__file__).parents[2]

_ELEMENT = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int16: "i16",
    torch.uint8: "u8",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    out = {item for item in here if ("interpreted" in item.fixturenames) != INTERPRETING}
    items[:] = [item for item in items if item not in out]
    config.hook.pytest_deselected(items=list(out))


@pytest.fixture
def interpreted() -> None:
    """Marks a test that needs the interpreter."""


@pytest.fixture
def interpret() -> Callable[[str], None]:
    """Runs the tests of a file that need the interpreter."""

    def run(path: str) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        # NumPy's warnings of infinities that the kernels provide for.
        options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
        command = [sys.executable, "-m", "pytest", *options, path]
        result = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
        )
        assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]

    return run


class Launch(NamedTuple):
    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Launch]]:
    """What a launcher would launch for tensors on the GPU; tensors on "meta" stand for those."""

    def record(module: ModuleType, name: str, *arguments: Any) -> list[Launch]:
        found: list[Launch] = []

        def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
            found.append(Launch(kernel, programs, arguments, constants))

        monkeypatch.setattr(module, "launch", launch)
        getattr(module, name)(*arguments)
        return found

    return record


class Assembly(NamedTuple):
    """A kernel's machine code for one architecture."""

    registers: int
    stack: int  # bytes per thread
    instructions: list[tuple[int, str]]  # address, text

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, text)) for _, text in self.instructions)

    def loops(self) -> Iterator[list[str]]:
        """The instructions from the target of each backward branch to the branch."""
        for address, text in self.instructions:
            target = re.search(r"\bBRA\b.* (?:`\()?0x([0-9a-f]+)", text)
            if target and int(target[1], 16) < address:
                start = int(target[1], 16)
                yield [text for at, text in self.instructions if start <= at <= address]

    def loop(self, pattern: str) -> list[str]:
        """The shortest loop with such an instruction."""
        found = [loop for loop in self.loops() if any(re.search(pattern, text) for text in loop)]
        return min(found, key=len)


@pytest.fixture(scope="session")
def assemble() -> Iterator[Callable[[Launch, int], Assembly]]:
    """Compiles anew what is asked for, and leaves nothing behind."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", folder)
        yield _assemble


def _assemble(launch: Launch, architecture: int) -> Assembly:
    """Compile a launch for an architecture such as 90 (sm_90)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    given = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.constants
    for index, parameter in enumerate(launch.kernel.params):
        value = given.pop(parameter.name)
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = f"*{_ELEMENT[value.dtype]}"
            if not parameter.do_not_specialize_on_alignment:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            assert parameter.do_not_specialize, f"{parameter.name} brings variants"
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=given)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("--dump-resource-usage", cubin)
        listing = _cuobjdump("-sass", cubin)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S[^;]*?)\s*;", listing)
    return Assembly(int(registers), int(stack), [(int(at, 16), text) for at, text in code])


def _cuobjdump(option: str, cubin: Path) -> str:
    import triton

    command = [triton.knobs.nvidia.cuobjdump.path, option, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
