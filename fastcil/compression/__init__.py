"""The learned image codec: model, entropy coding, bitstream."""

from fastcil.compression.conditioning import LambdaEmbedding as LambdaEmbedding
from fastcil.compression.gaussian import SigmaTable as SigmaTable
from fastcil.compression.gma import MixtureConfig as MixtureConfig
from fastcil.compression.gma import MixtureHyperprior as MixtureHyperprior
from fastcil.compression.hierarchical import Hierarchical as Hierarchical
from fastcil.compression.hierarchical import HierarchicalConfig as HierarchicalConfig
from fastcil.compression.hyperprior import Hyperprior as Hyperprior
from fastcil.compression.hyperprior import HyperpriorConfig as HyperpriorConfig
from fastcil.compression.model import CodecModel as CodecModel
from fastcil.compression.model import entropy_hash as entropy_hash
from fastcil.compression.objective import rate_distortion as rate_distortion
from fastcil.compression.phases import Phases as Phases
from fastcil.compression.zoo import CODECS as CODECS
from fastcil.compression.zoo import build_codec as build_codec
from fastcil.compression.zoo import build_model as build_model
