"""Blocks (nn.Module) built on the functional API, on the channel-first tensors that convolutions produce."""

from .disentangled import DisentangledNonLocal1d, DisentangledNonLocal2d, DisentangledNonLocal3d

__all__ = [
    "DisentangledNonLocal1d",
    "DisentangledNonLocal2d",
    "DisentangledNonLocal3d",
]
