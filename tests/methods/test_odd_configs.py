"""Settings that can't work are refused when they are made, not after the first task."""

from __future__ import annotations

import pytest

from fastcil.contract import Recipe
from fastcil.errors import FastcilError
from fastcil.methods.der import DER
from fastcil.methods.foster import Foster
from fastcil.methods.icarl import ICaRL


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
        (lambda: ICaRL.Config(temperature=0), "temperature is 0"),
        (lambda: ICaRL.Config(outputs=-4), "outputs is -4"),
    ],
)
def test_one_sentence_names_the_setting(make, says):
    with pytest.raises(FastcilError, match=says):
        make()
