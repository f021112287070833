"""Arguments of ``fastcil codec encode | decode | inspect | verify | eval``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from jsonargparse import ArgumentParser

from fastcil.compression.anchors import installed_anchors
from fastcil.compression.bitstream import MAX_PIXELS
from fastcil.engine.arguments import parse_flags
from fastcil.errors import FastcilError

_MODEL = "a file that fastcil codec train or finetune, or save_codec, wrote"
_IMAGES = "image files, folders or tars of them"
_STREAMS = "files that encode wrote, or folders of them"


def _add_limit(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--max_pixels",
        type=int,
        default=MAX_PIXELS,
        help="larger images are refused: memory and time grow with what a file of few bytes claims",
    )


def _encode(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, help=_MODEL)
    parser.add_argument("images", type=str, nargs="+", help=_IMAGES)
    parser.add_argument(
        "--lambda", type=float, required=True, help="trade-off; more is more bits and quality"
    )
    parser.add_argument("--out", type=str, required=True, help="folder for the .fcl files")
    parser.add_argument("--device", type=str, default="auto")
    _add_limit(parser)


def _decode(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, help=_MODEL)
    parser.add_argument("streams", type=str, nargs="+", help=_STREAMS)
    parser.add_argument("--out", type=str, required=True, help="folder for the PNG files")
    parser.add_argument("--device", type=str, default="auto")
    _add_limit(parser)


def _inspect(parser: ArgumentParser) -> None:
    parser.add_argument("stream", type=str, help="a file that encode wrote")
    _add_limit(parser)


def _verify(parser: ArgumentParser) -> None:
    parser.add_argument("streams", type=str, nargs="+", help=_STREAMS)
    parser.add_argument(
        "--model", type=str, default=None, help=f"{_MODEL}: decode the symbols too, with it"
    )
    parser.add_argument("--device", type=str, default="auto")
    _add_limit(parser)


def _eval(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, help=_MODEL)
    parser.add_argument("images", type=str, nargs="+", help=_IMAGES)
    parser.add_argument("--out", type=str, required=True, help="folder for result and plot")
    parser.add_argument(
        "--lambdas", type=str, default=None, help="with commas between; 4 over the model's range"
    )
    parser.add_argument(
        "--anchors",
        type=str,
        nargs="?",
        const="all",
        default="",
        help=f"formats to measure too; all are {','.join(installed_anchors())} here",
    )
    parser.add_argument(
        "--old_bitstreams",
        type=str,
        default=None,
        help="folder of older files of the images, decoded as the models are now",
    )
    parser.add_argument(
        "--new_checkpoint",
        type=str,
        default=None,
        help="the model after fine-tuning, measured too, and with old files",
    )
    parser.add_argument(
        "--beside",
        type=str,
        default="",
        help="more models, FILE or NAME=FILE with commas between; those of one name, such as "
        "models of one rate each, make one curve",
    )
    parser.add_argument("--device", type=str, default="auto")
    _add_limit(parser)


_COMMANDS: Mapping[str, Callable[[ArgumentParser], None]] = MappingProxyType(
    {
        "encode": _encode,
        "decode": _decode,
        "inspect": _inspect,
        "verify": _verify,
        "eval": _eval,
    }
)


def parse_use(command: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The options of a sub-command by name, all there.

    Args:
        command: ``encode``, ``decode``, ``inspect``, ``verify`` or ``eval``.
        arguments: What comes after it.

    Raises:
        FastcilError: Anything that can't be used.

    Example:
        >>> parse_use("inspect", ["a.fcl"])
        {'stream': 'a.fcl', 'max_pixels': 16777216}
    """
    parser = ArgumentParser(prog=f"fastcil codec {command}", exit_on_error=False)
    _COMMANDS[command](parser)
    parsed = dict(parse_flags(parser, arguments).as_dict())
    if command == "eval":
        parsed["lambdas"] = None if parsed["lambdas"] is None else _numbers(parsed["lambdas"])
        parsed["anchors"] = _names(parsed["anchors"])
        parsed["beside"] = tuple(part for part in parsed["beside"].split(",") if part)
    return parsed


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise FastcilError(
            f"lambdas is '{text}'; give numbers with commas between, as in '32,1024'."
        ) from error


def _names(text: str) -> tuple[str, ...]:
    if text == "all":
        return installed_anchors()
    return tuple(part for part in text.split(",") if part)
