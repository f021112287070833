"""CUDA kernels in Triton, one file per op: what ``fastcil.ops`` runs when a tensor is on a GPU.

Only this folder imports triton, and nothing imports this folder before an op meets its first CUDA
tensor. A launcher has its op's signature and takes arguments that the op has checked.
"""
