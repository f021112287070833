"""Neural gas against the rules taken step by step, and on clouds whose topology is known."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from fastcil.nn.neural_gas import NeuralGas, adapt, age_edges


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clusters(centres: torch.Tensor, each: int, spread: float, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(len(centres) * each, centres.shape[1], generator=seeded(seed))
    return centres.repeat_interleave(each, 0) + spread * noise


def naive(nodes, features, drawn, lifetime):
    """Martinetz and Schulten's steps, one by one, in float64, edges with ages in a dictionary."""
    nodes, ages, steps = np.array(nodes, dtype=np.float64), {}, len(drawn)
    first = max(0.2 * len(nodes), 0.01)
    for step, place in enumerate(drawn):
        share = step / (steps - 1)
        rate = 0.3 * (0.05 / 0.3) ** share
        reach = first * (0.01 / first) ** share
        feature = features[place]
        order = sorted(range(len(nodes)), key=lambda i: float(((nodes[i] - feature) ** 2).sum()))
        for rank, i in enumerate(order):
            nodes[i] += rate * math.exp(-rank / reach) * (feature - nodes[i])
        ages = step_edges(ages, order[0], order[1], lifetime)
    return nodes, ages


def step_edges(ages, winner, second, lifetime):
    older = {edge: age + (winner in edge) for edge, age in ages.items()}
    older[frozenset((winner, second))] = 0
    return {edge: age for edge, age in older.items() if age <= lifetime}


def dense(ages, count):
    matrix = torch.zeros(count, count, dtype=torch.uint8)
    for edge, age in ages.items():
        i, j = edge
        matrix[i, j] = matrix[j, i] = age + 1
    return matrix


@pytest.mark.parametrize(("count", "dims", "lifetime"), [(7, 3, 10), (12, 2, 4), (2, 5, 1)])
def test_steps_are_those_of_the_naive_form(count, dims, lifetime):
    features = torch.randn(40, dims, generator=seeded(1), dtype=torch.float64)
    start = features[:count].clone()
    drawn = torch.randint(40, (120,), generator=seeded(2)).tolist()
    nodes = start.clone()
    winners = adapt(nodes, features, seeded(2), 120)
    expected, ages = naive(start.numpy(), features.numpy(), drawn, lifetime)
    torch.testing.assert_close(nodes, torch.from_numpy(expected), rtol=1e-10, atol=1e-12)
    none = torch.zeros(count, count, dtype=torch.uint8)
    assert torch.equal(age_edges(none, winners, lifetime), dense(ages, count))


@pytest.mark.parametrize("lifetime", [1, 3, 12, 254])
def test_edges_age_from_where_they_were(lifetime):
    rng = np.random.default_rng(lifetime)
    ages: dict = {}
    matrix = torch.zeros(6, 6, dtype=torch.uint8)
    for _ in range(4):
        pairs = np.array([rng.permutation(6)[:2] for _ in range(17)])
        for winner, second in pairs.tolist():
            ages = step_edges(ages, winner, second, lifetime)
        matrix = age_edges(matrix, torch.from_numpy(pairs), lifetime)
        assert torch.equal(matrix, dense(ages, 6))


def test_clusters_are_the_components():
    """Four clouds, two of a class: each gets its nodes, joined to no other cloud's."""
    centres = torch.tensor([[0.0, 0.0], [8.0, 0.0], [0.0, 9.0], [20.0, 20.0]])
    features = clusters(centres, 60, 0.5)
    labels = torch.tensor([0, 1, 1, 2]).repeat_interleave(60)
    gas = NeuralGas()
    gas.fit(features, labels, 16, seeded())
    whose = torch.cdist(gas.nodes, centres).argmin(1)
    assert torch.cdist(gas.nodes, centres).amin(1).max() < 1.5
    pieces = gas.components()
    for cloud in range(4):
        assert len(pieces[whose == cloud].unique()) == 1, "a cloud hangs together"
    assert len(pieces.unique()) == 4
    assert torch.equal(gas.labels, torch.tensor([0, 1, 1, 2])[whose])
    assert int(gas.counts.sum()) == 240
    own = torch.cdist(features, gas.nodes).argmin(1)
    for node in range(16):
        mine = features[own == node]
        assert int(gas.counts[node]) == len(mine)
        expected = ((mine - gas.nodes[node]) ** 2).mean(0)
        torch.testing.assert_close(gas.variance[node], expected)


def test_a_ring_stays_a_ring():
    angle = 2 * math.pi * torch.rand(400, generator=seeded(3))
    features = torch.stack([angle.cos(), angle.sin()], 1)
    gas = NeuralGas()
    gas.fit(features, torch.zeros(400, dtype=torch.int64), 12, seeded())
    order = torch.atan2(gas.nodes[:, 1], gas.nodes[:, 0]).argsort().tolist()
    ring = {frozenset((order[i], order[i - 1])) for i in range(12)}
    assert {frozenset(edge) for edge in gas.edges().tolist()} == ring
    assert torch.equal(gas.ages, gas.ages.T) and not gas.ages.diagonal().any()


def test_a_line_has_two_ends():
    features = torch.linspace(0, 10, 300)[:, None].repeat(1, 3)
    gas = NeuralGas()
    gas.fit(features, torch.zeros(300, dtype=torch.int64), 9, seeded())
    order = gas.nodes[:, 0].argsort().tolist()
    line = {frozenset(pair) for pair in pairwise(order)}
    assert {frozenset(edge) for edge in gas.edges().tolist()} == line
    assert len(gas.components().unique()) == 1


def test_insertion_leaves_old_nodes_where_they_were():
    centres = torch.tensor([[0.0, 0.0], [8.0, 0.0]])
    gas = NeuralGas()
    gas.fit(clusters(centres, 40, 0.4), torch.tensor([0, 1]).repeat_interleave(40), 6, seeded())
    before = {name: value.clone() for name, value in gas.named_buffers()}
    edges = {frozenset(edge) for edge in gas.edges().tolist()}
    new = torch.tensor([[0.0, 10.0], [8.0, 10.0], [30.0, 30.0]])
    shots, labels = clusters(new, 5, 0.3, seed=5), torch.tensor([2, 3, 4]).repeat_interleave(5)
    gas.reserve(3, gas.nodes)
    assert gas.known.tolist() == list(range(6)) and gas.labels[6:].tolist() == [-1, -1, -1]
    assert int(gas.nearest(torch.zeros(1, 2))) < 6, "a row that is only reserved is nobody's"
    gas.insert(shots, labels, 1, seeded(1))
    for name in ("nodes", "variance", "labels", "counts"):
        assert torch.equal(getattr(gas, name)[:6], before[name])
    assert gas.labels.tolist()[6:] == [2, 3, 4] and gas.counts.tolist()[6:] == [5, 5, 5]
    assert torch.cdist(gas.nodes[6:], new).diagonal().max() < 0.5
    now = {frozenset(edge) for edge in gas.edges().tolist()}
    assert edges <= now, "no old node won anything, so that no old edge aged"
    joined = {i for edge in now - edges for i in edge}
    assert {6, 7, 8} <= joined
    # Without room made beforehand rows are added.
    gas.insert(shots[:5] - 50, torch.full((5,), 5), 2, seeded(2))
    assert gas.labels.tolist()[-2:] == [5, 5] and torch.equal(gas.nodes[:6], before["nodes"])


def test_anchors_are_the_nearest_images_of_the_nodes_class():
    features = torch.randn(60, 4, generator=seeded(4))
    labels = torch.randint(3, (60,), generator=seeded(5))
    gas = NeuralGas()
    gas.fit(features, labels, 10, seeded())
    found = gas.anchors(features, labels)
    expected, turns = [], {}
    for node in gas.counts.argsort(descending=True, stable=True).tolist():
        turns.setdefault(int(gas.labels[node]), []).append(node)
    size = {node: int(gas.counts[node]) for own in turns.values() for node in own}
    longest = max(map(len, turns.values()))
    rounds = [[own[k] for own in turns.values() if k < len(own)] for k in range(longest)]
    ordered = [sorted(some, key=lambda node: (-size[node], node)) for some in rounds]
    assert len(turns) == 3 and longest > 2
    for node in (node for some in ordered for node in some):
        own = [i for i in range(60) if labels[i] == gas.labels[node]]
        best = min(own, key=lambda i: float((features[i] - gas.nodes[node]).square().sum()))
        if best not in expected:
            expected.append(best)
    assert found.tolist() == expected


def test_same_seed_same_bits_and_few_vectors():
    features, labels = torch.randn(5, 3, generator=seeded(6)), torch.arange(5)
    twins = NeuralGas(), NeuralGas()
    for gas in twins:
        gas.fit(features, labels, 400, seeded(7))
    first, second = (dict(gas.named_buffers()) for gas in twins)
    assert all(torch.equal(second[name], value) for name, value in first.items())
    assert len(twins[0]) == 5
    alone = NeuralGas()
    alone.fit(features[:1], labels[:1], 3, seeded())
    torch.testing.assert_close(alone.nodes, features[:1])
    assert alone.edges().shape == (0, 2) and alone.components().tolist() == [0]


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: NeuralGas(0), "lifetime is 0"),
        (lambda: NeuralGas(255), "lifetime is 255"),
        (lambda: NeuralGas().fit(torch.zeros(0, 2), torch.zeros(0), 3, seeded()), "features has"),
        (lambda: NeuralGas().fit(torch.ones(2, 2), torch.zeros(3), 3, seeded()), "features has"),
        (
            lambda: NeuralGas().fit(torch.ones(2, 2) * math.nan, torch.zeros(2), 3, seeded()),
            "NaN or infinity",
        ),
        (lambda: NeuralGas().fit(torch.ones(2, 2), torch.zeros(2), 0, seeded()), "count is 0"),
    ],
)
def test_bad_arguments(action, message):
    with pytest.raises(ValueError, match=message):
        action()


def test_nodes_that_start_again_leave_their_edges_behind():
    """Thirty clouds, of which nodes find some only when they are sent there."""
    centres = 20 * torch.randn(30, 16, generator=seeded(7))
    features = clusters(centres, 12, 0.3)
    labels = torch.arange(30).repeat_interleave(12)
    gas = NeuralGas()
    gas.fit(features, labels, 75, seeded(8), updates=50)
    owner = torch.cdist(gas.nodes, centres).argmin(1)
    edges = gas.edges()
    across = (owner[edges[:, 0]] != owner[edges[:, 1]]).double().mean()
    assert float(across) < 0.3, float(across)
