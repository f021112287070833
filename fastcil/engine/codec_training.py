"""Codecs trained and fine-tuned: by the one trainer, from any point where they were stopped."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastcil._version import __version__
from fastcil.compression import (
    FINETUNING,
    PRETRAINING,
    CodecLearner,
    CodecModel,
    CodecTraining,
    StoredLatents,
    build_codec,
    load_codec,
    load_with_facts,
    save_codec,
)
from fastcil.compression.bitstream import Bitstream
from fastcil.compression.codec import ImageCodec
from fastcil.compression.training import preset
from fastcil.data import Examples, load_images
from fastcil.engine.codec_replay import read_streams, stream_files
from fastcil.engine.events import JsonLines, Listener, broadcast
from fastcil.engine.options import flatten
from fastcil.engine.progress import make_progress
from fastcil.engine.resolve import pick_device
from fastcil.engine.seeds import mix
from fastcil.engine.state import load_state, locked, save_state
from fastcil.engine.trainer import Trainer
from fastcil.errors import FastcilError

CHECKPOINT, LOG = "checkpoint.safetensors", "events.jsonl"
_INIT, _DRAWS, _DATA = 0, 1, 2


@dataclass(frozen=True)
class CodecRunOptions:
    """How a codec's training runs, none of which says what it learns but ``seed`` and ``limit``.

    Args:
        seed: Of weights, shuffles, windows, λ and noise.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``.
        limit: Images to take of each source, evenly; None for all.
        skip_bad: Skip images that can't be used, instead of stopping.
        checkpoint_seconds: Least time between two checkpoints; 0 for every step.
        threads: CPU threads; None leaves torch's choice.
        progress: Whether to show progress.
    """

    seed: int = 0
    device: str = "auto"
    limit: int | None = None
    skip_bad: bool = False
    checkpoint_seconds: float = 60.0
    threads: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("checkpoint_seconds", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise FastcilError(f"{name} is {value}; it must be at least {least}.")


def train_codec(
    data: Any,
    out: str | os.PathLike[str],
    *,
    model: str = "hierarchical-small",
    training: CodecTraining | str = "paper",
    **options: Any,
) -> CodecModel:
    """Trains a codec from random weights.

    A run that was stopped goes on from its last checkpoint, which lies in ``OUT.run`` with its log,
    to the same bits; a finished one is read.

    Args:
        data: Images, whatever `fastcil.data.load_images` reads: a folder tree, a tar, a store.
        out: The safetensors file to write; see `fastcil.compression.save_codec`.
        model: A name of `fastcil.compression.CODECS`.
        training: How; or the name of a preset, ``paper`` or ``small``.
        **options: Fields of `CodecRunOptions`.

    Returns:
        The codec, in evaluation mode.

    Raises:
        FastcilError: Anything that can't be used, in one sentence, before anything is written.

    Example:
        >>> import tempfile
        >>> from fastcil.compression import CodecRecipe
        >>> brief = CodecTraining(CodecRecipe(epochs=1, lr=1e-3, batch_size=2), 1, size=64)
        >>> data = "scenes:classes=2,size=64,train_per_class=2,test_per_class=1"
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     codec = train_codec(data, f"{folder}/codec.safetensors", training=brief,
        ...                         model="hierarchical-tiny", progress=False)
        >>> codec.training
        False
    """
    config = preset(PRETRAINING, training) if isinstance(training, str) else training
    if config.strategy != "all":
        raise FastcilError(
            f"strategy is '{config.strategy}'; training from scratch learns 'all', and "
            f"finetune_codec takes the others."
        )
    changes = {} if config.lambda_range is None else {"lambda_range": config.lambda_range}
    run = _Run(Path(out), config, CodecRunOptions(**options))

    def build() -> CodecModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(run.options.seed, _INIT))
            return build_codec(model, **changes)

    return run.run(build, {"model": model}, data, None, [])


def finetune_codec(
    model: str | os.PathLike[str],
    data: Any,
    out: str | os.PathLike[str],
    *,
    replay: Any = None,
    training: CodecTraining | str = "paper",
    **options: Any,
) -> CodecModel:
    """Fine-tunes a codec, so that its old streams can still be decoded.

    New images for the same rates are data-incremental learning; a larger ``lambda_range`` is
    rate-incremental learning, low to high or high to low (Duan et al. 2024: from λ of 32 to 1024 to
    ``(32, 4096)`` or ``(4, 1024)``), for which data and replay may be the same.

    Args:
        model: The codec's file.
        data: The new images, as in `train_codec`.
        out: The safetensors file to write, another one.
        replay: For the strategy ``kr``: old images; or, with the target ``outputs``, old streams, a
            ``.fcl`` file or a folder of them, whose latents go through the new decoder and are
            compared with what the old one makes of them.
        training: How; or the name of a preset, ``paper`` or ``small``, both of which are ``kr``.
        **options: Fields of `CodecRunOptions`.

    Returns:
        The codec, in evaluation mode; its entropy model has the bits it had.

    Raises:
        FastcilError: As in `train_codec`.

    Example:
        >>> import tempfile
        >>> from fastcil.compression import CodecRecipe, lambda_range
        >>> brief = CodecTraining(CodecRecipe(epochs=1, lr=1e-3, batch_size=2), 1, size=64,
        ...                       strategy="kr", lambda_range=(32.0, 4096.0))
        >>> data = "scenes:classes=2,size=64,train_per_class=2,test_per_class=1"
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_codec(f"{folder}/old", build_codec("hierarchical-tiny"))
        ...     codec = finetune_codec(f"{folder}/old", data, f"{folder}/new", replay=data,
        ...                            training=brief, progress=False)
        >>> lambda_range(codec)
        (32.0, 4096.0)
    """
    config = preset(FINETUNING, training) if isinstance(training, str) else training
    if config.strategy == "all":
        raise FastcilError(
            "strategy is 'all', which would change the entropy model, and with it what old streams "
            "mean; use 'kr', 'enc' or 'enc-dec'."
        )
    if (replay is None) != (config.strategy != "kr"):
        raise FastcilError(
            f"replay is {'None' if replay is None else 'given'} with the strategy "
            f"'{config.strategy}'; 'kr' needs old images to replay, and no other takes any."
        )
    if Path(out).resolve() == Path(model).resolve():
        raise FastcilError(f"out is '{out}', the codec that is fine-tuned; write to another file.")
    start, facts = load_with_facts(model)
    # Weights and all, so that a file that was replaced meanwhile isn't gone on with.
    digest = hashlib.sha256(Path(model).expanduser().read_bytes()).hexdigest()
    run = _Run(Path(out), config, CodecRunOptions(**options))
    return run.run(lambda: start, {"model": digest}, data, replay, list(facts.history))


class _Run:
    """One training of a codec and its files."""

    def __init__(self, out: Path, config: CodecTraining, options: CodecRunOptions) -> None:
        self.out = out.expanduser()
        self.config = config
        self.options = options
        self.folder = self.out.with_name(f"{self.out.name}.run")
        self._saved_at = time.monotonic()

    def run(
        self,
        build: Callable[[], CodecModel],
        origin: Mapping[str, Any],
        data: Any,
        replay: Any,
        history: list[dict[str, Any]],
    ) -> CodecModel:
        """Runs, or goes on with, or reads what is described."""
        device = pick_device(self.options.device)
        model = build()
        examples = self._read(data)
        old = None if replay is None else self._read_old(replay, model)
        identity = self._identity(origin, data, examples, replay, old)
        learner = CodecLearner(model.to(device), self.config, mix(self.options.seed, _DRAWS))
        if not self._finished(identity):
            stage = learner.stage(examples, _decoded(learner, old))
            with locked(self.folder):
                # Another process may have finished it meanwhile.
                if not self._finished(identity):
                    self._train(learner, stage, identity, device)
                    made = {"torch": str(torch.__version__), "device": device.type}
                    entry = {**identity, "fastcil": __version__, **made}
                    save_codec(self.out, learner.result, [*history, entry])
            (self.folder / CHECKPOINT).unlink(missing_ok=True)
        return load_codec(self.out, device)

    def _read(self, source: Any) -> Examples:
        """The images of a source."""
        return load_images(source, limit=self.options.limit, skip_bad=self.options.skip_bad)

    def _read_old(self, source: Any, model: CodecModel) -> Examples | list[Bitstream]:
        """What is to be replayed: images, or streams."""
        files = stream_files(source)
        if not files:
            return self._read(source)
        options = self.options
        return read_streams(
            files, model, self.config.size, limit=options.limit, skip_bad=options.skip_bad
        )

    def _identity(
        self,
        origin: Mapping[str, Any],
        data: Any,
        examples: Examples,
        replay: Any,
        old: Examples | list[Bitstream] | None,
    ) -> dict[str, Any]:
        """What makes a run this one, as JSON gives it back."""

        def described(source: Any, read: Examples | list[Bitstream]) -> dict[str, Any]:
            name = str(source) if isinstance(source, (str, os.PathLike)) else type(source).__name__
            if isinstance(read, list):
                nbytes = sum(len(stream.payload) for stream in read)
                return {"source": name, "streams": len(read), "nbytes": nbytes}
            return {"source": name, "images": len(read), "nbytes": read.images.nbytes}

        identity = {
            **origin,
            "data": described(data, examples),
            "replay": None if old is None else described(replay, old),
            "training": asdict(self.config),
            "seed": self.options.seed,
        }
        plain: dict[str, Any] = json.loads(json.dumps(identity))
        return plain

    def _finished(self, identity: dict[str, Any]) -> bool:
        """Whether the codec is there already.

        Raises:
            FastcilError: Another one is.
        """
        if not self.out.exists():
            return False
        try:
            history = load_with_facts(self.out)[1].history
        except FastcilError as error:
            raise FastcilError(
                f"out is '{self.out}', which exists and can't be read as a codec ({error}); use "
                f"another file."
            ) from error
        self._check_same(history[-1] if history else {}, identity)
        return True

    def _check_same(self, before: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        """Refuses to go on with, or to overwrite, another run."""
        was, now = flatten(before), flatten(identity)
        odd = [f"{k} was {was.get(k)}, now {v}" for k, v in now.items() if was.get(k) != v]
        if odd:
            raise FastcilError(
                f"out is '{self.out}', where another codec lies ({'; '.join(odd[:4])}); use "
                f"another file, or the same options."
            )

    def _train(
        self, learner: CodecLearner, stage: Any, identity: dict[str, Any], device: torch.device
    ) -> None:
        """What is left of the training."""
        if self.options.threads is not None:
            torch.set_num_threads(self.options.threads)
        checkpoint = self.folder / CHECKPOINT
        for draft in self.folder.glob(f".{CHECKPOINT}.*"):
            # What a kill left in the middle of a write.
            draft.unlink()
        resume = None
        if checkpoint.is_file():
            state = load_state(checkpoint)
            self._check_same(state["identity"], identity)
            learner.load_state(state["learner"])
            resume = state["trainer"]

        def save(trainer: Trainer) -> None:
            if time.monotonic() - self._saved_at >= self.options.checkpoint_seconds:
                state = {"learner": learner.state(), "trainer": trainer.state()}
                save_state(checkpoint, {"identity": identity, **state})
                self._saved_at = time.monotonic()

        tell = self._listener()
        tell("run", {"method": f"codec {self.config.strategy}", "seed": self.options.seed})
        tell("task", {"task": 0, "tasks": 1})
        if resume is not None:
            tell("resumed", {"task": 0, "path": str(checkpoint)})
        key = (self.options.seed, _DATA)
        trainer = Trainer(learner, learner.augmentation, device, key, tell, save=save)
        try:
            trainer.run([stage], resume)
        finally:
            tell("finished", {})

    def _listener(self) -> Listener:
        return broadcast([make_progress(self.options.progress), JsonLines(self.folder / LOG)])


def _decoded(
    learner: CodecLearner, old: Examples | list[Bitstream] | None
) -> Examples | StoredLatents | None:
    """What a stage replays: images as they are, of streams the latents."""
    if not isinstance(old, list):
        return old
    assert learner.old is not None  # streams are read for kr alone
    return StoredLatents.decode(ImageCodec(learner.old), old)
