"""How the kernels are tested without a GPU: by Triton's interpreter and by reading their code.

The interpreter must be asked for before triton is imported, and then nothing can be compiled. So
tests that use the fixture ``interpreted`` are left out at first; `test_interpreted` runs them, in
processes of their own. Those of one file: ``TRITON_INTERPRET=1 pytest tests/kernels/test_pade.py``.
"""

from __future__ import annotations

import dataclasses
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
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


@pytest.fixture(scope="session", autouse=INTERPRETING)
def patched_once() -> Iterator[None]:
    """Lets the interpreter replace triton's language at a launch, not again at every inner call.

    It wraps what it has put there already whenever one jitted function calls another, for good,
    and so takes most of its time. Of the rest a third goes into a look for overflow at every sum
    of integers, which small shapes don't need: where indices are large, results are compared.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    original = interpreter._patch_lang
    patched: set[str] = set()

    def patch(function: Any) -> Any:
        seen = {v.__name__ for v in function.__globals__.values() if isinstance(v, ModuleType)}
        fresh = (seen & {"triton.language", "triton.language.core"}) - patched
        if not fresh:
            return None
        patched.update(fresh)
        scope = original(function)
        restore = getattr(scope, "restore", None)  # A launch calls it; an inner call does not.

        def restored() -> None:
            patched.difference_update(fresh)
            restore()

        if restore is not None:
            scope.restore = restored
        return scope

    with pytest.MonkeyPatch.context() as context:
        context.setattr(interpreter, "_patch_lang", patch)
        builder = interpreter.interpreter_builder
        quick = dataclasses.replace(builder.options, sanitize_overflow=False)
        context.setattr(builder, "options", quick)
        yield


@pytest.fixture
def interpreted() -> None:
    """Marks a test that needs the interpreter."""


class Launch(NamedTuple):
    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Launch]]:
    """What a launcher would launch for tensors on the GPU; tensors on "meta" stand for those."""

    from fastcil.kernels._launch import options

    def record(module: ModuleType, name: str, *arguments: Any) -> list[Launch]:
        found: list[Launch] = []

        def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
            found.append(Launch(kernel, programs, arguments, options(constants)))

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
def assemble_all() -> Iterator[Callable[[Sequence[Launch], int], list[Assembly]]]:
    """Compiles launches for an architecture such as 90 (sm_90), with a cache of its own."""
    with tempfile.TemporaryDirectory() as folder:
        yield lambda launches, architecture: _assemble(launches, architecture, Path(folder))


@pytest.fixture(scope="session")
def assemble(
    assemble_all: Callable[[Sequence[Launch], int], list[Assembly]],
) -> Callable[[Launch, int], Assembly]:
    return lambda launch, architecture: assemble_all([launch], architecture)[0]


def _assemble(launches: Sequence[Launch], architecture: int, folder: Path) -> list[Assembly]:
    from triton import knobs

    with knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = str(folder)
        knobs.compilation.disable_line_info = True  # another tenth of the time
        cubins = [_compile(launch, architecture) for launch in launches]
    # All at once: the disassembler takes half a second to start.
    codes = [_code(cubin) for cubin in cubins]
    file = folder / "code"
    file.write_bytes(b"".join(codes))
    listing = _run(knobs.nvidia.nvdisasm, "--binary", f"SM{architecture}", file)
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S[^;]*?)\s*;", listing)
    instructions = [(int(at, 16), text) for at, text in found]
    result = []
    start = 0
    for cubin, code in zip(cubins, codes, strict=True):
        file.write_bytes(cubin)
        usage = _run(knobs.nvidia.cuobjdump, "--dump-resource-usage", file)
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        stop = start + len(code)
        own = [(at, text) for at, text in instructions if start <= at < stop]
        result.append(Assembly(int(registers), int(stack), own))
        start = stop
    return result


def _compile(launch: Launch, architecture: int) -> bytes:
    """The object file of a launch."""
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
    return compiled.asm["cubin"]


def _code(cubin: bytes) -> bytes:
    """The instructions in an object file, which is 64-bit ELF."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<I20xQQ", cubin, table + i * size) for i in range(count)]
    for name, start, length in sections:
        if cubin.startswith(b".text.", sections[names][1] + name):
            return cubin[start : start + length]
    raise AssertionError("no code in the object file")


def _run(tool: Any, *arguments: Any) -> str:
    command = [tool.path, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
