"""Second-order curvature of a network's loss, and quadratic penalties over it."""

from fastcil.curvature.curvature import Curvature as Curvature
from fastcil.curvature.curvature import Penalty as Penalty
from fastcil.curvature.diagonal import DiagonalFisher as DiagonalFisher
from fastcil.curvature.diagonal import MemoryAwareSynapses as MemoryAwareSynapses
from fastcil.curvature.eigen import EigenCorrection as EigenCorrection
from fastcil.curvature.eigen import eigenbasis as eigenbasis
from fastcil.curvature.forms import CurvatureKind as CurvatureKind
from fastcil.curvature.forms import make_curvature as make_curvature
from fastcil.curvature.input_factor import ConvInputFactor as ConvInputFactor
from fastcil.curvature.kronecker import Factors as Factors
from fastcil.curvature.kronecker import KroneckerFactors as KroneckerFactors
from fastcil.curvature.outputs import output_vectors as output_vectors
from fastcil.curvature.penalty import half_quadratic as half_quadratic
from fastcil.curvature.spectrum import largest_eigenvalue as largest_eigenvalue
