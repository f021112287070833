"""CompressAI's calls."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("constriction")

from fastcil.compression.codec import ImageCodec
from fastcil.compression.compressai_style import (
    CompressaiStyle,
    from_compressai_lambda,
    to_compressai_lambda,
)
from fastcil.compression.model import CodecModel
from fastcil.compression.objective import rate_distortion
from fastcil.errors import FastcilError

Build = Callable[[str], CodecModel]
Draw = Callable[..., torch.Tensor]


@pytest.mark.parametrize("name", ["hierarchical-tiny", "msh", "gma"])
def test_round_trip(lively: Build, images: Draw, name: str) -> None:
    net = CompressaiStyle(lively(name), lmbda=100.0)
    x = (images(2, 50, 71) * 255).round() / 255
    coded = net.compress(x)
    assert [len(runs) for runs in coded["strings"]] == [2] * len(net.model.latent_names)
    assert coded["shape"] == (50, 71)
    x_hat = net.decompress(coded["strings"], coded["shape"])["x_hat"]
    codec = ImageCodec(net.model)
    for k in range(2):
        image = (x[k] * 255).round().byte().permute(1, 2, 0)
        data = codec.encode(image, 100.0)
        decoded = (x_hat[k] * 255).round().byte().permute(1, 2, 0)
        assert (decoded.int() - codec.decode(data).int()).abs().max() <= 1
        # Each run ends on a byte of its own, and may take a byte or two to end at all.
        total = sum(len(runs[k]) for runs in coded["strings"])
        assert 0 <= total - (len(data) - 28) <= 2 * len(coded["strings"])


def test_forward_is_the_models(lively: Build, images: Draw) -> None:
    net = CompressaiStyle(lively("hierarchical-tiny"), lmbda=100.0).eval()
    x = images(1, 64, 64)
    out, wanted = net(x), net.model(x, 100.0)
    assert out.keys() == {"x_hat", "likelihoods"}
    assert torch.equal(out["x_hat"], wanted["x_hat"])
    assert out["likelihoods"].keys() == {"z1", "z2", "z3", "z4"}


def test_bad_strings(lively: Build, images: Draw) -> None:
    net = CompressaiStyle(lively("hierarchical-tiny"), lmbda=100.0)
    strings = net.compress(images(2, 64, 64))["strings"]
    for bad in (strings[:3], [*strings[:3], strings[3][:1]], []):
        with pytest.raises(FastcilError, match="it must have 4 latents"):
            net.decompress(bad, (64, 64))


def test_update_leaves_tables_alone_that_files_were_coded_with(lively: Build) -> None:
    net = CompressaiStyle(lively("msh"), lmbda=100.0)
    assert net.update() and not net.update()
    with torch.no_grad():
        next(net.model.entropy.parameters()).mul_(1.5)
    assert not net.update()
    assert net.update(force=True) and not net.update(force=True)
    net.model.trainable("all")
    assert net.update(), "tables that are to be learned anew are forgotten"
    assert not CompressaiStyle(lively("hierarchical-tiny"), lmbda=100.0).update()


def test_aux_loss_trains_nothing(lively: Build) -> None:
    net = CompressaiStyle(lively("msh"), lmbda=100.0)
    loss = net.aux_loss()
    loss.backward()
    assert loss == 0
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(("theirs", "ours"), [(0.0018, 29), (0.0483, 785)])
def test_lambdas(theirs: float, ours: int) -> None:
    assert round(from_compressai_lambda(theirs)) == ours
    assert to_compressai_lambda(from_compressai_lambda(theirs)) == pytest.approx(theirs)


def test_lambdas_weigh_the_same(images: Draw) -> None:
    x, y = images(1, 8, 8), images(1, 8, 9)[..., :8]
    out = {"x_hat": y, "log_likelihoods": {"y": torch.zeros(1, 1)}}
    ours = rate_distortion(out, x, torch.tensor([from_compressai_lambda(0.013)]))
    assert ours["distortion"].item() == pytest.approx(
        0.013 * 255**2 * float((x - y).square().mean()), rel=1e-5
    )
