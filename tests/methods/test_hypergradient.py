"""CIM's mask-level gradient through methods that have a teacher: its targets depend on phi too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastcil.addons.cim import CIM
from fastcil.contract import evaluating
from fastcil.methods.der import DER
from fastcil.methods.foster import Foster
from fastcil.methods.icarl import ICaRL
from fastcil.methods.podnet import PODNet

CASES = {
    "foster": (Foster, Foster.Config()),
    "icarl sigmoid": (ICaRL, ICaRL.Config()),
    "icarl softmax": (ICaRL, ICaRL.PRESETS["pycil"]),
    "podnet": (PODNet, PODNet.Config()),
    "podnet margin": (PODNet, PODNet.Config(nca="margin")),
    "der": (DER, DER.Config()),
}


def shake(parameters, size):
    """Away from where training starts, so that teacher and student differ."""
    for parameter in parameters:
        parameter.data += size * torch.randn_like(parameter)


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_the_outer_loss_s_gradient_is_its_finite_difference(lab, in_float64, name):
    torch.manual_seed(0)
    kind, config = CASES[name]
    context = lab.context
    method = kind(config, context)
    settings = CIM.Config(inner_lr=0.5, mu=0.0, mu_prime=0.0, compress_all=True)
    addon = CIM(settings, context, method)
    first, second = lab.make_tasks((3, 2))
    method.begin_task(first)
    addon.begin_task(first)
    shake(method.parameters(), 0.3)
    for part in (method, addon):
        part.end_task(first)
    method.release()
    for part in (method, addon):
        part.begin_task(second)
    shake([p for p in method.parameters() if p.requires_grad], 0.1)
    shake(addon.phi.parameters(), 0.1)
    stage = addon.stages(second, method.double().stages(second))[0]
    (mask,) = stage.companions
    addon.double()
    phi = list(mask.parameters())
    method.train().requires_grad_(False)
    for parameter in phi:
        parameter.requires_grad_(True)
    batches = [
        lab.batch_of(stream, torch.linspace(0, len(stream) - 1, 8).long())
        for stream in mask.streams
    ]
    inner, outer = (replace(batch, images=batch.images.double()) for batch in batches)
    assert set(inner.part.tolist()) == {0, 1}

    def outer_loss():
        with evaluating(method):
            return mask._outer_losses(inner, outer, 1.0)["outer"]

    found = torch.cat([g.flatten() for g in torch.autograd.grad(outer_loss(), phi)])
    expected = []
    for parameter in phi:
        flat = parameter.data.view(-1)
        for k, value in enumerate(flat.tolist()):
            ends = []
            for step in (1e-5, -1e-5):
                flat[k] = value + step
                ends.append(float(outer_loss().detach()))
            flat[k] = value
            expected.append((ends[0] - ends[1]) / 2e-5)
    error = (found - torch.tensor(expected)).norm() / torch.tensor(expected).norm()
    assert error < 1e-5
