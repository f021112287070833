"""Two branches of one extractor against a loop over their modules, and what is made of both."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from fastcil.nn import (
    AggregatedBackbone,
    LinearHead,
    Network,
    build_module,
    linearize,
    resnet18,
    resnet20,
    share_with_pade,
)
from fastcil.nn.aggregation import aggregate
from fastcil.nn.extractor_kinds import build_extractor, extractor_structure
from fastcil.nn.lifecycle import frozen_copy
from fastcil.nn.scaling import ScaledConv2d, has_scales, scale_convolutions

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
BUILDERS = {
    "resnet20": lambda: resnet20(width=2),
    "resnet18": lambda: resnet18(width=2, stem="imagenet", last_relu=False),
}


def two(name="resnet20"):
    """Branches that differ, scales and statistics included."""
    torch.manual_seed(1)
    made = AggregatedBackbone(BUILDERS[name](), BUILDERS[name]())
    with torch.no_grad():
        for part in made.modules():
            if isinstance(part, ScaledConv2d):
                part.scale.uniform_(0.5, 1.5)
    made.train()(IMAGES)
    return made.double().eval()


@pytest.mark.parametrize("name", BUILDERS)
def test_levels_are_the_hand_written_loop(name):
    made = two(name)
    weights = [0.3, -0.2, 1.4, 0.75][: len(made.alphas)]
    with torch.no_grad():
        made.alphas.copy_(torch.tensor(weights, dtype=torch.float64))
    x = y = IMAGES.double()
    for part in made.stable.stem:
        x = part(x)
    for part in made.plastic.stem:
        y = part(y)
    found = made.levels(IMAGES.double())
    assert len(found) == len(weights) == len(made.stable.stages)
    for k, weight in enumerate(weights):
        for block in made.stable.stages[k]:
            x = block(x)
        for block in made.plastic.stages[k]:
            y = block(y)
        x = y = weight * x + (1 - weight) * y
        torch.testing.assert_close(found[k], x, rtol=1e-12, atol=1e-12)
    assert torch.equal(made(IMAGES.double()), found[-1])
    assert found[-1].shape[1] == made.out_channels


@pytest.mark.parametrize(("alpha", "branch"), [(1.0, "stable"), (0.0, "plastic")])
def test_at_its_ends_one_branch_is_left(alpha, branch):
    made = two()
    with torch.no_grad():
        made.alphas.fill_(alpha)
    levels = getattr(made, branch).levels(IMAGES.double())
    for found, expected in zip(made.levels(IMAGES.double()), levels, strict=True):
        assert torch.equal(found, expected)


def test_both_branches_start_as_the_extractor():
    torch.manual_seed(0)
    extractor = resnet20(width=2).double()
    extractor(IMAGES.double())
    extractor.requires_grad_(False).eval()
    before = {name: value.clone() for name, value in extractor.state_dict().items()}
    state = torch.get_rng_state()
    made = aggregate(extractor)
    assert torch.equal(torch.get_rng_state(), state)
    assert not made.training and not any(p.requires_grad for p in extractor.parameters())
    torch.testing.assert_close(made(IMAGES.double()), extractor(IMAGES.double()))
    assert made.alphas.tolist() == [0.5] * 3 and made.alphas.dtype == torch.float64
    assert has_scales(made.stable) and not has_scales(made.plastic) and not has_scales(extractor)
    trained = dict(made.named_parameters())
    assert all(p.requires_grad for p in trained.values())
    convolutions = {name for name, value in before.items() if value.ndim == 4}
    assert trained.keys() == {"alphas"} | {
        *(f"plastic.{name}" for name, _ in extractor.named_parameters()),
        *(f"stable.{name}" for name, _ in extractor.named_parameters() if name not in convolutions),
        *(f"stable.{name.removesuffix('weight')}scale" for name in convolutions),
    }
    with torch.no_grad():
        for value in made.state_dict().values():
            value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in extractor.state_dict().items())


def test_gradients_are_those_of_finite_differences():
    made = two()
    weights = torch.randn(3, made.out_channels, generator=torch.Generator().manual_seed(3)).double()

    def loss(alphas):
        maps = torch.func.functional_call(made, {"alphas": alphas}, (IMAGES.double(),))
        return (maps.mean((2, 3)).tanh() * weights).sum()

    alphas = torch.tensor([0.2, 0.9, 0.4], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (alphas,))
    assert torch.autograd.gradgradcheck(loss, (alphas,))


def network_and_teacher():
    """A network of two branches, and a frozen copy of it."""
    network = Network([two().float()], LinearHead(8, 3))
    return network, frozen_copy(network)


@pytest.mark.parametrize("which", [0, 1], ids=["network", "teacher"])
def test_a_network_is_made_again_from_its_structure(which):
    network = network_and_teacher()[which].train()
    structure = json.loads(json.dumps(network.structure()))
    again = build_module(structure, lambda: resnet20(width=2))
    assert again.structure() == structure
    assert again.state_dict().keys() == network.state_dict().keys()
    again.load_state_dict(network.state_dict())
    modes = [{name: part.training for name, part in n.named_modules()} for n in (network, again)]
    again.train()
    assert modes[0] == {name: part.training for name, part in again.named_modules()}
    assert torch.equal(again.eval()(IMAGES), network.eval()(IMAGES))


@pytest.mark.parametrize(
    ("make", "kind", "scaled"),
    [
        (lambda: resnet20(width=2), "backbone", False),
        (lambda: scale_convolutions(resnet20(width=2)), "scaled", False),
        (lambda: scale_convolutions(resnet20(width=2)), "scaled", True),
        (lambda: aggregate(resnet20(width=2)), "aggregated", False),
        (lambda: aggregate(resnet20(width=2)), "aggregated", True),
    ],
)
def test_kinds_of_extractors(make, kind, scaled):
    """Also where the builder scales what it makes, as a method with weight transfer may let it."""
    extractor = make()
    structure = extractor_structure(extractor)
    assert structure == {"kind": kind}

    def build():
        backbone = resnet20(width=2)
        return scale_convolutions(backbone) if scaled else backbone

    again = build_extractor(structure, build)
    again.load_state_dict(extractor.state_dict())
    assert {n for n, _ in again.named_parameters()} == {n for n, _ in extractor.named_parameters()}
    assert torch.equal(again.eval()(IMAGES), extractor.eval()(IMAGES))


def test_a_pade_branch_shares_everything():
    network = Network([two()], LinearHead(8, 3).double())
    branch = share_with_pade(network)
    shared = {id(t) for t in (*branch.parameters(), *branch.buffers())}
    assert {id(t) for t in (*network.parameters(), *network.buffers())} <= shared
    moved = copy.deepcopy(branch).eval()
    with torch.no_grad():
        network.extractors[0].alphas.fill_(1.0)
    network.eval(), branch.eval()
    found = branch.maps(IMAGES.double())
    assert not torch.allclose(found, moved.maps(IMAGES.double()))


def test_autocast():
    made = two().float()
    with torch.autocast("cpu", torch.bfloat16):
        levels = made.levels(IMAGES)
    assert levels[0].dtype == torch.bfloat16
    torch.testing.assert_close(levels[-1].float(), made(IMAGES), rtol=0.1, atol=0.05)


class Whole(nn.Module):
    """A backbone whose parts have other names."""

    out_channels = 3

    def __init__(self):
        super().__init__()
        self.layers = nn.Conv2d(3, 3, 1)


class Ending(nn.Module):
    """A backbone with more than a stem and stages."""

    out_channels = 3

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.stages = nn.ModuleList([nn.Conv2d(3, 3, 1)])
        self.ending = nn.BatchNorm2d(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: aggregate(Whole()),
            "branch Whole has no module stem with a ModuleList",
        ),
        (lambda: aggregate(linearize(resnet20(width=2))), "branch Linearized has no module"),
        (lambda: aggregate(Ending()), "branch Ending has ending.weight outside its stem"),
        (
            lambda: AggregatedBackbone(resnet20(width=2), resnet18(width=2)),
            "plastic has 4 stages and stable 3",
        ),
        (lambda: build_extractor({"kind": "scald"}, Whole), "kind is 'scald'.*'scaled'"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
