"""Command-line arguments, derived from the same dataclasses as everything else."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ActionConfigFile, ActionYesNo, ArgumentParser, Namespace

from fastcil.contract import nearest
from fastcil.data.ingest import CHUNK_NBYTES
from fastcil.engine.options import build_groups, check_keys, config_types, explain
from fastcil.engine.preset_files import is_run_preset
from fastcil.engine.presets import merge_options, preset_arguments, read_yaml
from fastcil.engine.pretrain import DEFAULTS
from fastcil.engine.variants import parse_variants
from fastcil.errors import FastcilError


@dataclass(frozen=True)
class RunArguments:
    """What every run takes.

    Args:
        data: ``scenes``, a folder, ``.tar`` or ``.npz``, ``cifar100``, ``cifar10``; a part of
            one as in ``cifar100:classes=0-49``.
        scenario: ``lfs-N``, ``lfh-N``, ``bA-incB``, ``task-N`` or ``data-N``; with ``-online``
            behind it stages pass over new images once. Few-shot sessions: ``few-60-5x5`` (60
            classes, then 5 at a time with 5 images of each), or ``few:FOLDER`` of session lists.
        memory: ``64MiB``, ``"2000 images"``, ``"20 images/class"``, ``none``, ``unlimited``.
        codec: How exemplars are stored, if no addon says; set under its name (--jpeg.quality).
        seeds: Comma-separated.
        device: ``auto``, ``cpu``, ``cuda``.
        run_dir: Where to keep the run.
        preset: A published run (``cim/food101-lfs10``; `fastcil presets` lists them), a published
            configuration of the method's or an addon's own, such as ``cifar-b0`` of foster, or a
            YAML file of options; flags win over it.
    """

    data: str = "scenes"
    scenario: str = "lfs-5"
    memory: str = "2000 images"
    codec: str | None = None
    seeds: str | int | list[int] = "0"
    device: str = "auto"
    run_dir: str | None = None
    preset: str | None = None


@dataclass(frozen=True)
class ProfileArguments:
    """What `fastcil profile` takes beside.

    Args:
        steps: Steps of each stage that are timed.
        tasks: How many of the run's first tasks are gone through.
    """

    steps: int = 20
    tasks: int = 2


@dataclass(frozen=True)
class PretrainArguments:
    """What `fastcil pretrain` takes; see `fastcil.pretrain`.

    Args:
        data: A labelled data set, as for train: ``cifar100:classes=0-49``, a folder of ImageNet32.
        run_dir: Where to keep the run and ``weights.safetensors``.
        epochs: Passes over the training part.
        lr: Peak learning rate, which falls as a cosine.
        batch_size: Images per step.
        momentum: SGD's momentum.
        weight_decay: L2 penalty.
        seed: Of weights, shuffles and augmentation.
        device: ``auto``, ``cpu``, ``cuda``.
        precision: ``fp32``, ``bf16`` or ``fp16``; None for engine.precision.
    """

    data: str = "scenes"
    run_dir: str | None = None
    epochs: int = 100
    lr: float = 0.1
    batch_size: int = 256
    momentum: float = 0.9
    weight_decay: float = 1e-5
    seed: int = 0
    device: str = "auto"
    precision: Literal["fp32", "bf16", "fp16"] | None = None


_PRETRAIN = """Trains an extractor and a linear classifier on labelled images and saves their
weights, from which --network.weights=FILE starts other runs. To turn a network with ReLU into one
with LeakyReLU, as Shon et al. (2022) do: --network.weights=OLD.safetensors
--network.activation=leaky --epochs=1 --lr=1e-4"""


_SHARE = "Let the first method train the first task, once per seed, and the others take it over"


def parse_run(command: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The keyword arguments of `fastcil.train`, `fastcil.compare` or `fastcil.engine.profile`.

    Options come from ``--config FILE`` (YAML, as ``config.yaml`` of a run directory) and from
    flags; where both name one, the later on the command line wins.

    Args:
        command: ``train``, ``compare`` or ``profile``.
        arguments: What follows it.

    Raises:
        FastcilError: Anything that can't be used.
    """
    which, default = {
        "train": ("method", "foster+cim"),
        "profile": ("method", "foster+cim"),
        "compare": ("methods", "foster,foster+cim"),
    }[command]
    methods = _named_in(arguments, which) or default
    variants = parse_variants(methods if command == "compare" else [str(methods)])
    names = [variant.method for variant in variants]
    codecs = [_named_in(arguments, "codec"), *(variant.codec for variant in variants)]
    types = config_types(names, codecs)
    preset = _named_in(arguments, "preset")
    below = merge_options(preset, {}, names)
    check_keys(below, types)
    defaults = build_groups(below, types)
    parser = ArgumentParser(prog=f"fastcil {command}", exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of options")
    # A list or a mapping as YAML writes it; text with commas between on the command line.
    kind = str | list[str] | dict[str, Any] if command == "compare" else str
    parser.add_argument(f"--{which}", type=kind, default=default)
    parser.add_class_arguments(RunArguments)
    if command == "compare":
        parser.add_argument(
            "--share_first_task", action=ActionYesNo, nargs="?", default=False, help=_SHARE
        )
    if command == "profile":
        parser.add_class_arguments(ProfileArguments)
    if is_run_preset(preset):
        parser.set_defaults(preset_arguments(preset))
    for name, cls in types.items():
        parser.add_argument(f"--{name}", type=cls, default=defaults[name])
    parsed = parse_flags(parser, arguments).as_dict()
    options: dict[str, Any] = {field.name: parsed[field.name] for field in fields(RunArguments)}
    if not is_run_preset(options["preset"]):
        del options["preset"]  # It is in the defaults.
    options["seeds"] = _seeds(options["seeds"])
    options[which] = methods
    # A dash in a name is an underscore in what was parsed.
    if command == "compare":
        options["share_first_task"] = parsed["share_first_task"]
    if command == "profile":
        options |= {field.name: parsed[field.name] for field in fields(ProfileArguments)}
    return {**options, **{name: parsed[name.replace("-", "_")] for name in types}}


def _named_in(arguments: Sequence[str], option: str) -> Any:
    """What the command line, its config file included, says of ``option``, last of all.

    The parser that knows all flags can't be built before it is known whose flags they are, and
    what stands below them.
    """
    found = None
    for k, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        value = value or (arguments[k + 1] if k + 1 < len(arguments) else "")
        if flag == f"--{option}":
            found = value
        elif flag == "--config":
            found = read_yaml(value).get(option, found)
    return found


def parse_flags(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """What a parser makes of arguments, whose flags may have dashes for underscores.

    Raises:
        FastcilError: Anything that can't be used.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return parser.parse_args([_underscored(parser, a) for a in arguments])
    except FastcilError:
        raise
    except Exception as error:
        raise FastcilError(_complaint(parser, error)) from error


def _underscored(parser: ArgumentParser, argument: str) -> str:
    """``--run-dir`` as ``--run_dir``, where only that is known."""
    flag, equals, value = argument.partition("=")
    known = parser._option_string_actions
    other = "--" + flag[2:].replace("-", "_")
    if flag.startswith("--") and flag not in known and other in known:
        return f"{other}{equals}{value}"
    return argument


def _complaint(parser: ArgumentParser, error: Exception) -> str:
    """What was wrong with the arguments, with the nearest flag for an unknown one."""
    text = " ".join(str(error).split())
    if "nrecognized arguments" not in text:
        return explain(error)
    flag = text.partition("arguments:")[2].split()[0]
    known = [option[2:] for action in parser._actions for option in action.option_strings]
    hint = nearest(flag.lstrip("-").partition("=")[0], known).partition(" Known:")[0]
    return f"option '{flag}' is unknown; {hint if hint.startswith('did') else 'see --help.'}"


def _seeds(value: str | int | list[int]) -> tuple[int, ...]:
    try:
        items = value if isinstance(value, list) else str(value).split(",")
        return tuple(int(item) for item in items)
    except ValueError as error:
        raise FastcilError(
            f"seeds is '{value}'; give whole numbers with commas between, as in '0,1,2'."
        ) from error


def parse_pretrain(arguments: Sequence[str]) -> dict[str, Any]:
    """The keyword arguments of `fastcil.pretrain`.

    Raises:
        FastcilError: Anything that can't be used.
    """
    parser = ArgumentParser(prog="fastcil pretrain", description=_PRETRAIN, exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of options")
    parser.add_class_arguments(PretrainArguments)
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parsed = parse_flags(parser, arguments).as_dict()
    taken = [*(field.name for field in fields(PretrainArguments)), *DEFAULTS]
    return {name: parsed[name] for name in taken}


def parse_evaluate(arguments: Sequence[str]) -> dict[str, Any]:
    """The keyword arguments of `fastcil.engine.assess.assess`."""
    parser = ArgumentParser(prog="fastcil evaluate", exit_on_error=False)
    parser.add_argument("learner", type=str, help="a file that Learner.save wrote, or a run")
    parser.add_argument("--data", type=str, required=True, help="test data")
    parser.add_argument("--device", type=str, default="auto")
    return dict(parse_flags(parser, arguments).as_dict())


def parse_report(arguments: Sequence[str]) -> str:
    """The run directory."""
    parser = ArgumentParser(prog="fastcil report", exit_on_error=False)
    parser.add_argument("run_dir", type=str, help="a directory that train or compare wrote")
    return str(parse_flags(parser, arguments).run_dir)


@dataclass(frozen=True)
class IngestArguments:
    """What `fastcil ingest` takes beside SOURCE and OUT; see `fastcil.data.ingest.ingest`.

    Args:
        short_side: Shrink images until their shorter side has so many pixels.
        workers: Processes that decode; as many as there are processors if not given.
        skip_bad: Leave out, count and list images that can't be used, instead of stopping.
        unlabelled: Take all images of a tree of any form, without classes, as codecs learn from.
        chunk_nbytes: About how many bytes of pixels are decoded and noted together.
        verify: Check all checksums of this folder instead, and name the first damaged chunk.
    """

    short_side: int | None = None
    workers: int | None = None
    skip_bad: bool = False
    unlabelled: bool = False
    chunk_nbytes: int = CHUNK_NBYTES
    verify: str | None = None


_INGEST = """Writes image files once as packed pixels that are memory-mapped: fastcil ingest SOURCE
OUT, then --data OUT. Stopped or killed, the same command goes on where it was. fastcil ingest
--verify OUT checks what was written."""


def parse_ingest(arguments: Sequence[str]) -> dict[str, Any]:
    """The keyword arguments of `fastcil.data.ingest.ingest`; or ``verify`` alone, a path.

    Raises:
        FastcilError: Anything that can't be used, or no source or place.
    """
    parser = ArgumentParser(prog="fastcil ingest", description=_INGEST, exit_on_error=False)
    parser.add_argument("places", nargs="*", help="SOURCE, as --data takes it, and OUT, a folder")
    parser.add_class_arguments(IngestArguments)
    parsed = parse_flags(parser, arguments).as_dict()
    places, verify = parsed.pop("places") or [], parsed.pop("verify")
    alone = all(parsed[field.name] == field.default for field in fields(IngestArguments)[:-1])
    if verify is not None and not places and alone:
        return {"verify": Path(verify)}
    if verify is not None or len(places) != 2:
        raise FastcilError(
            f"ingest takes SOURCE OUT, or --verify OUT alone; it got '{' '.join(arguments)}'."
        )
    return {"source": places[0], "out": places[1], **parsed}
