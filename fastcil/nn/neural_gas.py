"""Neural gas: nodes that spread over a cloud of features, and edges that tell its topology."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastcil.errors import FastcilError

# Edges are bytes: 0 for none, else 1 + age.
OLDEST = 254
# Of the schedules, from the first step to the last (Martinetz and Schulten 1994, Sec. 5).
_RATES = (0.3, 0.05)
_LAST_REACH = 0.01


class NeuralGas(nn.Module):
    r"""Nodes over features, and edges between those that are neighbours.

    Nodes :math:`m_i` adapt to one feature vector f at a time (Martinetz and Schulten 1991; Tao et
    al. 2020, TOPIC, Eq. 2): with :math:`k_i` the number of nodes nearer to f than node i,

    .. math:: m_i \leftarrow m_i + \eta \, e^{-k_i / \alpha} (f - m_i)

    where the rate falls from 0.3 to 0.05 and the reach :math:`\alpha` from a fifth of the nodes to
    0.01, both geometrically, as in Martinetz and Schulten (1994); each vector is drawn with equal
    chance. Between clouds that lie far apart nodes may be left that are nearest to no vector: they
    start again where vectors are, and a quarter of the steps follow at the last reach (ours). The
    edge between the two nodes nearest to f is made, or its age set to 0, and the other
    edges of the nearest node grow older by 1: competitive Hebbian learning. An edge older than the
    lifetime is removed. Edges don't move nodes.

    In the end every vector belongs to its nearest node, which gets their most frequent label and
    their variance around it; should a node have none, the nearest vector's label.

    Steps depend on each other, so that there is a loop over vectors, on their device and without
    waiting for it. It is run once a task, not in training; edges are then made from the pairs it
    found, all at once.

    Args:
        lifetime: Age beyond which an edge is removed, up to 254.

    Attributes:
        nodes: m.  # float [N, D]
        variance: Of each coordinate around the node.  # float [N, D]
        labels: -1 where room was made for a node that is not there yet.  # int64 [N]
        counts: Vectors that belonged to the node.  # int64 [N]
        ages: 0 where there is no edge, else 1 + its age; symmetric.  # uint8 [N, N]

    Raises:
        FastcilError: A lifetime out of range.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> features = torch.tensor([[0.0], [0.2], [5.0], [5.2]])
        >>> gas = NeuralGas()
        >>> gas.fit(features, torch.tensor([0, 0, 1, 1]), 2, generator)
        >>> sorted(gas.nodes.flatten().round().tolist()), sorted(gas.labels.tolist())
        ([0.0, 5.0], [0, 1])
    """

    nodes: Tensor
    variance: Tensor
    labels: Tensor
    counts: Tensor
    ages: Tensor

    def __init__(self, lifetime: int = 50) -> None:
        super().__init__()
        if not 1 <= lifetime <= OLDEST:
            raise FastcilError(f"lifetime is {lifetime}; it must be from 1 to {OLDEST}.")
        self.lifetime = lifetime
        self.register_buffer("nodes", torch.empty(0, 0))
        self.register_buffer("variance", torch.empty(0, 0))
        self.register_buffer("labels", torch.empty(0, dtype=torch.int64))
        self.register_buffer("counts", torch.empty(0, dtype=torch.int64))
        self.register_buffer("ages", torch.empty(0, 0, dtype=torch.uint8))

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def known(self) -> Tensor:
        """Positions of the nodes that are there, int64 [n]."""
        return (self.labels >= 0).nonzero().flatten()

    def reserve(self, count: int, like: Tensor) -> None:
        """Makes room for nodes, behind those there are: it is counted from then on.

        Args:
            count: Rows to add.
            like: Of the dtype, device and width that they are to have.  # [..., D]
        """
        width = like.shape[-1]
        old, total = len(self), len(self) + count
        blank = like.detach().new_zeros(count, width)
        nodes, variance = (old_rows.to(like) for old_rows in (self.nodes, self.variance))
        self.nodes = torch.cat([nodes.reshape(old, width), blank])
        self.variance = torch.cat([variance.reshape(old, width), blank])
        none = torch.zeros(count, dtype=torch.int64, device=like.device)
        self.labels = torch.cat([self.labels.to(none), none - 1])
        self.counts = torch.cat([self.counts.to(none), none])
        ages = torch.zeros(total, total, dtype=torch.uint8, device=like.device)
        ages[:old, :old] = self.ages
        self.ages = ages

    def fit(
        self,
        features: Tensor,
        labels: Tensor,
        count: int,
        generator: torch.Generator,
        updates: int = 200,
    ) -> None:
        """Lays new nodes over features, in the place of all there were.

        Args:
            features: At least one.  # [n, D]
            labels: int64 [n]
            count: Nodes, of which there are never more than vectors; they start on as many of
                these, drawn at random.
            generator: On the CPU.
            updates: Steps for each node.

        Raises:
            FastcilError: No vector, one that is not finite, or sizes below 1.
        """
        _check(features, labels, count, updates)
        labels = labels.to(features.device)
        count = min(count, len(features))
        start = torch.randperm(len(features), generator=generator)[:count]
        nodes = features[start.to(features.device)].detach().clone()
        features = features.detach()
        winners = adapt(nodes, features, generator, count * updates)
        idle = torch.bincount(_distances(features, nodes).argmin(1), minlength=count) == 0
        more = winners[:0]
        if bool(idle.any()):
            start = torch.randperm(len(features), generator=generator)[: int(idle.sum())]
            nodes[idle] = features[start.to(nodes.device)]
            more = adapt(nodes, features, generator, count * updates // 4, _LAST_REACH)
        for name in ("nodes", "variance", "labels", "counts", "ages"):
            setattr(self, name, getattr(self, name)[:0])
        self.ages = self.ages[:, :0]
        self.reserve(count, nodes)
        self.nodes = nodes
        ages = age_edges(self.ages, winners, self.lifetime)
        # What was joined to a node where it was is not beside it where it is.
        ages[idle] = 0
        ages[:, idle] = 0
        self.ages = age_edges(ages, more, self.lifetime)
        self._count(features, labels, torch.arange(count, device=features.device))

    def insert(
        self,
        features: Tensor,
        labels: Tensor,
        per_class: int,
        generator: torch.Generator,
        updates: int = 200,
    ) -> None:
        """Adds nodes for new classes, each class's laid over its own vectors; old ones stay.

        They take the rows that were reserved, else new ones. The edges of all nodes then age by
        one pass over the new vectors, in their order: new nodes are joined to whichever they
        compete with, and old edges may end.

        Args:
            features: Of the new classes.  # [n, D]
            labels: int64 [n]
            per_class: Nodes of each class, of which there are never more than its vectors.
            generator: On the CPU.
            updates: Steps for each node.

        Raises:
            FastcilError: As `fit`.
        """
        _check(features, labels, per_class, updates)
        features, labels = features.detach().to(self.nodes), labels.to(features.device)
        rows = []
        for label in labels.unique().tolist():
            own = features[labels == label]
            count = min(per_class, len(own))
            start = torch.randperm(len(own), generator=generator)[:count]
            nodes = own[start.to(own.device)].clone()
            adapt(nodes, own, generator, count * updates)
            free = (self.labels < 0).nonzero().flatten()[:count]
            if len(free) < count:
                self.reserve(count - len(free), nodes)
                free = (self.labels < 0).nonzero().flatten()[:count]
            self.nodes = self.nodes.index_copy(0, free, nodes)
            self.labels = self.labels.index_fill(0, free, label)
            rows.append(free)
        known = self.known
        winners = known[_two_nearest(self.nodes[known], features)] if len(known) > 1 else None
        if winners is not None:
            self.ages = age_edges(self.ages, winners, self.lifetime)
        for label, own in zip(labels.unique().tolist(), rows, strict=True):
            mine = labels == label
            self._count(features[mine], labels[mine], own)

    def nearest(self, features: Tensor) -> Tensor:
        """The node nearest to each vector, [B, D] -> int64 [B]; only of those that are there."""
        far = torch.cdist(features, self.nodes.to(features))  # [B, N]
        return far.masked_fill(self.labels < 0, torch.inf).argmin(1)

    def edges(self) -> Tensor:
        """Pairs of neighbours, each once, the smaller number first, int64 [E, 2]."""
        return self.ages.triu(1).nonzero()

    def components(self) -> Tensor:
        """A number for each node, the same for those that a path of edges joins, int64 [N]."""
        group = torch.arange(len(self), device=self.ages.device)
        joined = (self.ages > 0) | torch.eye(len(self), dtype=torch.bool, device=group.device)
        for _ in range(max(1, math.ceil(math.log2(len(self) + 1)))):
            # Each time a path twice as long.
            joined = (joined.float() @ joined.float()) > 0
        return torch.where(joined, group, len(self)).amin(1) if len(self) else group

    def anchors(self, features: Tensor, labels: Tensor, rows: Tensor | None = None) -> Tensor:
        """For each node the vector of its label that is nearest to it, each vector once.

        Args:
            features: [n, D]
            labels: int64 [n]
            rows: Which nodes; None for all that are there.

        Returns:
            Positions of vectors, of each label in turn, those of nodes with most vectors first, so
            that a part from the beginning has as many of each as it can.  # int64 [<= N]
        """
        rows = self.known if rows is None else rows
        labels = labels.to(features.device)
        far = _distances(self.nodes[rows].to(features), features)  # [N, n]
        far = far.masked_fill(self.labels[rows][:, None] != labels, torch.inf)
        found = far.min(1)
        order = self.counts[rows].argsort(descending=True, stable=True)
        own = self.labels[rows][order]
        turn = (own[:, None] == own).tril().sum(1)  # how many of its label came so far
        order = order[turn.argsort(stable=True)]
        place = found.indices[order][found.values[order] < torch.inf].cpu()
        return torch.tensor(list(dict.fromkeys(place.tolist())), dtype=torch.int64)

    def _count(self, features: Tensor, labels: Tensor, rows: Tensor) -> None:
        """Sets the label, the variance and the number of vectors of some nodes."""
        nodes = self.nodes[rows]
        own = _distances(features, nodes).argmin(1)  # [n]
        counts = torch.bincount(own, minlength=len(rows))
        # As a product: sums by index differ from run to run on a GPU.
        belongs = nn.functional.one_hot(own, len(rows)).T.to(features)  # [N, n]
        spread = belongs @ (features - nodes[own]).square()  # [N, D]
        classes = int(labels.max()) + 1
        votes = torch.bincount(own * classes + labels, minlength=len(rows) * classes)
        closest = labels[_distances(nodes, features).argmin(1)]
        said = torch.where(counts > 0, votes.view(len(rows), classes).argmax(1), closest)
        self.labels = self.labels.index_copy(0, rows, said)
        self.counts = self.counts.index_copy(0, rows, counts)
        variance = spread / counts.clamp(min=1)[:, None]
        self.variance = self.variance.index_copy(0, rows, variance)


def adapt(
    nodes: Tensor,
    features: Tensor,
    generator: torch.Generator,
    steps: int,
    reach: float | None = None,
) -> Tensor:
    r"""Moves nodes towards features drawn at random, in place; see `NeuralGas`.

    Args:
        nodes: m.  # float [N, D]
        features: [n, D]
        generator: Draws which, on the CPU.
        steps: How many.
        reach: At the first step; None for a fifth of the nodes.

    Returns:
        The nearest and, where there is one, the second nearest node of each step before it moved.
        # int64 [steps, min(N, 2)]
    """
    count = len(nodes)
    drawn = torch.randint(len(features), (steps,), generator=generator)
    # Thousands of small steps, each waiting for the one before: on the host, wherever the nodes
    # are, for a GPU would spend its time on being asked.
    vectors, moved = features[drawn.to(features.device)].cpu(), nodes.cpu()
    share = torch.arange(steps, dtype=torch.float64) / max(1, steps - 1)
    rates = (_RATES[0] * (_RATES[1] / _RATES[0]) ** share).tolist()
    first = max(0.2 * count, _LAST_REACH) if reach is None else reach
    reaches = (first * (_LAST_REACH / first) ** share).tolist()
    rank = torch.arange(count, dtype=nodes.dtype)
    strength = torch.empty_like(rank)
    winners = torch.empty(steps, min(count, 2), dtype=torch.int64)
    for step, vector in enumerate(vectors):
        away = vector - moved  # [N, D]
        order = away.square().sum(1).argsort(stable=True)
        strength[order] = rates[step] * (rank / -reaches[step]).exp()
        moved.addcmul_(away, strength[:, None])
        winners[step] = order[:2]
    nodes.copy_(moved)
    return winners.to(nodes.device)


def age_edges(ages: Tensor, winners: Tensor, lifetime: int) -> Tensor:
    """Edges after steps of competitive Hebbian learning, all at once.

    The same as step after step: an edge's age is the number of steps that either of its nodes has
    won since it was last made, so that the last of these steps and counts of wins tell it.

    Args:
        ages: 0 for no edge, else 1 + age; symmetric.  # uint8 [N, N]
        winners: Of each step the nearest node and the second nearest.  # int64 [S, 2], or [S, 1]
        lifetime: Age beyond which an edge is removed, at most 254.

    Returns:
        The same after the steps.  # uint8 [N, N]

    Example:
        >>> ages = torch.zeros(3, 3, dtype=torch.uint8)
        >>> age_edges(ages, torch.tensor([[0, 1], [0, 2], [2, 0]]), lifetime=5).tolist()
        [[0, 2, 1], [2, 0, 0], [1, 0, 0]]
    """
    nodes, steps = len(ages), len(winners)
    if winners.shape[1] < 2 or not steps:
        return ages.clone()
    device = ages.device
    low, high = winners.amin(1), winners.amax(1)
    pairs, which = torch.unique(low * nodes + high, return_inverse=True)
    time = torch.arange(steps, device=device)
    made = torch.zeros_like(pairs).scatter_reduce_(0, which, time, "amax")  # [P]
    wins = torch.bincount(winners[:, 0], minlength=nodes)
    # Wins in the order of nodes, and of time for each: how many of a node's came by some time.
    sorted_wins = (winners[:, 0] * steps + time).sort().values
    before = wins.cumsum(0) - wins
    since = torch.zeros_like(pairs)
    for node in (pairs // nodes, pairs % nodes):
        by_then = torch.searchsorted(sorted_wins, node * steps + made, right=True)
        since = since + wins[node] - (by_then - before[node])
    grown = ages.long() + wins[:, None] + wins[None, :]
    grown = torch.where(ages > 0, grown, 0).flatten()
    grown[pairs] = since + 1
    grown[(pairs % nodes) * nodes + pairs // nodes] = since + 1
    return torch.where(grown > lifetime + 1, 0, grown).view(nodes, nodes).to(torch.uint8)


def _distances(left: Tensor, right: Tensor) -> Tensor:
    """Euclidean distances, [n, D] and [m, D] -> [n, m], of differences and not of products."""
    return torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")


def _two_nearest(nodes: Tensor, features: Tensor) -> Tensor:
    """The nearest and the second nearest node of each vector, int64 [n, 2]."""
    return _distances(features, nodes).argsort(dim=1, stable=True)[:, :2]


def _check(features: Tensor, labels: Tensor, count: int, updates: int) -> None:
    """Refuses what no nodes can be laid over."""
    if features.ndim != 2 or not len(features) or len(labels) != len(features):
        raise FastcilError(
            f"features has shape {tuple(features.shape)} for {len(labels)} labels; it must be "
            f"[N, D] with a row for each, at least one."
        )
    if not features.isfinite().all():
        raise FastcilError(
            "features holds NaN or infinity; training has diverged: lower the learning rate."
        )
    if min(count, updates) < 1:
        raise FastcilError(f"count is {count} and updates {updates}; both must be at least 1.")
