"""Blocks (nn.Module) built on the functional API, on the channel-first tensors that convolutions produce."""

from ._inputs import AttentionInputs
from .context import (
    GlobalContext1d,
    GlobalContext2d,
    GlobalContext3d,
    SimplifiedNonLocal1d,
    SimplifiedNonLocal2d,
    SimplifiedNonLocal3d,
)
from .disentangled import DisentangledNonLocal1d, DisentangledNonLocal2d, DisentangledNonLocal3d
from .multihead import DisentangledMultiheadAttention
from .non_local import NonLocal1d, NonLocal2d, NonLocal3d
from .relation import RelationModule

__all__ = [
    "AttentionInputs",
    "DisentangledMultiheadAttention",
    "DisentangledNonLocal1d",
    "DisentangledNonLocal2d",
    "DisentangledNonLocal3d",
    "GlobalContext1d",
    "GlobalContext2d",
    "GlobalContext3d",
    "NonLocal1d",
    "NonLocal2d",
    "NonLocal3d",
    "RelationModule",
    "SimplifiedNonLocal1d",
    "SimplifiedNonLocal2d",
    "SimplifiedNonLocal3d",
]
