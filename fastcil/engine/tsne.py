"""Features of base and new classes, laid out in the plane."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcil.contract import Method, Record, evaluating
from fastcil.data import Examples
from fastcil.engine.context import EngineContext

TITLE = "t-SNE of features"
MOST = 1024
_PERPLEXITY = 30.0
_FEWEST = 8


def tsne_records(
    method: Method, context: EngineContext, test: Examples, base: int, seed: int
) -> list[Record]:
    """Where t-SNE puts test images of the first task's classes, and of those that came since.

    (van der Maaten and Hinton 2008, by scikit-learn; Yang et al. 2021, LEC-Net, Fig. 9.)

    Args:
        method: Its features (`fastcil.contract.Method.embed`) are laid out.
        context: Reads the images.
        test: Images of all classes known, labels in learning order; of either group 1024 at most
            are drawn.
        base: Classes of the first task.
        seed: Of what is drawn, and of the layout's start.

    Returns:
        One record of kind ``scatter``; none of fewer than 8 images, or where training diverged.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = test.labels.cpu()
    groups = {"base classes": labels < base, "new classes": labels >= base}
    drawn = [_draw(mask.nonzero().flatten(), generator) for mask in groups.values()]
    chosen = torch.cat(drawn)
    if len(chosen) < _FEWEST:
        return []
    with evaluating(method):
        features = context.scan(method.embed, test.select(chosen))
    if not features.isfinite().all():
        return []
    places = lay_out(features, seed).split([len(index) for index in drawn])
    points = {
        name: place.double().round(decimals=2).tolist()
        for name, place in zip(groups, places, strict=True)
        if len(place)
    }
    return [Record("scatter", TITLE, {"points": points})]


def lay_out(features: Tensor, seed: int) -> Tensor:
    """t-SNE of features in two dimensions, from their first two principal components.

    Args:
        features: [N, D], of any floating dtype, N > 1.
        seed: Of scikit-learn's generator; the same bits for the same seed on one machine.

    Returns:
        float32 [N, 2], on the CPU.
    """
    from sklearn.manifold import TSNE

    rows = features.detach().double().cpu().numpy()
    perplexity = min(_PERPLEXITY, (len(rows) - 1) / 3)
    init = "pca" if min(rows.shape) > 1 and rows.std() > 0 else "random"
    tsne = TSNE(2, perplexity=perplexity, init=init, random_state=seed)
    return torch.from_numpy(tsne.fit_transform(rows)).float()


def _draw(index: Tensor, generator: torch.Generator) -> Tensor:
    """At most `MOST` of some positions, ascending."""
    return index[torch.randperm(len(index), generator=generator)[:MOST]].sort().values
