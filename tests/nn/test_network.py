from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from fastcil.nn import LinearHead, Network, build_module, resnet20
from fastcil.nn.resnet import ResNet

IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Extractor(nn.Module):
    """A small extractor of a user's own, without levels."""

    def __init__(self, out_channels=6):
        super().__init__()
        self.out_channels = out_channels
        self.layers = nn.Sequential(
            nn.Conv2d(3, out_channels, 3), nn.BatchNorm2d(out_channels), nn.ReLU()
        )

    def forward(self, images):
        return self.layers(images)


def network(*channels, classes=5):
    channels = channels or (6,)
    return Network([Extractor(c) for c in channels], LinearHead(sum(channels), classes))


@pytest.mark.parametrize("channels", [(6,), (6, 4, 3)], ids=str)
def test_parts_fit_together(channels):
    net = network(*channels).eval()
    maps = net.maps(IMAGES)
    torch.testing.assert_close(maps, torch.cat([e(IMAGES) for e in net.extractors], 1))
    assert maps.shape == (4, sum(channels), 10, 10) and net.out_channels == sum(channels)
    features = net.features(IMAGES)
    torch.testing.assert_close(features, maps.mean((2, 3)))
    torch.testing.assert_close(net(IMAGES), net.head(features))
    labels = torch.tensor([1, 1, 4, 0])
    assert torch.equal(net.cam_weights(labels), net.head.weight[labels])
    # The CAM averages to the logit without its bias.
    cams = (maps * net.cam_weights(labels)[:, :, None, None]).sum(1).mean((1, 2))
    torch.testing.assert_close(cams + net.head.bias[labels], net(IMAGES)[range(4), labels])


def test_levels_are_those_of_the_last_extractor():
    net = Network([Extractor(2), resnet20(width=4)], LinearHead(18, 3)).eval()
    for ours, theirs in zip(net.levels(IMAGES), net.extractors[1].levels(IMAGES), strict=True):
        assert torch.equal(ours, theirs)


def test_freezing():
    net = network(6, 4).train()
    net.freeze(0)
    frozen, free = net.extractors
    for mode in (True, False, True):
        net.train(mode)
        assert not any(part.training for part in frozen.modules())
        assert all(part.training == mode for part in free.modules())
        assert net.training == net.head.training == mode
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in [*free.parameters(), *net.head.parameters()])
    before = copy.deepcopy(frozen.state_dict())
    net(IMAGES).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())
    assert all(p.grad is not None for p in free.parameters())

    assert copy.deepcopy(net).train().frozen == (0,)
    net.freeze(-1)
    assert net.frozen == (0, 1)
    net.thaw(0)
    assert net.frozen == (1,)
    assert all(part.training for part in frozen.modules())
    assert all(p.requires_grad for p in frozen.parameters())
    net.freeze()
    assert net.frozen == (1,)


def test_thawing_follows_the_mode_of_the_network():
    net = network()
    net.freeze(0)
    net.eval()
    net.thaw(0)
    assert not net.extractors[0].training


def test_growing():
    net = network(6)
    net.eval()
    old = net(IMAGES)
    net.extractors.append(Extractor(4).eval())
    net.head.grow(7, net.out_channels)
    assert net(IMAGES).shape == (4, 7)
    with torch.no_grad():
        net.head.weight[:, 6:] = 0
    torch.testing.assert_close(net(IMAGES)[:, :5], old)


def test_structure():
    net = network(6, 6, 6)
    net.freeze(0, 1)
    structure = json.loads(json.dumps(net.structure()))
    again = build_module(structure, Extractor)
    assert isinstance(again, Network)
    assert again.structure() == structure
    assert not again.extractors[1].training and again.extractors[2].training
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.eval()(IMAGES), net.eval()(IMAGES))
    head = build_module(net.head.structure(), Extractor)
    assert isinstance(head, LinearHead) and head.weight.shape == (5, 18)


def test_a_rebuilt_head_lies_where_its_extractors_do():
    def make():
        with torch.device("meta"):
            return Extractor()

    again = Network.build(network().structure(), make)
    assert again.head.weight.device.type == "meta"


def test_functional_call():
    net = network(6, 4).eval()
    parameters = {name: p + 0.1 for name, p in net.named_parameters()}
    found = torch.func.functional_call(net, parameters, (IMAGES,))
    moved = copy.deepcopy(net)
    with torch.no_grad():
        for p in moved.parameters():
            p += 0.1
    torch.testing.assert_close(found, moved(IMAGES))


def test_compile_autocast_and_export():
    net = Network([ResNet((1, 1), 2, "cifar"), ResNet((1,), 4, "small")], LinearHead(8, 3)).eval()
    logits = net(IMAGES)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IMAGES), logits)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = net(IMAGES)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), logits, rtol=0.1, atol=0.05)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (IMAGES,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(IMAGES[:3]), net(IMAGES[:3]))


class Nameless(nn.Module):
    def forward(self, images):
        return images


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: Network([], LinearHead(3, 2)), "extractors is empty"),
        (lambda: Network([Nameless()], LinearHead(3, 2)), "extractor Nameless has no out_channels"),
        (lambda: Network([Extractor()], LinearHead(3, 2)), "head reads 3 features.*give 6"),
        (lambda: network().freeze(1), "extractor 1 does not exist; there are 1"),
        (lambda: network().thaw(-2), "extractor -2 does not exist"),
        (lambda: network().levels(IMAGES), "extractor Extractor has no levels"),
        (lambda: build_module({"kind": "netwrk"}, Extractor), "head kind is 'netwrk'"),
    ],
)
def test_bad_arguments(action, message):
    with pytest.raises(ValueError, match=message):
        action()
