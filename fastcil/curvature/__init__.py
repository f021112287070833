"""Second-order curvature of a network's loss, and quadratic penalties over it."""

from fastcil.curvature.input_factor import ConvInputFactor as ConvInputFactor
from fastcil.curvature.kronecker import Factors as Factors
from fastcil.curvature.kronecker import KroneckerFactors as KroneckerFactors
from fastcil.curvature.outputs import output_vectors as output_vectors
from fastcil.curvature.penalty import half_quadratic as half_quadratic
