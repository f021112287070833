"""Settings that can't work are refused when they are made, not after the first task."""

from __future__ import annotations

import pytest

from fastcil.contract import Recipe
from fastcil.errors import FastcilError
from fastcil.methods.der import DER
from fastcil.methods.eeil import EEIL
from fastcil.methods.foster import Foster
from fastcil.methods.icarl import ICaRL
from fastcil.methods.podnet import PODNet
from fastcil.methods.wa import WA


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Foster.Config(temperature=0), "temperature is 0; it must be a positive"),
        (lambda: Foster.Config(temperature=-2.0), "temperature is -2.0"),
        (lambda: Foster.Config(beta1=7), "beta1 is 7; it must be between 0 and 1"),
        (lambda: Foster.Config(beta2=1.0), "beta2 is 1.0"),
        (lambda: Foster.Config(distillation_weight=-3), "distillation_weight is -3"),
        (lambda: Foster.Config(nominal_memory=-5), "nominal_memory is -5"),
        (lambda: DER.Config(temperature=0), "temperature is 0"),
        (lambda: DER.Config(aux_weight=-1), "aux_weight is -1"),
        (lambda: DER.Config(classifier=Recipe(epochs=0, lr=0.1)), "classifier.epochs is 0"),
        (lambda: DER.Config(sparsity=-1), "sparsity is -1"),
        (lambda: DER.Config(largest_scale=0), "largest_scale is 0"),
        (lambda: DER.Config(head="old"), "head is 'old'; it must be one of fresh, copied"),
        (lambda: EEIL.Config(temperature=0), "temperature is 0"),
        (lambda: EEIL.Config(distillation_weight=-1), "distillation_weight is -1"),
        (lambda: EEIL.Config(finetuning_teacher="new"), "finetuning_teacher is 'new'"),
        (lambda: WA.Config(temperature=0), "temperature is 0"),
        (lambda: WA.Config(scale="rows"), "scale is 'rows'; it must be one of weights, logits"),
        (lambda: ICaRL.Config(temperature=0), "temperature is 0"),
        (lambda: ICaRL.Config(outputs=-4), "outputs is -4"),
        (lambda: PODNet.Config(proxies=0), "proxies is 0; it must be a positive"),
        (lambda: PODNet.Config(spatial_weight=-1), "spatial_weight is -1"),
        (lambda: PODNet.Config(nca="paper"), "nca is 'paper'; it must be one of released, margin"),
    ],
)
def test_one_sentence_names_the_setting(make, says):
    with pytest.raises(FastcilError, match=says):
        make()
