"""Batch norms folded into their convolutions, and where they are not."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fastcil.data import Augmentation, Examples, ImageStore
from fastcil.engine.context import EngineContext
from fastcil.nn import resnet18, resnet32
from fastcil.nn.folding import conv_norm, folding

NETWORKS = {
    "option A": lambda: resnet32(width=4),
    "option B": lambda: resnet18(width=4, stem="cifar"),
    "imagenet stem": lambda: resnet18(width=4, stem="imagenet"),
}


def settled(network: nn.Module) -> nn.Module:
    """The network in float64 and evaluation, with norms that do something."""
    generator = torch.Generator().manual_seed(1)
    for norm in (part for part in network.modules() if isinstance(part, nn.BatchNorm2d)):
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.data.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return network.double().eval()


def calls(network: nn.Module) -> list[nn.Module]:
    """Which batch norms a forward pass calls, by the function they end in."""
    found = []
    original = nn.BatchNorm2d.forward

    def forward(self, x):
        found.append(self)
        return original(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.BatchNorm2d, "forward", forward)
        network(torch.rand(2, 3, 16, 16, dtype=torch.float64))
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_folded_it_is_the_same_network(name):
    network = settled(NETWORKS[name]())
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        expected = network(images)
        with folding():
            found = network(images)
            assert calls(network) == []
        assert torch.equal(network(images), expected)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert not torch.equal(found, expected)


def double_weight(network):
    network.stem[1].weight.mul_(2)


def shift_statistics(network):
    network.stem[1].running_mean.add_(0.1)


def exchange_convolution(network):
    network.stem[0].weight = nn.Parameter(network.stem[0].weight + 0.1)


@pytest.mark.parametrize("change", [double_weight, shift_statistics, exchange_convolution])
def test_what_changes_meanwhile_counts(change):
    network = settled(resnet18(width=4, stem="cifar"))
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        with folding():
            before = network(images)
            change(network)
            found = network(images)
            assert calls(network) == []
        expected = network(images)
    assert not torch.allclose(before, expected)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_other_parameters_of_a_functional_call_count():
    network = settled(resnet18(width=4, stem="cifar"))
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    others = {name: value + 0.1 for name, value in network.named_parameters()}
    with torch.no_grad():
        expected = functional_call(network, others, (images,))
        with folding():
            network(images)
            found = functional_call(network, others, (images,))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_inference_tensors_are_left():
    with torch.inference_mode():
        network = settled(resnet18(width=4, stem="cifar"))
        with folding():
            assert len(calls(network)) == 20


def test_slices_are_parts():
    network = settled(resnet18(width=4, stem="cifar"))
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    assert torch.equal(network.stem[:1](images), network.stem[0](images))
    assert torch.equal(network.stem[:2](images), network.stem[1](network.stem[0](images)))


def test_scans_fold():
    network = settled(resnet18(width=4, stem="cifar")).float()
    context = EngineContext(lambda: network, Augmentation.cifar(), torch.device("cpu"), 2)
    pixels = torch.randint(256, (5, 32, 32, 3), dtype=torch.uint8)
    examples = Examples(ImageStore.from_batch(pixels), torch.zeros(5, dtype=torch.long))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.BatchNorm2d, "forward", lambda *_: pytest.fail("a norm of its own"))
        scanned = context.scan(lambda images: seen.append(images) or network(images), examples)
    with torch.no_grad():
        torch.testing.assert_close(scanned, network(torch.cat(seen)), rtol=1e-4, atol=1e-4)


def hooked(network):
    network.stem[0].register_forward_hook(lambda *_: None)
    return network.stem[1]


def trained(network):
    return network.stem[1].train()


def replaced(network):
    class Convolution(nn.Conv2d):
        pass

    like = Convolution(3, 4, 3, 1, 1, bias=False).double()
    network.stem[0] = like
    return network.stem[1]


def without_statistics(network):
    network.stem[1] = nn.BatchNorm2d(4, track_running_stats=False).double().eval()
    return network.stem[1]


@pytest.mark.parametrize("change", [hooked, trained, replaced, without_statistics])
def test_one_of_which_something_could_tell_is_left(change):
    network = settled(resnet18(width=4, stem="cifar"))
    norm = change(network)
    with torch.no_grad(), folding():
        assert calls(network) == [norm]


def test_with_gradients_nothing_is_folded():
    network = settled(resnet18(width=4, stem="cifar"))
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    with folding():
        assert set(calls(network)) == set(norms)
        with torch.no_grad():
            assert calls(network) == []


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_other_padding_is_left(mode):
    conv, norm = nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode), nn.BatchNorm2d(4).eval()
    images = torch.rand(2, 3, 8, 8)
    with torch.no_grad(), folding():
        assert torch.equal(conv_norm(conv, norm, images), norm(conv(images)))
