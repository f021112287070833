"""The README's blocks run."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import pytest

from fastcil.contract.registry import METHODS
from fastcil.engine.arguments import parse_ingest, parse_run
from fastcil.engine.codec_arguments import parse_use
from fastcil.engine.codec_training_arguments import parse_codec_finetune, parse_codec_train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    line
    for language, code in BLOCKS
    if language == "bash"
    for line in code.replace("\\\n", " ").splitlines()
]


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_blocks_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / f"block{number}.py"
    script.write_text(PYTHON[number], encoding="utf-8")
    if "__main__" in PYTHON[number]:  # its processes must find it as a file
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, script], env=environment, check=True, timeout=300)
        return
    with mock.patch.dict(METHODS):  # one block has a method of its own
        runpy.run_path(str(script), run_name=f"readme_block_{number}")


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_ones_there_are(line: str) -> None:
    program, command, *arguments = shlex.split(line, comments=True)
    if program == "make":
        assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), re.M)
    else:
        assert program == "fastcil"
        if command in ("train", "compare"):
            assert parse_run(command, arguments)
        elif command == "profile":
            assert parse_run(command, ["--method", *arguments])
        elif command == "codec":
            training = {"train": parse_codec_train, "finetune": parse_codec_finetune}
            use = training.get(arguments[0], partial(parse_use, arguments[0]))
            assert use(arguments[1:])
        elif command == "ingest":
            assert parse_ingest(arguments)
        else:
            assert command in ("report", "methods", "presets", "doctor")


def test_the_two_commands_come_first() -> None:
    assert COMMANDS[0].startswith("make demo") and COMMANDS[1].startswith("make test")


def test_a_method_of_ones_own_is_short() -> None:
    own = next(code for code in PYTHON if "class Mine(Method)" in code)
    method = own.partition("class Mine(Method)")[2].partition("fastcil.register")[0]
    assert len([line for line in method.splitlines() if line.strip()]) <= 60
