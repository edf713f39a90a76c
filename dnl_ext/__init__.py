"""Exact global attention for convolutional networks, in memory linear in the number of positions.

Functions: :func:`disentangled_attention`, :func:`pairwise_attention`, :func:`unary_attention`, :func:`mean_subtract`,
:func:`pairwise_softmax`, :func:`unary_softmax`; the same names in plain PyTorch under :mod:`dnl_ext.reference`.
"""

from . import _load as _load  # first: the compiled operators, before anything that calls them
from . import reference
from .config import show_config
from .modules import DisentangledNonLocal1d, DisentangledNonLocal2d, DisentangledNonLocal3d
from .ops import (
    concatenation_attention,
    disentangled_attention,
    dot_product_attention,
    mean_subtract,
    pairwise_attention,
    pairwise_softmax,
    shared_key_logits,
    unary_attention,
    unary_softmax,
    whiten,
)

__version__ = "0.1.0"

__all__ = [
    "DisentangledNonLocal1d",
    "DisentangledNonLocal2d",
    "DisentangledNonLocal3d",
    "disentangled_attention",
    "mean_subtract",
    "pairwise_attention",
    "pairwise_softmax",
    "reference",
    "show_config",
    "unary_attention",
    "unary_softmax",
]
