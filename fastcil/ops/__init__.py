"""Fused operations: for each a schema, a PyTorch reference, and C++ or Triton kernels beside it."""

from fastcil.ops._library import extension_available as extension_available
from fastcil.ops.cam import cam as cam
from fastcil.ops.cam_boxes import cam_boxes as cam_boxes
from fastcil.ops.herding import herding as herding
from fastcil.ops.pack import grids as grids
from fastcil.ops.pack import pack as pack
from fastcil.ops.pack import packed_nbytes as packed_nbytes
from fastcil.ops.pade import pade as pade
from fastcil.ops.patch_gram import patch_gram_ as patch_gram_
from fastcil.ops.pixel_program import PixelProgram as PixelProgram
from fastcil.ops.read import read as read
from fastcil.ops.read_batch import normalise as normalise
from fastcil.ops.read_batch import read_batch as read_batch
from fastcil.ops.reconstruct import reconstruct as reconstruct
from fastcil.ops.salient_masks import salient_masks as salient_masks
from fastcil.ops.soft_compose import soft_compose as soft_compose
from fastcil.ops.spectral_gram import spectral_gram_ as spectral_gram_
from fastcil.ops.transfer import send as send
