"""Command-line arguments of a codec's training, derived from the same dataclasses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from jsonargparse import ArgumentParser

from fastcil.compression import CODECS, FINETUNING, PRETRAINING, CodecTraining
from fastcil.compression.training import preset
from fastcil.engine.arguments import parse_flags
from fastcil.engine.codec_training import CodecRunOptions
from fastcil.engine.options import flatten

_TRAIN = """Trains a learned image codec from random weights. The same command goes on with a run
that was stopped."""
_FINETUNE = """Fine-tunes a codec so that its old streams can still be decoded, on new images or for
a larger range of λ. The same command goes on with a run that was stopped."""


def parse_codec_train(arguments: Sequence[str]) -> dict[str, Any]:
    """The keyword arguments of `fastcil.engine.codec_training.train_codec`.

    Raises:
        FastcilError: Anything that can't be used.
    """
    parser = ArgumentParser(prog="fastcil codec train", description=_TRAIN, exit_on_error=False)
    parser.add_argument("data", type=str, help="images: a folder tree, a tar, scenes, ...")
    parser.add_argument(
        "--model", type=str, default="hierarchical-small", help=f"one of {', '.join(CODECS)}"
    )
    return _parse(parser, arguments, PRETRAINING, ("data", "model"))


def parse_codec_finetune(arguments: Sequence[str]) -> dict[str, Any]:
    """The keyword arguments of `fastcil.engine.codec_training.finetune_codec`.

    Raises:
        FastcilError: Anything that can't be used.
    """
    parser = ArgumentParser(
        prog="fastcil codec finetune", description=_FINETUNE, exit_on_error=False
    )
    parser.add_argument("model", type=str, help="the codec's file")
    parser.add_argument("data", type=str, help="new images: a folder tree, a tar, scenes, ...")
    parser.add_argument("--replay", type=str | None, help="old images, or .fcl files, for kr")
    return _parse(parser, arguments, FINETUNING, ("model", "data", "replay"))


def _parse(
    parser: ArgumentParser,
    arguments: Sequence[str],
    table: Mapping[str, CodecTraining],
    own: tuple[str, ...],
) -> dict[str, Any]:
    """Adds what both commands take: ``own`` are those that one alone does."""
    given = _pairs_joined(arguments)
    first = ArgumentParser(exit_on_error=False, add_help=False)
    first.add_argument("--preset", type=str, default="paper")
    named = [a for k, a in enumerate(given) if "--preset" in (a.partition("=")[0], *given[:k][-1:])]
    below = preset(table, parse_flags(first, named).preset)
    parser.add_argument("--out", type=str, required=True, help="the safetensors file to write")
    parser.add_argument(
        "--preset", type=str, default="paper", help=f"one of {', '.join(table)}; flags win over it"
    )
    parser.add_class_arguments(CodecTraining)
    parser.add_class_arguments(CodecRunOptions)
    parser.set_defaults(flatten(asdict(below)))
    made = parser.instantiate(parse_flags(parser, given))
    training = CodecTraining(**{f.name: made[f.name] for f in fields(CodecTraining)})
    options = {f.name: made[f.name] for f in fields(CodecRunOptions)}
    return {name: made[name] for name in (*own, "out")} | {"training": training, **options}


def _pairs_joined(arguments: Sequence[str]) -> list[str]:
    """``--lambda-range 32 4096`` as one argument, ``--lambda_range=[32, 4096]``."""
    joined: list[str] = []
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if flag.replace("-", "_") == "__lambda_range" and len(rest) > 1 and _is_number(rest[1]):
            flag = f"--lambda_range=[{rest.pop(0)}, {rest.pop(0)}]"
        joined.append(flag)
    return joined


def _is_number(text: str) -> bool:
    """Whether a text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
