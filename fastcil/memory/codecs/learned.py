"""Exemplars as streams of a learned image codec, whose weights are kept beside them."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fastcil.compression.bitstream import MAX_PIXELS, Bitstream, Head
from fastcil.compression.codec import ImageCodec
from fastcil.compression.errors import BitstreamError
from fastcil.compression.fixed import fixed_mode
from fastcil.compression.model import CodecModel
from fastcil.compression.saving import load_codec
from fastcil.compression.training import is_trained_for, lambda_range
from fastcil.compression.zoo import build_model
from fastcil.contract import Retained
from fastcil.data import ImageStore
from fastcil.errors import FastcilError
from fastcil.memory.codecs.byte_store import ByteStore
from fastcil.memory.codecs.codec import Codec

Precision = Literal["fp16", "fp32"]
Decoder = Literal["latest", "pinned"]
OnMismatch = Literal["error", "drop"]

# Parts of a `CodecModel` that turn a stream into pixels; the others make streams.
_READING = ("entropy.", "decoder.", "embeddings.entropy.", "embeddings.decoder.")
_STRUCTURE, _HEAD = "structure", "head"
# Pixels decoded before they go to their places: images wait there in a form of their own.
_STRETCH = 1 << 24


class LearnedCodec(Codec[ByteStore]):
    r"""Every image as a stream of a learned codec, all at one trade-off of rate and distortion.

    A stream is the range coder's bytes and a check of 4 bytes (`Bitstream.pack_body`); what else a
    stream's file says is the same for all and kept once, 16 bytes. An exemplar takes its stream
    and 12 bytes: length (4), height and width (4), label (4).

    To be read, streams need the entropy model, the decoder and their λ-MLPs: an entry of its own
    in memory, of kind ``codec``, that a budget in bytes counts (``count_codec``). The encoder
    isn't counted, as it reads nothing; it is saved with the rest, so that a saved learner is
    complete. The checkpoint is read once, when memory is asked for the first time whether it can
    hold the data; from then on weights go where memory goes.

    Weights are rounded to ``precision`` before anything is coded, and streams name the entropy
    model of the rounded ones. Networks are computed in float32 from them, probabilities as in
    `fastcil.compression.Phases`. Before raw images are given up, the symbols of their streams are
    decoded and compared (`ImageCodec.verify_streams`).

    Another checkpoint comes in by ``Memory.use(LearnedCodec(...))``. If it was fine-tuned with the
    entropy model frozen (Duan et al. 2024), streams at hand remain readable, and ``decoder`` says
    by what: ``latest`` takes the new decoder, so that their pixels change, for the better as it is
    hoped; ``pinned`` keeps the one there was, and takes only the new encoder. Pixels of a pinned
    decoder are computed on the CPU, on one thread, image by image, so that they are the same bits
    with any threads, batches and devices beside it, which takes longer; of another machine or
    another PyTorch nothing is said.

    Args:
        checkpoint: File of the trained model, such as ``fastcil codec train`` writes.
        lmbda: λ of D·λ + R, with D the mean squared error on a scale from -1 to 1 and R in bits a
            pixel; CompressAI's is 255² / 4 times smaller. Larger means more bytes and sharper.
        precision: In which weights are kept, ``fp16`` or ``fp32``.
        count_codec: Whether a budget in bytes counts the weights as it does exemplars, or as a
            network, by ``count=all`` only.
        decoder: ``latest`` or ``pinned``.
        on_mismatch: What a checkpoint of another entropy model does to exemplars at hand:
            ``error`` refuses it, ``drop`` lets them go.
        max_pixels: Larger images are refused, before anything is trained on them.

    Raises:
        FastcilError: An unknown choice; a λ or ``max_pixels`` that is not positive.

    Example:
        >>> codec = LearnedCodec()
        >>> codec.check(ImageStore.from_batch(torch.zeros(1, 8, 8, 3, dtype=torch.uint8)))
        ... # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        fastcil.errors.FastcilError: learned.checkpoint is None, but codec 'learned' needs ...
    """

    name = "learned"
    store = ByteStore

    def __init__(
        self,
        checkpoint: str | None = None,
        lmbda: float = 128.0,
        precision: Precision = "fp16",
        count_codec: bool = True,
        decoder: Decoder = "latest",
        on_mismatch: OnMismatch = "error",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        for name, value, known in (
            ("precision", precision, get_args(Precision)),
            ("decoder", decoder, get_args(Decoder)),
            ("on_mismatch", on_mismatch, get_args(OnMismatch)),
        ):
            if value not in known:
                raise FastcilError(f"{name} is {value!r}; it must be one of {', '.join(known)}.")
        for name, number, kinds in (
            ("lmbda", lmbda, (int, float)),
            ("max_pixels", max_pixels, (int,)),
        ):
            fits = isinstance(number, kinds) and not isinstance(number, bool)
            if not (fits and 0 < number < float("inf")):
                raise FastcilError(f"{name} is {number!r}; it must be a positive number.")
        self.checkpoint = None if checkpoint is None else os.fspath(checkpoint)
        self.lmbda = float(lmbda)
        self.precision: Precision = precision
        self.count_codec = count_codec
        self.decoder: Decoder = decoder
        self.on_mismatch: OnMismatch = on_mismatch
        self.max_pixels = max_pixels
        self._device = torch.device("cpu")
        self._kept: dict[str, Tensor] = {}
        self._working: ImageCodec | None = None

    @property
    def head(self) -> Head:
        """What the streams have in common: the entropy model's hash and λ."""
        return Head.parse(bytes(self._weights()[_HEAD].numpy()))

    def check(self, images: ImageStore) -> None:
        """Raises unless there is a model and it can encode these images.

        Raises:
            FastcilError: No checkpoint, or one that can't be read or was not trained at ``lmbda``;
                an image above ``max_pixels``.
        """
        self._weights()
        areas = images.sizes.prod(1)
        if len(areas) and int(areas.amax()) > self.max_pixels:
            height, width = images.sizes[areas.argmax()].tolist()
            raise FastcilError(
                f"an image has {height} x {width} pixels, and codec 'learned' takes up to "
                f"{self.max_pixels}; shrink it, raise learned.max_pixels, or use codec 'jpeg'."
            )

    def encode(self, images: ImageStore, marks: Tensor | None = None) -> ByteStore:
        """The streams; images of one size go through the networks together.

        Raises:
            FastcilError: As in `check`.
        """
        host = images.to("cpu")
        if bool((host.geometry[:, 6] > 0).any()):
            host = host.reconstruct()
        starts, sizes = host.offsets.tolist(), host.sizes.tolist()
        pictures = [
            host.pixels[start : start + 3 * height * width].view(height, width, 3)
            for start, (height, width) in zip(starts, sizes, strict=True)
        ]
        streams = self._coder().encode_streams(pictures, self.lmbda)
        bodies = [np.frombuffer(stream.pack_body(), np.uint8) for stream in streams]
        return ByteStore.from_strings(bodies, host.sizes).to(images.device)

    def verify(self, encoded: ByteStore) -> None:
        """Decodes the symbols of streams and compares them with what was coded.

        Raises:
            FastcilError: A stream that would not come back as it was coded.
        """
        for rows in self._stretches(encoded):
            try:
                self._coder().verify_streams(self._streams(encoded.select(rows)))
            except BitstreamError as error:
                raise FastcilError(f"an exemplar can't be kept as a stream: {error}") from error

    def decode(self, encoded: ByteStore) -> ImageStore:
        """The images, raw.

        Raises:
            FastcilError: A string that is no stream of this entropy model, or whose symbols are
                not those that were coded.
        """
        sizes = encoded.sizes.cpu().long()
        nbytes = sizes.prod(1) * 3
        arena = torch.empty(int(nbytes.sum()), dtype=torch.uint8)
        places = arena.split(nbytes.tolist())
        for rows in self._stretches(encoded):
            try:
                images = self._pixels(self._streams(encoded.select(rows)))
            except BitstreamError as error:
                raise FastcilError(
                    f"what memory holds can't be decoded by codec 'learned': {error}"
                ) from error
            for row, image in zip(rows.tolist(), images, strict=True):
                places[row].copy_(image.flatten())
        return ImageStore.from_pixels(arena, sizes).to(encoded.device)

    def units(self, encoded: ByteStore) -> Tensor:
        """Bytes of the stream over those of a raw image, float64 [N].

        As Wang et al. (2022) count JPEG files: where 20 raw images would fit, 20 / units streams
        do. Weights are not counted, as nowhere in such a budget.
        """
        return encoded.lengths.double() / (3 * encoded.sizes.double().prod(1))

    def retained(self) -> list[Retained]:
        """The weights that read streams, and what streams have in common; none before the first."""
        if not self._kept:
            return []
        reads = {
            name: value
            for name, value in self._kept.items()
            if name in (_STRUCTURE, _HEAD) or name.startswith(_READING)
        }
        return [Retained("learned codec", "codec" if self.count_codec else "network", reads)]

    def state(self) -> dict[str, Tensor]:
        """All weights as they are kept, the model's structure (JSON) and the streams' head."""
        return dict(self._kept)

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state` gave, the file of the checkpoint not being needed any more.

        Raises:
            FastcilError: What is no such state.
        """
        if not state:
            return
        missing = [name for name in (_STRUCTURE, _HEAD) if name not in state]
        if missing:
            raise FastcilError(f"the saved codec has no {missing[0]!r}; it is damaged.")
        self._hold({name: value.cpu() for name, value in state.items()})
        self.lmbda = self.head.lmbda

    def succeed(self, before: Codec[Any], held: ByteStore) -> Tensor:
        """Which streams of another checkpoint it goes on with: all, or with ``drop`` none.

        Raises:
            FastcilError: Another kind of codec, λ or structure, or, with ``error``, another entropy
                model.

        Warns:
            UserWarning: Exemplars are dropped.
        """
        kept = torch.ones(len(held), dtype=torch.bool)
        if not len(held) or before is self:
            return kept
        if not isinstance(before, LearnedCodec):
            raise FastcilError(
                f"memory holds exemplars of codec '{before.name}', which codec 'learned' can't "
                f"read; give the codec there is, with other settings."
            )
        mine, theirs = self.head, before.head
        if mine.entropy_hash != theirs.entropy_hash:
            said = (
                f"learned.checkpoint is '{self.checkpoint}', whose entropy model "
                f"{mine.entropy_hash.hex()} is not that of memory's {len(held)} exemplars, "
                f"{theirs.entropy_hash.hex()}"
            )
            if self.on_mismatch == "error":
                raise FastcilError(
                    f"{said}; take one that was fine-tuned with the entropy model frozen and has "
                    f"the same precision, or let exemplars go with learned.on_mismatch=drop."
                )
            warnings.warn(f"{said}; they are dropped.", stacklevel=3)
            return ~kept
        if mine.lmbda != theirs.lmbda:
            raise FastcilError(
                f"lmbda is {mine.lmbda}, and memory's {len(held)} exemplars were coded at "
                f"{theirs.lmbda}; one is for all."
            )
        if self.decoder == "pinned":
            old = {k: v for k, v in before._kept.items() if k.startswith(_READING)}
            self._hold({**self._kept, **old})
        return kept

    def to(self, device: torch.device | str) -> None:
        """Where encoder and decoder compute; a pinned decoder does on the CPU."""
        if torch.device(device) != self._device:
            self._device = torch.device(device)
            self.release()

    def release(self) -> None:
        """Lets go of the networks, until they are needed again."""
        self._working = None

    @property
    def working_nbytes(self) -> int:
        """Bytes of the networks, and of the copy for bitstreams, that are made of the weights."""
        if self._working is None:
            return 0
        model = self._working.model
        networks = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        return networks + model.fixed_entropy().nbytes

    def _weights(self) -> dict[str, Tensor]:
        """What is kept of the model, read from the checkpoint the first time."""
        if not self._kept:
            if self.checkpoint is None:
                raise FastcilError(
                    "learned.checkpoint is None, but codec 'learned' needs a trained model; train "
                    "one by 'fastcil codec train' and give its file as learned.checkpoint=FILE."
                )
            self._take(load_codec(self.checkpoint))
        return self._kept

    def _take(self, model: CodecModel) -> None:
        """Keeps a model's weights, rounded."""
        self._check_rate(model)
        dtype = torch.float16 if self.precision == "fp16" else torch.float32
        kept = {}
        for name, value in model.state_dict().items():
            value = value.detach().cpu().contiguous()
            kept[name] = value.to(dtype) if value.is_floating_point() else value
            if not bool(kept[name].isfinite().all()):
                raise FastcilError(
                    f"learned.precision is '{self.precision}', in which '{name}' of the checkpoint "
                    f"is not finite; use fp32."
                )
        model.load_state_dict(kept)
        head = Head(ImageCodec(model).entropy_hash, self.lmbda)
        structure = json.dumps(model.structure(), sort_keys=True).encode()
        self._kept = {_STRUCTURE: _as_tensor(structure), _HEAD: _as_tensor(head.pack()), **kept}

    def _check_rate(self, model: CodecModel) -> None:
        """Refuses a λ at which the model was not trained."""
        if model.embeddings and not is_trained_for(model, self.lmbda):
            low, high = lambda_range(model)
            raise FastcilError(
                f"learned.lmbda is {self.lmbda:g}, and the checkpoint '{self.checkpoint}' was "
                f"trained for {low:g} to {high:g}; take one of these."
            )

    def _hold(self, kept: dict[str, Tensor]) -> None:
        """Replaces the weights, if they fit their structure and the streams' head."""
        before = self._kept
        self._kept, self._working = kept, None
        try:
            if self._coder().entropy_hash != self.head.entropy_hash:
                raise FastcilError("the streams' head names another entropy model.")
        except (RuntimeError, ValueError) as error:
            self._kept, self._working = before, None
            text = " ".join(str(error).split())
            raise FastcilError(f"the codec's weights can't be used: {text}") from error

    def _coder(self) -> ImageCodec:
        """The networks, made of the weights kept."""
        if self._working is None:
            kept = dict(self._weights())
            structure = json.loads(bytes(kept.pop(_STRUCTURE).numpy()))
            del kept[_HEAD]
            # Weights are drawn only to be replaced; a run's draws must not depend on that.
            with torch.random.fork_rng(devices=[]):
                model = build_model(structure)
            model.load_state_dict(kept)
            model.eval().requires_grad_(False).to(self._device)
            if self.decoder == "pinned":
                for part in model.parts()["decoder"]:
                    part.to("cpu")
            self._working = ImageCodec(model, self.max_pixels)
        return self._working

    def _streams(self, encoded: ByteStore) -> list[Bitstream]:
        """The streams, with what they have in common."""
        head = self.head
        return [
            Bitstream.parse_body(body.tobytes(), head, height, width, self.max_pixels)
            for body, (height, width) in zip(encoded.strings(), encoded.sizes.tolist(), strict=True)
        ]

    def _pixels(self, streams: list[Bitstream]) -> list[Tensor]:
        """The images of some streams, uint8 [H, W, 3] each."""
        coder = self._coder()
        if self.decoder == "latest":
            return coder.decode_streams(streams)
        with fixed_mode():
            return [coder.decode_streams([stream])[0] for stream in streams]

    def _stretches(self, encoded: ByteStore) -> Iterator[Tensor]:
        """Positions of streams to decode together: of few pixels in all, those of a size adjoin."""
        sizes = encoded.sizes.cpu().long()
        order = (sizes[:, 0] * (1 << 16) + sizes[:, 1]).argsort(stable=True)
        areas = sizes.prod(1)[order]
        number = (areas.cumsum(0) - areas) // _STRETCH
        counts = torch.unique_consecutive(number, return_counts=True)[1].tolist()
        yield from order.split(counts)


def _as_tensor(data: bytes) -> Tensor:
    """Bytes as uint8 [L]."""
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())
