"""Operators: one file per operator, with its autograd Function, fake implementation and vmap rule."""

from .pairwise import disentangled_attention, pairwise_attention, pairwise_softmax
from .unary import unary_attention, unary_softmax
from .whiten import mean_subtract

__all__ = [
    "disentangled_attention",
    "mean_subtract",
    "pairwise_attention",
    "pairwise_softmax",
    "unary_attention",
    "unary_softmax",
]
