"""Operators: one file per operator, with its autograd Function, fake implementation and vmap rule."""

import torch.fx

from . import flops as _registers_the_formulas  # noqa: F401
from . import part as part  # its operators' fake implementations
from . import plain_pairwise as _registers_plain_pytorch  # noqa: F401
from .linear import concatenation_attention, dot_product_attention, shared_key_logits
from .pairwise import disentangled_attention, pairwise_attention, pairwise_softmax
from .unary import unary_attention, unary_softmax
from .whiten import mean_subtract, whiten

__all__ = [
    "concatenation_attention",
    "disentangled_attention",
    "dot_product_attention",
    "mean_subtract",
    "pairwise_attention",
    "pairwise_softmax",
    "shared_key_logits",
    "unary_attention",
    "unary_softmax",
    "whiten",
]

for _name in __all__:  # one call each in a graph of torch.fx, checks included
    torch.fx.wrap(_name)
