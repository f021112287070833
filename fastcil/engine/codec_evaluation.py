"""A learned codec's rate and distortion on a set of images, beside others', kept as a result."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import cv2
import matplotlib

from fastcil.compression.anchors import ANCHORS, VTM_KODAK, installed_anchors
from fastcil.compression.bd_rate import Fit, Points, bd_rate
from fastcil.compression.bitstream import MAX_PIXELS
from fastcil.compression.codec import ImageCodec
from fastcil.compression.evaluation import (
    Photos,
    Point,
    evaluate_anchor,
    evaluate_codec,
    evaluate_streams,
    spread,
)
from fastcil.compression.saving import load_codec
from fastcil.compression.training import is_trained_for, lambda_range
from fastcil.engine.codec_files import load_photos, streams_of
from fastcil.engine.environment import environment
from fastcil.engine.rate_plots import plot_rate_distortion
from fastcil.engine.resolve import pick_device
from fastcil.engine.state import locked, write_atomically
from fastcil.errors import FastcilError

RESULT, PLOTS = "result.json", ("rate_distortion.svg", "rate_distortion.png")
VTM = "vtm-22.0"
_KODAK = {f"kodim{k:02}" for k in range(1, 25)}
_PACKAGES = ("constriction", "pytorch-msssim", "imagecodecs")

Notify = Callable[[str, Point], None]


def _quiet(curve: str, point: Point) -> None:
    """Says nothing."""


@dataclass
class CodecResult:
    """Curves of codecs on one set of images.

    Args:
        config: What was asked for.
        environment: Device, versions, commit, command.
        curves: Codec to its points.
        published: Codec to (bits per pixel, PSNR) that others have measured.
    """

    config: dict[str, Any]
    environment: dict[str, Any]
    curves: dict[str, list[Point]] = field(default_factory=dict)
    published: dict[str, Sequence[tuple[float, float]]] = field(default_factory=dict)

    def points(self) -> dict[str, list[tuple[float, float]]]:
        """(bits per pixel, PSNR) of all curves, the published ones last."""
        own = {name: [(p.bpp, p.psnr) for p in points] for name, points in self.curves.items()}
        return own | {name: list(points) for name, points in self.published.items()}

    def bd_rates(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """BD-rate of each curve against each other one, in percent, by both fits.

        Returns:
            Codec, then what it is compared with, then ``cubic`` and ``akima``; None where the two
            can't be compared, as when they share no PSNR.
        """
        curves = self.points()
        return {
            test: {
                anchor: {fit: _bd_rate(curves[anchor], curves[test], fit) for fit in get_args(Fit)}
                for anchor in curves
                if anchor != test
            }
            for test in curves
        }

    def content(self) -> dict[str, Any]:
        """All of it, JSON-able; None for the infinite PSNR of an image that came back as it was."""
        return {
            "config": self.config,
            "environment": self.environment,
            "curves": {name: [_plain(p) for p in points] for name, points in self.curves.items()},
            "published": {name: [*map(list, points)] for name, points in self.published.items()},
            "bd_rate": self.bd_rates(),
        }

    def save(self, folder: Path) -> None:
        """Writes ``result.json`` and ``rate_distortion.svg`` and ``.png``, each atomically.

        Raises:
            FastcilError: They can't be written.
        """
        text = json.dumps(self.content(), indent=1, allow_nan=False)
        shown = {
            name: finite
            for name, points in self.points().items()
            if (finite := [point for point in points if math.isfinite(point[1])])
        }
        figure = plot_rate_distortion(shown, dashed=tuple(self.published))
        for name, metadata in zip(PLOTS, ({"Date": None}, {"Software": None}), strict=True):
            buffer = io.BytesIO()
            with matplotlib.rc_context({"svg.hashsalt": "fastcil"}):
                figure.savefig(buffer, format=name[-3:], dpi=160, metadata=metadata)
            write_atomically(folder / name, buffer.getvalue())
        write_atomically(folder / RESULT, text.encode())


Codecs = ImageCodec | Sequence[ImageCodec]
"""A codec; or some that make one curve together, as those of one rate each do."""


def evaluate_codecs(
    codecs: Mapping[str, Codecs],
    photos: Photos,
    lambdas: Sequence[float] | None = None,
    anchors: Sequence[str] = (),
    old_streams: Sequence[tuple[str, bytes]] | None = None,
    config: Mapping[str, Any] | None = None,
    notify: Notify = _quiet,
) -> CodecResult:
    """Rates and distortions of codecs, such as one, those that it was trained on to, and others.

    Old bitstreams through a decoder are a curve of their own, ``NAME, old bitstreams``, of every
    codec that has the entropy model of the first: those given, of all of these; else the first
    one's files, of the others.

    Codecs of one rate each, by one name, are one curve: how Duan et al. (2024) set a variable-rate
    codec beside those of single rates that it was made of (Fig. 11).

    Args:
        codecs: By name, the oldest first, which is one codec.
        photos: The images.
        lambdas: At which the codecs are measured, each at those within its range, those of one rate
            at that; None for four over the range of each.
        anchors: Formats to measure too, of `fastcil.compression.anchors.ANCHORS`.
        old_streams: Images' names and files that were there before.
        config: What to keep with the result.
        notify: Told of every point, with its curve's name, as soon as it is measured.

    Returns:
        The result; with VTM's published points if the images are Kodak's 24.

    Raises:
        FastcilError: No codec; a format that isn't known or there; a λ twice; and as
            `evaluate_codec` and `evaluate_streams`.
    """
    groups = {name: _group(given) for name, given in codecs.items()}
    if not groups or not all(groups.values()):
        raise FastcilError(f"codecs has {list(codecs)}; give one codec at least, and of each name.")
    if lambdas is not None:
        _check_rates(lambdas)
    work = {
        name: [(codec, lmbda) for codec in group for lmbda in _rates(name, codec, lambdas)]
        for name, group in groups.items()
    }
    _check_anchors(anchors)
    first = next(iter(groups.values()))[0]
    device = str(next(first.model.parameters()).device)
    result = CodecResult(dict(config or {}), environment(device) | _versions())
    made: list[tuple[str, bytes]] = []

    def add(curve: str, point: Point) -> None:
        result.curves.setdefault(curve, []).append(point)
        notify(curve, point)

    for name, pairs in work.items():
        for codec, lmbda in pairs:
            point, files = evaluate_codec(codec, photos, lmbda)
            add(name, point)
            made += files.items() if codec is first else ()
        result.curves[name].sort(key=lambda point: point.setting)
        old = old_streams if old_streams is not None else made if pairs[0][0] is not first else None
        if old is not None and _reads(groups[name], first):
            for point in evaluate_streams(groups[name][0], photos, old).values():
                add(f"{name}, old bitstreams", point)
    for anchor in anchors:
        for quality in ANCHORS[anchor].qualities:
            add(anchor, evaluate_anchor(anchor, photos, quality))
    if set(photos.names) == _KODAK:
        result.published[VTM] = VTM_KODAK
    return result


def evaluate_files(
    model: str,
    images: Sequence[str],
    out: str,
    lambdas: Sequence[float] | None = None,
    anchors: Sequence[str] = (),
    old_bitstreams: str | None = None,
    new_checkpoint: str | None = None,
    beside: Sequence[str] = (),
    device: str = "auto",
    max_pixels: int = MAX_PIXELS,
    notify: Notify = _quiet,
) -> CodecResult:
    """`evaluate_codecs` of files, and the result kept in a folder.

    Args:
        model: A codec's file.
        images: Image files, folders or tars.
        out: Folder for ``result.json`` and the plot, ``rate_distortion.svg`` and ``.png``.
        lambdas: As in `evaluate_codecs`.
        anchors: As in `evaluate_codecs`.
        old_bitstreams: Folder of files that were coded before; see `streams_of`.
        new_checkpoint: The model after fine-tuning.
        beside: More codecs' files, ``FILE`` or ``NAME=FILE``; those of one name make one curve.
        device: ``auto``, ``cpu``, ``cuda``; of the networks but for the entropy model.
        max_pixels: Larger images are refused.
        notify: As in `evaluate_codecs`.

    Raises:
        FastcilError: Anything that can't be read, used or written.
    """
    config = {
        "model": model,
        "images": list(images),
        "lambdas": None if lambdas is None else list(lambdas),
        "anchors": list(anchors),
        "old_bitstreams": old_bitstreams,
        "new_checkpoint": new_checkpoint,
        "beside": list(beside),
        "device": device,
        "max_pixels": max_pixels,
    }
    place = pick_device(device)
    named = _named(model, new_checkpoint, beside)
    codecs = {
        name: [ImageCodec(load_codec(path, place), max_pixels) for path in paths]
        for name, paths in named.items()
    }
    if new_checkpoint is not None:
        old_one, new_one = list(codecs.values())[:2]
        if not _reads(new_one, old_one[0]):
            raise FastcilError(
                f"new_checkpoint is '{new_checkpoint}', which has another entropy model than "
                f"'{model}' and can't read its files; pass it as beside."
            )
    _check_anchors(anchors)
    photos = load_photos(images)
    old = None if old_bitstreams is None else streams_of([old_bitstreams], photos.names)
    # Known to be writable before anything is measured.
    with locked(Path(out)):
        result = evaluate_codecs(codecs, photos, lambdas, anchors, old, config, notify)
        result.save(Path(out))
    return result


def _named(model: str, new_checkpoint: str | None, beside: Sequence[str]) -> dict[str, list[str]]:
    """Curves' names, and the files of their codecs: by stems, unless two have the same."""
    given = [text.partition("=") for text in beside]
    alone = [text for text, equals, _ in given if not equals]
    paths = [model, *([] if new_checkpoint is None else [new_checkpoint]), *alone]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise FastcilError(f"'{twice}' is given twice; pass another codec, or leave it out.")
    stems = [Path(path).stem for path in paths]
    short = len(set(stems)) == len(stems)
    found = {stem if short else path: [path] for stem, path in zip(stems, paths, strict=True)}
    joined: dict[str, list[str]] = {}
    for name, equals, path in given:
        if equals and name in found:
            raise FastcilError(f"beside names '{name}', as another codec is; take another name.")
        if equals:
            joined.setdefault(name, []).append(path)
    return found | joined


def _group(codecs: Codecs) -> list[ImageCodec]:
    """The codecs of one curve."""
    return list(codecs) if isinstance(codecs, Sequence) else [codecs]


def _reads(codecs: Sequence[ImageCodec], first: ImageCodec) -> bool:
    """Whether a curve's codec is one, and decodes the first one's files."""
    (codec, *others) = codecs
    return codec is first or (not others and codec.entropy_hash == first.entropy_hash)


def _rates(name: str, codec: ImageCodec, lambdas: Sequence[float] | None) -> tuple[float, ...]:
    """At which λ a codec is measured."""
    low, high = lambda_range(codec.model)
    return spread((low, high)) if lambdas is None or low == high else _within(name, codec, lambdas)


def _check_rates(lambdas: Sequence[float]) -> None:
    """Before anything is measured, for that takes long."""
    if not lambdas or len(set(lambdas)) < len(lambdas):
        raise FastcilError(
            f"lambdas is {list(lambdas)}; it must have one at least, and none twice."
        )


def _within(name: str, codec: ImageCodec, lambdas: Sequence[float]) -> tuple[float, ...]:
    """Those that a codec was trained for: it would code others as the nearest of them."""
    found = tuple(lmbda for lmbda in lambdas if is_trained_for(codec.model, lmbda))
    if not found:
        low, high = lambda_range(codec.model)
        raise FastcilError(
            f"lambdas is {list(lambdas)}; '{name}' was trained from {low:g} to {high:g}, so give "
            f"one there at least."
        )
    return found


def _check_anchors(anchors: Sequence[str]) -> None:
    """As `_check_rates`."""
    there = installed_anchors()
    for anchor in anchors:
        if anchor not in there:
            raise FastcilError(
                f"anchors has {anchor!r}; those that can be used here are {', '.join(there)}."
            )


def _versions() -> dict[str, Any]:
    """Of the packages that figures depend on beside torch and NumPy."""
    found: dict[str, Any] = {"opencv": cv2.__version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _plain(point: Point) -> dict[str, Any]:
    """A point as JSON."""
    images = [asdict(image) | {"bpp": image.bpp} for image in point.images]
    whole = {
        "setting": point.setting,
        "bpp": point.bpp,
        "psnr": point.psnr,
        "ms_ssim": point.ms_ssim,
        "encode_seconds": point.encode_seconds,
        "decode_seconds": point.decode_seconds,
        "images": [{key: _finite(value) for key, value in image.items()} for image in images],
    }
    return {key: _finite(value) for key, value in whole.items()}


def _finite(value: Any) -> Any:
    """None for what JSON has no number for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _bd_rate(anchor: Points, test: Points, fit: Fit) -> float | None:
    try:
        return bd_rate(anchor, test, fit)
    except FastcilError:
        return None
