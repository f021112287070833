"""Codes, clusters of them, and images made again."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastcil.data import Augmentation, Examples, ImageStore
from fastcil.errors import FastcilError
from fastcil.memory.episodes import Costs, Episodes, Rows
from fastcil.memory.fitting_rows import fitting_rows, reduce_rows
from fastcil.memory.regenerate import regenerate
from fastcil.nn.image_autoencoder import ImageAutoencoder, code_length, decode, decoder_length

SIDE, WIDTH = 8, 8
D = code_length(WIDTH, SIDE)


def blobs(n: int, clusters: int, seed: int = 0, width: int = D) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    centres = rng.uniform(0, 20, (clusters, width))
    return torch.tensor(centres[np.arange(n) % clusters] + rng.normal(0, 0.1, (n, width))).float()


def filled(dtype: torch.dtype = torch.float32) -> Episodes:
    """Two classes of two tasks, with a decoder each; single codes and clusters."""
    episodes = Episodes(dtype)
    for task in range(2):
        torch.manual_seed(task)
        autoencoder = ImageAutoencoder(WIDTH)
        autoencoder(torch.randn(8, 3, SIDE, SIDE))
        episodes.add_decoder(autoencoder.folded_decoder(), task, alone=False)
    pair = Rows(
        torch.rand(3, D),
        torch.tensor([0.0, 0.5, 0.2])[:, None].expand(3, D).clone(),
        torch.tensor([1, 3, 2]),
    )
    episodes.hold({(0, 0): Rows.single(torch.rand(2, D)), (1, 1): pair})
    return episodes


def nbytes(episodes: Episodes) -> int:
    return sum(b.numel() * b.element_size() for b in episodes.buffers())


@pytest.mark.parametrize("dtype, itemsize", [(torch.float16, 2), (torch.float32, 4)])
def test_costs_are_the_bytes_held(dtype: torch.dtype, itemsize: int) -> None:
    episodes = filled(dtype)
    costs = Costs(D, decoder_length(WIDTH), itemsize)
    rows = sum(costs.of(episodes.rows(*group)) for group in episodes.groups())
    assert episodes.groups() == [(0, 0), (1, 1)]
    assert nbytes(episodes) == episodes.retained().nbytes == costs.fixed(2, 2) + rows
    assert rows == 3 * costs.row + 2 * costs.cluster
    episodes.clear()
    assert nbytes(episodes) == 0 == len(episodes)


def test_rows_come_back() -> None:
    episodes = filled()
    rows = {group: episodes.rows(*group) for group in episodes.groups()}
    assert rows[1, 1].counts.tolist() == [1, 3, 2]
    assert rows[1, 1].variances[:, 0].tolist() == pytest.approx([0, 0.5, 0.2])
    before = {name: b.clone() for name, b in episodes.named_buffers()}
    episodes.hold(rows)
    assert all(torch.equal(b, before[name]) for name, b in episodes.named_buffers())


def test_all_that_fits_is_kept_as_it_is() -> None:
    rows, costs = Rows.single(blobs(20, 3)), Costs(D, 0, 4)
    assert reduce_rows(rows, 20 * costs.row, costs, seed=0) is rows
    assert len(reduce_rows(rows, 20 * costs.row - 1, costs, seed=0)) < 20


@pytest.mark.parametrize("clusters", [1, 3, 7])
def test_clusters_have_the_moments_of_their_codes(clusters: int) -> None:
    """Mean and variance of all codes of a class are those of the mixture that is kept."""
    codes, costs = blobs(60, clusters), Costs(D, 0, 4)
    few = reduce_rows(Rows.single(codes), clusters * costs.cluster, costs, seed=1)
    assert len(few) <= clusters and int(few.counts.sum()) == 60
    assert costs.of(few) <= clusters * costs.cluster
    # And clusters of clusters have them too.
    fewer = reduce_rows(few, costs.cluster, costs, seed=1)
    assert len(fewer) == 1 and int(fewer.counts) == 60
    x = codes.double()
    np.testing.assert_allclose(fewer.centres[0], x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(fewer.variances[0], x.var(0, correction=0), rtol=1e-4)


def test_clusters_are_those_that_there_are() -> None:
    codes, costs = blobs(60, 3), Costs(D, 0, 4)
    sums = {
        float((few.variances * few.counts[:, None]).sum())
        for few in (reduce_rows(Rows.single(codes), 3 * costs.cluster, costs, s) for s in range(8))
    }
    naive = sum(float(codes[k::3].var(0, correction=0).sum()) * 20 for k in range(3))
    assert min(sums) == pytest.approx(naive, rel=1e-4)


def test_without_room_for_a_covariance_the_most_typical_code_is_kept() -> None:
    codes, costs = torch.tensor([[0.0], [4.0], [5.0], [9.0], [30.0]]), Costs(1, 0, 4)
    (kept,) = reduce_rows(Rows.single(codes), costs.row, costs, seed=0).centres
    assert float(kept) == 9.0  # nearest to the mean, 9.6
    kept = reduce_rows(Rows.single(codes), costs.row, costs, seed=0)
    assert kept.counts.tolist() == [1] and costs.of(kept) == costs.row


def test_repeated_codes_are_one_cluster() -> None:
    costs = Costs(2, 0, 4)
    few = reduce_rows(Rows.single(torch.ones(9, 2)), 3 * costs.cluster, costs, seed=0)
    assert few.counts.tolist() == [9] and few.variances.abs().max() < 1e-20


@pytest.mark.parametrize("share", [1.0, 1.9, 2.0, 5.3, 11.0, math.inf])
def test_every_group_gets_its_share(share: float) -> None:
    costs = Costs(D, 0, 2)
    codes = blobs(24, 5)
    images = ImageStore.from_batch(torch.zeros(24, SIDE, SIDE, 3, dtype=torch.uint8))
    sources = {
        (0, 0): Examples(images, torch.zeros(24, dtype=torch.int64)),
        (1, 0): Rows.single(codes[:10]),
        (0, 1): Rows.single(codes[:2]),
    }
    kept = fitting_rows(
        sources, lambda some: codes[: len(some)], share * 3 * costs.row, costs, torch.float16, 0
    )
    assert list(kept) == list(sources)
    assert sum(map(costs.of, kept.values())) <= share * 3 * costs.row
    assert all(len(rows) for rows in kept.values())
    if share in (11.0, math.inf):  # 36 rows in all: more than 33
        whole = [len(rows) for rows in kept.values()] == [24, 10, 2]
        assert whole == (share == math.inf)


def test_codes_too_large_for_the_dtype_are_a_sentence() -> None:
    images = ImageStore.from_batch(torch.zeros(2, SIDE, SIDE, 3, dtype=torch.uint8))
    sources = {(0, 0): Examples(images, torch.zeros(2, dtype=torch.int64))}
    with pytest.raises(FastcilError, match=r"NaN or infinity as torch\.float16"):
        fitting_rows(
            sources, lambda _: torch.full((2, D), 1e6), 1e9, Costs(D, 0, 2), torch.float16, 0
        )


def test_samples_have_the_moments_of_their_cluster() -> None:
    episodes = Episodes(torch.float32)
    episodes.add_decoder(torch.zeros(decoder_length(WIDTH)), 0, alone=False)
    rows = Rows(
        torch.tensor([[1.0, 2.0], [5.0, -3.0], [7.0, 0.0]]),
        torch.tensor([[0.0, 0.0], [4.0, 0.25], [9.0, 1.0]]),
        torch.tensor([1, 2, 5]),
    )
    episodes.hold({(0, 0): rows})
    chosen = torch.arange(3).repeat_interleave(4000)
    drawn = list(episodes.samples(chosen, torch.Generator().manual_seed(0)))
    assert torch.equal(torch.cat([some for some, _ in drawn]), chosen)
    codes = torch.cat([codes for _, codes in drawn]).view(3, 4000, 2).double()
    assert torch.equal(codes[0], rows.centres[:1].double().expand(4000, 2))
    np.testing.assert_allclose(codes.mean(1), rows.centres, atol=0.15)
    np.testing.assert_allclose(codes.var(1), rows.variances, rtol=0.08)
    covariance = np.cov(codes[1].T.numpy())
    assert abs(covariance[0, 1]) < 0.05  # diagonal


def test_regenerated_images_are_what_their_own_decoder_makes() -> None:
    episodes, augmentation = filled(), Augmentation.cifar(SIDE)
    made = regenerate(episodes, torch.arange(len(episodes)), WIDTH, augmentation, seed=3)
    assert made.examples.labels.tolist() == [0, 0, *[1] * 6]
    assert made.born.tolist() == [0, 0, *[1] * 6]
    assert made.examples.images.sizes.unique().tolist() == [SIDE]
    # Single codes are decoded as they are: rows 0 and 1 by decoder 0, row 2 by decoder 1.
    for place, reader in ((0, 0), (1, 0), (2, 1)):
        code = episodes.centres[place][None]
        image = decode(episodes.decoders[reader], code, WIDTH, SIDE)[0].permute(1, 2, 0).numpy()
        image = (image * np.array(augmentation.std) + np.array(augmentation.mean)) * 255
        expected = np.clip(np.round(image), 0, 255)
        assert np.abs(made.examples.images.image(place).numpy() - expected).max() <= 1
    again = regenerate(episodes, torch.arange(len(episodes)), WIDTH, augmentation, seed=3)
    other = regenerate(episodes, torch.arange(len(episodes)), WIDTH, augmentation, seed=4)
    same = [
        torch.equal(m.examples.images.pixels, made.examples.images.pixels) for m in (again, other)
    ]
    assert same == [True, False]


@pytest.mark.parametrize("per_class, counts", [(0, [2, 6]), (1, [1, 1]), (4, [2, 4]), (9, [2, 6])])
def test_a_cap_on_images_of_a_class(per_class: int, counts: list[int]) -> None:
    episodes = filled()
    made = regenerate(
        episodes,
        torch.arange(len(episodes)),
        WIDTH,
        Augmentation.cifar(SIDE),
        seed=0,
        per_class=per_class,
    )
    assert made.examples.labels.bincount().tolist() == counts


def test_a_decoder_alone_reads_all_rows() -> None:
    episodes = filled()
    episodes.add_decoder(torch.ones(decoder_length(WIDTH)), 2, alone=True)
    assert episodes.decoders.shape == (1, decoder_length(WIDTH))
    assert episodes.decoder_of.tolist() == [0, 0, 0] and len(episodes.gamma) == 3
    episodes.add_decoder(torch.zeros(decoder_length(WIDTH)), 4, alone=False)
    assert episodes.decoder_of.tolist() == [0, 0, 0, 1, 1]
