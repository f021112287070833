from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from fastcil.errors import FastcilError
from fastcil.nn import linearize, resnet18, resnet20
from fastcil.nn.tracing import Traced


class Calling(nn.Module):
    """A network whose forward is a function of itself and x."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.function(self, x)


class Asking(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class TwoInputs(nn.Module):
    def forward(self, x, mask=None):
        return x


def randomised(network):
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.3, 2)
            if part.affine:
                nn.init.normal_(part.weight)
                nn.init.normal_(part.bias)
    return network.double().eval()


@pytest.mark.parametrize(
    ("build", "shape", "norms", "left"),
    [
        (lambda: resnet18(width=2), (2, 3, 32, 32), 20, 0),
        (lambda: resnet20(width=2), (2, 3, 16, 16), 19, 0),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), (5, 3), 1, 0),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4)), (5, 3, 2, 2), 1, 0),
        (
            lambda: nn.Sequential(
                nn.Conv2d(3, 4, 1),
                nn.Dropout(),
                nn.BatchNorm2d(4),
                nn.BatchNorm2d(4, affine=False),
                nn.ReLU(),
                nn.BatchNorm2d(4),
            ),
            (2, 3, 4, 4),
            3,
            1,
        ),
    ],
    ids=["resnet18", "resnet20", "linear", "synchronised", "several"],
)
def test_folding_is_the_batch_norm_in_evaluation(build, shape, norms, left):
    torch.manual_seed(0)
    network = randomised(build())
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
    assert sum(isinstance(part, kinds) for part in network.modules()) == norms
    traced = Traced(network)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert sum(isinstance(traced.modules[path], kinds) for path in calls) == left
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(linearize(network)(x), network(x), rtol=1e-12, atol=1e-12)


def test_folded_weights():
    conv, norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)
    network = randomised(nn.Sequential(conv, norm))
    before = copy.deepcopy(network.state_dict())
    layer = linearize(network).get_submodule("0")
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(layer.base_weight, conv.weight * scale[:, None, None, None])
    torch.testing.assert_close(layer.base_bias, scale * (conv.bias - norm.running_mean) + norm.bias)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_norm_of_one_branch_alone_is_not_folded():
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y

    network = randomised(Calling(forward, conv=nn.Conv2d(3, 3, 1), norm=nn.BatchNorm2d(3)))
    linearized = linearize(network)
    assert not Traced(network).folded
    assert {"norm.scale", "norm.shift"} <= set(linearized.state_dict())
    torch.testing.assert_close(linearized.get_submodule("conv").base_weight, network.conv.weight)


def test_a_norm_folded_into_a_linear_layer_needs_flat_inputs():
    linearized = linearize(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    with pytest.raises(FastcilError, match=r"x has shape \(2, 4, 3\)"):
        linearized(torch.zeros(2, 4, 3))
    assert linearize(nn.Sequential(nn.Linear(3, 4)))(torch.zeros(2, 4, 3)).shape == (2, 4, 4)


def reads_overwritten(self, x):
    y = self.conv(x)
    return self.relu(y) + y


def adds_over(self, x):
    y = z = self.conv(x)
    y += x
    return y + z


def overwrites_a_view(self, x):
    y = self.conv(x)
    return y.flatten(1).relu_() + y.flatten(1)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (reads_overwritten, "'relu' overwrites in place what module's forward reads afterwards"),
        (adds_over, "module's forward overwrites in place"),
        (overwrites_a_view, "module's forward overwrites in place"),
    ],
)
def test_overwriting_what_is_read_afterwards_is_refused(function, words):
    with pytest.raises(FastcilError, match=words):
        linearize(Calling(function, conv=nn.Conv2d(3, 3, 1), relu=nn.ReLU(inplace=True)))


def overwrites_last(self, x):
    y = self.conv(x)
    z = y + x
    y += z
    return self.relu(self.relu(y))


def reads_the_result(self, x):
    y = self.relu(self.conv(x))
    return self.relu(y.flatten(1)) + 1


@pytest.mark.parametrize("function", [overwrites_last, reads_the_result])
def test_overwriting_what_nothing_reads_afterwards(function):
    network = Calling(function, conv=nn.Conv2d(3, 3, 1), relu=nn.ReLU(inplace=True))
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(linearize(network)(x), network(x))


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (
            nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.GELU())),
            "'1.0' is GELU.*no rule; .*ReLU",
        ),
        (nn.Sequential(nn.Conv1d(2, 2, 1)), "'0' is Conv1d"),
        (nn.Sequential(nn.LeakyReLU(-0.1)), "'0' is LeakyReLU.*negative_slope=-0.1"),
        (nn.Sequential(nn.MaxPool2d(2, return_indices=True)), "'0' is MaxPool2d"),
        (
            nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False)),
            "'0' is BatchNorm2d.*track_running_stats=False",
        ),
        (nn.Sequential(nn.Sequential(Asking())), r"'0.0' cannot be traced .*conditions"),
        (TwoInputs(), "takes 'mask' too; it must take one tensor"),
        (nn.Linear(2, 2), "reads its tensor 'weight' outside of a layer"),
        (Calling(lambda self, x: (x, x)), "gives no tensor"),
        (Calling(lambda self, x: x.shape[0]), "gives no tensor"),
        (Calling(lambda self, x: {"x": x}), "gives no tensor"),
        (Calling(lambda self, x: torch.sigmoid(x)), "module's forward calls sigmoid"),
        (nn.Sequential(Calling(lambda self, x: x.exp())), "'0' calls exp"),
        (Calling(lambda self, x: x * x.mean()), "calls mul"),
        (Calling(lambda self, x: x * x), "calls mul"),
        (Calling(lambda self, x: 1 / x), "calls truediv"),
        (Calling(lambda self, x: x[x]), "calls getitem"),
        (Calling(lambda self, x: functional.dropout(x)), "calls dropout"),
        (Calling(lambda self, x: functional.leaky_relu(x, -1.0)), "calls leaky_relu"),
        (
            Calling(lambda self, x: functional.max_pool2d(x, 2, return_indices=True)[0]),
            "calls max_",
        ),
        (Calling(lambda self, x: x.div(2, rounding_mode="floor")), "calls div"),
        (nn.Sequential(nn.ReLU(), nn.Flatten()), "Sequential has no nn.Conv2d or nn.Linear"),
    ],
)
def test_what_there_is_no_rule_for(network, words):
    with pytest.raises(FastcilError, match=words) as caught:
        linearize(network)
    assert str(caught.value).count(".\n") == 0 and str(caught.value).endswith(".")
