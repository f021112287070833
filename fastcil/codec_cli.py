"""The commands of ``fastcil codec``: train and fine-tune a learned image codec, and use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from fastcil.errors import FastcilError

if TYPE_CHECKING:
    from fastcil.compression import CodecModel
    from fastcil.compression.codec import ImageCodec
    from fastcil.compression.evaluation import Point

Command = Callable[[list[str]], int]


def run_codec(arguments: list[str]) -> int:
    """Runs ``fastcil codec COMMAND ...``.

    Raises:
        FastcilError: No such command, or what the command raises.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage(), end="")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        from fastcil.contract import nearest

        raise FastcilError(f"command 'codec {name}' is unknown; {nearest(name, COMMANDS)}")
    return COMMANDS[name][0](rest)


def _usage() -> str:
    """The list of commands."""
    lines = "".join(f"  {name:9} {what}\n" for name, (_, what) in COMMANDS.items())
    return (
        f"usage: fastcil codec COMMAND [options]\n\n{lines}\n"
        f"  fastcil codec COMMAND --help lists a command's options.\n"
    )


def _train(arguments: list[str]) -> int:
    from fastcil.engine.codec_training import train_codec
    from fastcil.engine.codec_training_arguments import parse_codec_train

    options = parse_codec_train(arguments)
    _tell(train_codec(**options), options["out"])
    return 0


def _finetune(arguments: list[str]) -> int:
    from fastcil.engine.codec_training import finetune_codec
    from fastcil.engine.codec_training_arguments import parse_codec_finetune

    options = parse_codec_finetune(arguments)
    _tell(finetune_codec(**options), options["out"])
    return 0


def _tell(model: CodecModel, out: str) -> None:
    """What was made, and where."""
    from fastcil.compression import entropy_hash, lambda_range

    low, high = lambda_range(model)
    print(f"codec: {out}\nlambda: {low:g} to {high:g}\nentropy model: {entropy_hash(model)[:16]}")


def _encode(arguments: list[str]) -> int:
    from fastcil.engine.codec_arguments import parse_use
    from fastcil.engine.codec_files import encode_files

    options = parse_use("encode", arguments)
    codec = _loaded(options["model"], options["device"], options["max_pixels"])
    for path, bpp in encode_files(codec, options["images"], options["lambda"], options["out"]):
        print(f"{path}: {bpp:.4f} bpp")
    return 0


def _decode(arguments: list[str]) -> int:
    from fastcil.engine.codec_arguments import parse_use
    from fastcil.engine.codec_files import decode_files

    options = parse_use("decode", arguments)
    codec = _loaded(options["model"], options["device"], options["max_pixels"])
    for path in decode_files(codec, options["streams"], options["out"]):
        print(path)
    return 0


def _inspect(arguments: list[str]) -> int:
    from fastcil.engine.codec_arguments import parse_use
    from fastcil.engine.codec_files import inspect_file

    options = parse_use("inspect", arguments)
    for name, value in inspect_file(options["stream"], options["max_pixels"]).items():
        print(f"{name}: {value}")
    return 0


def _verify(arguments: list[str]) -> int:
    from fastcil.engine.codec_arguments import parse_use
    from fastcil.engine.codec_files import verify_files

    options = parse_use("verify", arguments)
    codec, limit = None, options["max_pixels"]
    if options["model"] is not None:
        codec = _loaded(options["model"], options["device"], limit)
    count = bad = 0
    for path, wrong in verify_files(options["streams"], codec, limit):
        count += 1
        if wrong is not None:
            bad += 1
            print(f"{path}: {wrong}")
    if bad:
        raise FastcilError(f"{bad} of {count} files {'is' if bad == 1 else 'are'} bad.")
    print(f"files: {count}, {'bytes' if codec is None else 'bytes and symbols'} as written")
    return 0


def _eval(arguments: list[str]) -> int:
    from fastcil.compression.quality import ms_ssim_missing
    from fastcil.engine.codec_arguments import parse_use
    from fastcil.engine.codec_evaluation import evaluate_files

    options = parse_use("eval", arguments)
    missing = ms_ssim_missing()
    if missing is not None:
        print(missing)
    result = evaluate_files(**options, notify=_show)
    first = next(iter(result.curves))
    for curve, rates in result.bd_rates().items():
        if curve == first:
            continue
        if rates[first]["cubic"] is None:
            print(f"{curve}: no BD-rate against {first}: they share too few PSNRs")
        else:
            print(f"{curve}: BD-rate {rates[first]['cubic']:+.2f} % against {first}")
    print(f"result: {options['out']}")
    return 0


def _show(curve: str, point: Point) -> None:
    """A point of a curve, as soon as it is known."""
    similarity = "" if point.ms_ssim is None else f", MS-SSIM {point.ms_ssim:.4f}"
    figures = f"{point.bpp:.4f} bpp, {point.psnr:.2f} dB{similarity}"
    print(f"{curve} at {point.setting:g}: {figures}", flush=True)


def _loaded(model: str, device: str, max_pixels: int) -> ImageCodec:
    """The codec in a file."""
    from fastcil.compression import load_codec
    from fastcil.compression.codec import ImageCodec
    from fastcil.engine.resolve import pick_device

    return ImageCodec(load_codec(model, pick_device(device)), max_pixels)


COMMANDS: Mapping[str, tuple[Command, str]] = MappingProxyType(
    {
        "train": (_train, "a codec from scratch:  fastcil codec train DATA --out CODEC"),
        "finetune": (
            _finetune,
            "new images or rates:   fastcil codec finetune CODEC DATA --replay OLD --out NEW",
        ),
        "encode": (
            _encode,
            "images to files:       fastcil codec encode CODEC IMAGES --lambda 128 --out DIR",
        ),
        "decode": (_decode, "files to PNG:          fastcil codec decode CODEC FILES --out DIR"),
        "inspect": (_inspect, "what a file says:      fastcil codec inspect FILE"),
        "verify": (_verify, "are files still good:  fastcil codec verify DIR --model CODEC"),
        "eval": (_eval, "rate and distortion:   fastcil codec eval CODEC IMAGES --out DIR"),
    }
)
"""Name -> what runs it, and a line for the list."""
