"""Network parts: backbones, heads, learnable activations, and losses that methods share."""

from fastcil.nn.backbones import BACKBONES as BACKBONES
from fastcil.nn.backbones import build_backbone as build_backbone
from fastcil.nn.backbones import stem_for as stem_for
from fastcil.nn.heads import HEADS as HEADS
from fastcil.nn.heads import LinearHead as LinearHead
from fastcil.nn.heads import build_head as build_head
from fastcil.nn.linearize import Linearized as Linearized
from fastcil.nn.linearize import leaky as leaky
from fastcil.nn.linearize import linearize as linearize
from fastcil.nn.losses import alignment_weights as alignment_weights
from fastcil.nn.losses import balanced_distillation as balanced_distillation
from fastcil.nn.losses import distillation as distillation
from fastcil.nn.network import Network as Network
from fastcil.nn.network import build_module as build_module
from fastcil.nn.pade import Pade as Pade
from fastcil.nn.rational import RationalFit as RationalFit
from fastcil.nn.rational import fit_rational as fit_rational
from fastcil.nn.replace import Replaced as Replaced
from fastcil.nn.replace import replace_activations as replace_activations
from fastcil.nn.replace import share_with_pade as share_with_pade
from fastcil.nn.resnet import resnet18 as resnet18
from fastcil.nn.resnet import resnet20 as resnet20
from fastcil.nn.resnet import resnet32 as resnet32
from fastcil.nn.tangent import TangentConv2d as TangentConv2d
from fastcil.nn.tangent import TangentLinear as TangentLinear
from fastcil.nn.tensors import Tensors as Tensors
