"""Embeddings of λ and conditioned blocks against their equations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastcil.compression.conditioning import (
    ChannelAffine,
    ConditionedBlock,
    ConditionedSequence,
    LambdaEmbedding,
)
from fastcil.errors import FastcilError


def erf_gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def linear(layer: nn.Linear, x: list[float]) -> list[float]:
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    return [
        sum(w * v for w, v in zip(row, x, strict=True)) + b
        for row, b in zip(weight, bias, strict=True)
    ]


@pytest.mark.parametrize("lmbda", [32.0, 77.7, 1024.0])
def test_embedding_is_its_equation(lmbda):
    embedding = LambdaEmbedding(6, (32.0, 1024.0)).double()
    t = 64 * math.log(lmbda) / math.log(8192)
    omega = [64 ** (-2 * j / 6) for j in range(3)]
    waves = [math.cos(t * w) for w in omega] + [math.sin(t * w) for w in omega]
    hidden = [erf_gelu(x) for x in linear(embedding.first, waves)]
    expected = torch.tensor([linear(embedding.last, hidden)], dtype=torch.float64)
    found = embedding(torch.tensor([lmbda], dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("given", "known"), [(1.0, 32.0), (4096.0, 1024.0), (50.0, 50.0)])
def test_lambda_is_clamped_to_the_range(given, known):
    embedding = LambdaEmbedding(8, (32.0, 1024.0))
    found, expected = (embedding(torch.tensor([x])) for x in (given, known))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("new", "first", "last"),
    [((32, 4096), 0.25, 1.0), ((4, 1024), 1.0, 0.125), ((16.0, 2048.0), 0.5, 0.5)],
)
@pytest.mark.parametrize("both", [True, False])
def test_rescaling(new, first, last, both):
    embedding = LambdaEmbedding(8, (32.0, 1024.0))
    old = {name: value.clone() for name, value in embedding.state_dict().items()}
    embedding.rescale(new, last=both)
    for layer, factor in (("first", first), ("last", last if both else 1.0)):
        for name in ("weight", "bias"):
            key = f"{layer}.{name}"
            assert torch.equal(embedding.state_dict()[key], old[key] * factor)
    assert embedding.range.tolist() == list(new)
    assert not torch.equal(embedding(torch.tensor([4.0])), embedding(torch.tensor([4096.0])))


def test_a_range_only_grows():
    embedding = LambdaEmbedding(8, (32.0, 1024.0))
    with pytest.raises(FastcilError, match="must contain"):
        embedding.rescale((64.0, 4096.0))
    with pytest.raises(FastcilError, match="lambda_range"):
        LambdaEmbedding(8, (0.0, 4.0))
    with pytest.raises(FastcilError, match="even"):
        LambdaEmbedding(7, (1.0, 4.0))


@pytest.mark.parametrize(("channels", "kernel", "side"), [(3, 3, (4, 5)), (2, 7, (1, 3))])
def test_block_is_its_equation(channels, kernel, side):
    torch.manual_seed(1)
    block = ConditionedBlock(channels, kernel, 4).double()
    block.layer_scale.data.normal_()
    x = torch.randn(2, channels, *side, dtype=torch.float64)
    e = torch.randn(2, 4, dtype=torch.float64)
    found = block(x, e).detach()
    weight = block.depthwise.weight.detach()[:, 0]
    bias, gamma = block.depthwise.bias.tolist(), block.layer_scale.tolist()
    half = kernel // 2
    for b in range(2):
        modulation = linear(block.modulation, [erf_gelu(v) for v in e[b].tolist()])
        shift, scale = modulation[:channels], modulation[channels:]
        for i in range(side[0]):
            for j in range(side[1]):
                y = []
                for c in range(channels):
                    total = bias[c]
                    for u in range(kernel):
                        for v in range(kernel):
                            p, q = i + u - half, j + v - half
                            if 0 <= p < side[0] and 0 <= q < side[1]:
                                total += float(weight[c, u, v] * x[b, c, p, q])
                    y.append(total)
                mean = sum(y) / channels
                variance = sum((v - mean) ** 2 for v in y) / channels
                y = [(v - mean) / math.sqrt(variance + 1e-6) for v in y]
                y = [v * (1 + s) + t for v, s, t in zip(y, scale, shift, strict=True)]
                y = linear(block.narrow, [erf_gelu(v) for v in linear(block.widen, y)])
                for c in range(channels):
                    expected = float(x[b, c, i, j]) + gamma[c] * y[c]
                    assert float(found[b, c, i, j]) == pytest.approx(expected, abs=1e-10)


def test_affine_starts_near_the_identity_and_is_its_equation():
    affine = ChannelAffine(3, 4).double()
    assert float(affine.modulation.weight.detach().abs().max()) <= 0.01 / math.sqrt(4)
    affine.modulation.bias.data.normal_()
    x, e = torch.randn(2, 3, 2, 2, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    found = affine(x, e)
    for b in range(2):
        both = linear(affine.modulation, e[b].tolist())
        for c in range(3):
            torch.testing.assert_close(found[b, c], x[b, c] * (1 + both[c]) + both[3 + c])


def test_sequence_passes_the_embedding_only_where_it_is_wanted():
    sequence = ConditionedSequence([nn.Conv2d(3, 4, 1), nn.ReLU(), ChannelAffine(4, 8)])
    x, e = torch.randn(1, 3, 2, 2), torch.randn(1, 8)
    expected = sequence[2](torch.relu(sequence[0](x)), e)
    assert torch.equal(sequence(x, e), expected)
    assert torch.equal(sequence[:2](x, None), torch.relu(sequence[0](x)))
