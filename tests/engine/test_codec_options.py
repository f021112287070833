"""What is set of a codec: by a dotted name under the codec's own, checked, saved and shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import yaml
from backbones import ConvNet

from fastcil import FastcilError, Learner, compare, train
from fastcil.contract import registry
from fastcil.engine.arguments import parse_run
from fastcil.engine.catalogue import describe
from fastcil.engine.options import make_settings
from fastcil.engine.variants import parse_variants
from fastcil.memory import Codec, codec_settings

OPTIONS: dict[str, Any] = {
    "engine.epoch_scale": 0.01,
    "engine.batch_size": 8,
    "engine.progress": False,
    "augment.size": 12,
}


def draw(per_class: int, seed: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    labels = [label for label in range(4) for _ in range(per_class)]
    return rng.integers(0, 256, (len(labels), 16, 18, 3), np.uint8), labels


DATA = draw(4, 0), draw(1, 1)


def run(run_dir: Path | None = None, **options: Any) -> Any:
    arguments = {"method": "er", "codec": "jpeg", **options}
    method = arguments.pop("method")
    return train(
        method, DATA, "lfs-2", "20 kB", run_dir=run_dir, backbone=ConvNet, **OPTIONS, **arguments
    )


class Own(Codec):  # type: ignore[type-arg]
    """A user's codec with settings of many kinds, some of which text can't say."""

    name = "own"

    def __init__(
        self,
        needed: int = 3,
        kind: Literal["a", "b"] = "a",
        share: float | None = None,
        call: Any = None,
        bare=7,
    ) -> None:
        self.needed, self.kind, self.share = needed, kind, share

    def encode(self, images: Any, marks: Any) -> Any:
        return images

    def units(self, encoded: Any) -> Any:
        raise NotImplementedError


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> type:
    monkeypatch.setattr(registry, "CODECS", {**registry.CODECS, "own": Own})
    monkeypatch.setitem(registry._KINDS, "codec", registry.CODECS)
    return Own


def test_settings_are_the_constructor_s_plain_arguments(own: type) -> None:
    assert vars(codec_settings("own")()) == {"needed": 3, "kind": "a", "share": None}
    assert vars(codec_settings("bbox")()) == {"ratio": 4.0, "foreground_ratio": 1.0}
    assert vars(codec_settings("sparse")()) == {"threshold": 0.6, "rule": "telea", "radius": 3.0}
    assert set(vars(codec_settings("learned")())) > {"checkpoint", "lmbda", "decoder"}
    assert codec_settings("own") is codec_settings("own")
    made = make_settings("er", {"own.kind": "b", "own.share": 0.5}, "own").make_codec()
    assert (made.needed, made.kind, made.share) == (3, "b", 0.5)  # type: ignore[attr-defined]


def test_options_reach_the_codec_and_are_kept(tmp_path: Path) -> None:
    result = run(tmp_path / "run", **{"jpeg.quality": 40})
    assert result.learner.memory.codec.quality == 40
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["codec"] == "jpeg"
    assert config["jpeg"] == {"quality": 40, "bits_per_pixel": 24.0}
    result.learner.save(tmp_path / "learner")
    assert Learner.load(tmp_path / "learner", backbone=ConvNet).memory.codec.quality == 40
    with pytest.raises(FastcilError, match=r"jpeg\.quality was 40, now 75"):
        run(tmp_path / "run")
    flags = ["--config", str(tmp_path / "run" / "config.yaml")]
    parsed = parse_run("train", flags)
    assert parsed["codec"] == "jpeg" and parsed["jpeg"]["quality"] == 40
    assert parse_run("train", [*flags, "--jpeg.quality=30"])["jpeg"]["quality"] == 30
    plain = run(codec=None)
    assert "jpeg" not in plain.config and "raw" not in plain.config


@pytest.mark.parametrize(
    ("options", "codec", "says"),
    [
        ({"jpeg.quality": 50}, None, "stands under its own name, beside codec='jpeg'"),
        ({"jpeg.quality": 50}, "raw", "stands under its own name, beside codec='jpeg'"),
        ({"codec.quality": 50}, "jpeg", "stands under its own name, beside codec='jpeg'"),
        ({"jpeg.qualty": 50}, "jpeg", r"did you mean 'jpeg\.quality'"),
        ({"jpeg.quality": "high"}, "jpeg", r"'jpeg\.quality' is 'high'; it must be int"),
        ({"jpeg.quality": 0}, "jpeg", "quality is 0; it must be a whole number"),
        ({"jpeg": 50}, "jpeg", "'jpeg' is 50, but it is a group"),
        ({"learned.decoder": "old"}, "learned", "one of 'latest', 'pinned'"),
    ],
)
def test_bad_options_are_told_before_anything_is_written(
    options: dict[str, Any], codec: str | None, says: str, tmp_path: Path
) -> None:
    with pytest.raises(FastcilError, match=says):
        run(tmp_path / "run", codec=codec, **options)
    assert not (tmp_path / "run").exists()


def test_a_codec_called_as_another_group_is_refused(
    own: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.CODECS, "er", own)
    with pytest.raises(FastcilError, match="codec 'er' has the name of another group"):
        make_settings("er", codec="er")


def test_a_path_may_be_a_path() -> None:
    settings = make_settings("er", {"learned.checkpoint": Path("a") / "b"}, "learned")
    assert settings.groups["learned"].checkpoint == str(Path("a") / "b")


def test_the_command_line_knows_them() -> None:
    parsed = parse_run("compare", ["--methods=er,er+cam", "--codec", "jpeg", "--jpeg.quality", "9"])
    assert parsed["jpeg"]["quality"] == 9
    with pytest.raises(FastcilError, match=r"'--jpeg\.quality=9' is unknown"):
        parse_run("train", ["--method=er", "--jpeg.quality=9"])
    assert "--jpeg.quality 75" in describe("jpeg") and "options" not in describe("raw")


def test_a_comparison_shares_them_and_its_variants_have_their_own() -> None:
    variants = {
        "shared": {"method": "er"},
        "own": {"method": "er", "jpeg.quality": 20},
        "raw": {"method": "er", "codec": "raw"},
        "er+cam": {},
    }
    results = compare(
        variants, DATA, "lfs-2", "20 kB", "jpeg", backbone=ConvNet, **OPTIONS, **{"jpeg.quality": 9}
    ).results
    qualities = {k: getattr(r.learner.memory.codec, "quality", None) for k, r in results.items()}
    assert qualities == {"shared": 9, "own": 20, "raw": None, "er+cam": None}
    with pytest.raises(FastcilError, match="beside codec='jpeg'"):
        parse_variants({"raw": {"method": "er", "codec": "raw", "jpeg.quality": 9}})
    with pytest.raises(FastcilError, match="beside codec='jpeg'"):
        compare({"own": {"method": "er", "jpeg.quality": 9}}, DATA, backbone=ConvNet, **OPTIONS)
