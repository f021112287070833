"""What is shipped: the sdist, the wheel's data files, the cost of an import, the build facts."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = (".ci", "benchmarks", "csrc", "fastcil", "tests")
FILES = ("*.in", "*.md", "*.py", "*.toml", ".gitignore", "LICENSE", "Makefile")


def source_files() -> Iterator[Path]:
    """Every file that is part of the project, generated ones left out, relative to its root."""
    for pattern in (*FILES, *(f"{folder}/**/*" for folder in FOLDERS)):
        for path in filter(Path.is_file, ROOT.glob(pattern)):
            name = path.relative_to(ROOT)
            generated = any(part.endswith(("__pycache__", "_cache")) for part in name.parts)
            if name.suffix != ".so" and not generated:
                yield name


def run_setup(tree: Path, *arguments: str) -> None:
    """Run setup.py without the extension and with a torch that cannot be imported."""
    poison = tree.parent / "poison"
    poison.mkdir(exist_ok=True)
    (poison / "torch.py").write_text("raise RuntimeError('torch was imported')\n")
    environment = os.environ | {"FASTCIL_NO_EXT": "1", "PYTHONPATH": str(poison)}
    subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments], cwd=tree, env=environment, check=True
    )


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """The unpacked sdist of a copy of the sources, and the names in its archive."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("sdist")
    tree = folder / "tree"
    for path in source_files():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes((ROOT / path).read_bytes())
    run_setup(tree, "sdist", "--dist-dir", str(folder))
    (archive,) = folder.glob("fastcil-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = tar.getnames()
        for member in tar.getmembers():
            tar.extract(member, folder)
    top = archive.name.removesuffix(".tar.gz")
    return folder / top, {name.removeprefix(f"{top}/") for name in names}


def test_sdist_holds_every_source(sdist: tuple[Path, set[str]]) -> None:
    _, names = sdist
    wanted = {path.as_posix() for path in source_files()} - {".gitignore"}
    assert {"LICENSE", "csrc/extension.cpp", "fastcil/py.typed"} <= wanted
    assert wanted <= names


def test_sdist_names_no_path_of_the_machine(sdist: tuple[Path, set[str]]) -> None:
    tree, names = sdist
    assert not any(name.startswith("/") or ".." in Path(name).parts for name in names)
    places = [str(place).encode() for place in (ROOT, tree.parent)]
    for path in filter(Path.is_file, tree.rglob("*")):
        assert not any(place in path.read_bytes() for place in places), path


def test_wheel_from_the_sdist_holds_the_whole_package(sdist: tuple[Path, set[str]]) -> None:
    tree, _ = sdist
    run_setup(tree, "bdist_wheel", "--dist-dir", str(tree.parent))
    (wheel,) = tree.parent.glob("fastcil-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {path.as_posix() for path in source_files() if path.parts[0] == "fastcil"}


def test_no_source_names_a_path_of_a_developers_machine() -> None:
    needles = [f"/{name}/".encode() for name in ("work", "root", "farm")]
    needles += [b"/tmp" + tail for tail in (b"/venv", b"/scratch", b"/bash_jobs")]
    needles.append(b".." + b"/shared")
    paths = list(source_files())
    assert len(paths) > 10
    found = [
        f"{path}: {needle.decode()}"
        for path in paths
        for needle in needles
        if needle in (ROOT / path).read_bytes()
    ]
    assert not found


def test_every_folder_of_modules_is_a_package() -> None:
    """The import contracts and the type checker pass over a folder without ``__init__.py``."""
    modules = [path for path in source_files() if path.parts[0] == "fastcil"]
    folders = {path.parent for path in modules if path.suffix == ".py"}
    assert not {folder for folder in folders if not (ROOT / folder / "__init__.py").is_file()}


def test_importing_fastcil_loads_nothing_heavy() -> None:
    code = "import sys, fastcil; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "fastcil" in loaded
    assert not {"torch", "numpy", "cv2", "triton", "matplotlib"} & set(loaded)


def test_listing_the_methods_loads_no_compiler() -> None:
    code = (
        "import sys, fastcil.cli as cli; cli.main(['methods'])\n"
        "print('loaded:', *(name for name in sys.modules if name.startswith('torch._dynamo')))"
    )
    written = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "foster" in written and written.endswith("loaded:\n")


def test_build_facts() -> None:
    torch = pytest.importorskip("torch")
    extension = pytest.importorskip("fastcil._C", reason="the C++ extension is not built")
    facts = extension.build_facts()
    assert set(facts) == {"compiler", "cxx_standard", "flags", "openmp", "cpu_capability", "torch"}
    assert facts["torch"] == torch.__version__.split("+")[0]
    assert facts["cpu_capability"] in {"DEFAULT", "AVX2", "AVX512"}
    assert f"-DCPU_CAPABILITY={facts['cpu_capability']}" in facts["flags"].split()
    assert facts["openmp"] == ("-fopenmp" in facts["flags"].split())


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86-64")
@pytest.mark.parametrize("march", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_the_kernels_build_for_each_instruction_set(march: str, tmp_path: Path) -> None:
    """And have every symbol; calling them is for machines that have the instructions."""
    for path in source_files():
        if path.parts[0] in ("csrc", "setup.py"):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes((ROOT / path).read_bytes())
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "built"],
        cwd=tmp_path,
        env=os.environ | {"FASTCIL_MARCH": march},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-2000:]
    assert " warning: " not in built.stdout + built.stderr, "on every user's screen"
    (library,) = (tmp_path / "built").glob("**/_C*.so")
    # RTLD_NOW resolves every symbol; registering the ops runs in a process that has none yet.
    load = "import ctypes, os, sys, torch; torch.library.Library('fastcil', 'DEF')"
    load += "; ctypes.CDLL(sys.argv[1], os.RTLD_NOW)"
    subprocess.run([sys.executable, "-c", load, str(library)], check=True)


def test_make_names_every_file_with_a_test_for_a_gpu() -> None:
    """It runs these alone: the others may import what a bare machine lacks."""
    named = re.search(r"^GPU_TESTS := ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.M)
    assert named is not None
    holding = [
        path for path in ROOT.glob("tests/**/test_*.py") if f"mark.{'gpu'}" in path.read_text()
    ]
    found = {str(path.relative_to(ROOT)) for path in holding}
    assert set(named[1].replace("\\", " ").split()) == found
