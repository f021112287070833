"""Build the C++ kernels in csrc/; everything else about the package stands in pyproject.toml.

Environment:
    FASTCIL_NO_EXT=1  install pure Python, with the PyTorch reference in the kernels' place.
    FASTCIL_MARCH     instruction set of the kernels (default: native), such as x86-64-v3.
    CXX               the C++ compiler.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from glob import glob
from typing import Any

from setuptools import setup

# Contraction is off so that a product and a sum round twice, as in the PyTorch reference;
# the kernels ask for a fused multiply-add where they want one.
CXX_FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
# ATen's vector headers carry pragmas of other compilers.
CXX_FLAGS += ["-Wno-unknown-pragmas"]
# gcc 12's own AVX-512 headers start from undefined vectors (GCC bug 105593); clang has no such
# warning to switch off.
CXX_FLAGS += ["-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
# What ATen itself requires before it picks a vector width.
CAPABILITIES = {
    "AVX512": {"__AVX512F__", "__AVX512BW__", "__AVX512VL__", "__AVX512DQ__", "__FMA__"},
    "AVX2": {"__AVX2__", "__FMA__", "__F16C__"},
}
ESCAPE = "or set FASTCIL_NO_EXT=1 to install fastcil as pure Python"


def find_compiler() -> list[str]:
    """The C++ compiler as a command, from $CXX or the usual names."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [["g++"], ["c++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    names = f"$CXX is {shlex.join(chosen)!r}" if chosen else "looked for g++, c++ and clang++"
    sys.exit(f"fastcil: no C++ compiler was found ({names}): install one, {ESCAPE}.")


def machine_flags(compiler: list[str]) -> list[str]:
    """The flags for the instruction set, and for the vector width ATen makes of it."""
    wanted = os.environ.get("FASTCIL_MARCH")
    option = "-march" if platform.machine().lower() in {"x86_64", "amd64"} else "-mcpu"
    flags = [f"{option}={wanted or 'native'}"]
    probe = subprocess.run(
        [*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True
    )
    if probe.returncode:
        if wanted:
            sys.exit(f"fastcil: {compiler[0]} does not know {flags[0]}: correct FASTCIL_MARCH.")
        flags = []
    defined = {line.split()[1] for line in probe.stdout.splitlines()}
    width = next((name for name, needs in CAPABILITIES.items() if needs <= defined), "DEFAULT")
    return [*flags, f"-DCPU_CAPABILITY={width}", f"-DCPU_CAPABILITY_{width}"]


def extension() -> dict[str, Any]:
    """The setup() arguments for fastcil._C."""
    if os.environ.get("FASTCIL_NO_EXT") == "1":
        return {}
    compiler = find_compiler()
    os.environ["CXX"] = shlex.join(compiler)
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        sys.exit(
            "fastcil: torch is not installed where the C++ kernels are built: install torch, "
            f"then fastcil with pip install --no-build-isolation, {ESCAPE}."
        )
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    flags = [*CXX_FLAGS, *openmp, *machine_flags(compiler)]
    module = CppExtension(
        "fastcil._C",
        sorted(glob("csrc/*.cpp")),
        depends=sorted(glob("csrc/*.h")),
        define_macros=[("FASTCIL_CXX_FLAGS", f'"{shlex.join(flags)}"')],
        extra_compile_args=flags,
        extra_link_args=openmp,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension())
