"""Second-order curvature of a network's loss, and quadratic penalties over it."""

from fastcil.curvature.input_factor import ConvInputFactor as ConvInputFactor
