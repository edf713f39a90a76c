"""Blocks (nn.Module) built on the functional API, on the channel-first tensors that convolutions produce."""

from ._inputs import AttentionInputs
from .disentangled import DisentangledNonLocal1d, DisentangledNonLocal2d, DisentangledNonLocal3d

__all__ = [
    "AttentionInputs",
    "DisentangledNonLocal1d",
    "DisentangledNonLocal2d",
    "DisentangledNonLocal3d",
]
