"""Exact global attention for convolutional networks, in memory linear in the number of positions.

Functions: :func:`disentangled_attention`, :func:`pairwise_attention`, :func:`unary_attention`, :func:`whiten`,
:func:`mean_subtract`, :func:`pairwise_softmax`, :func:`unary_softmax`, and without a softmax
:func:`dot_product_attention`, :func:`concatenation_attention`, :func:`shared_key_logits`; the same names in plain
PyTorch under :mod:`dnl_ext.reference`. Blocks: see :mod:`dnl_ext.modules`. Programs without Python or without this
library: see :mod:`dnl_ext.export`.
"""

from typing import Any

import torch.distributed
import torch.fx

from . import _load as _load  # first: the operators, before anything that calls them
from . import export, ops, reference
from ._version import __version__ as __version__
from .config import show_config
from .modules import (
    DisentangledMultiheadAttention,
    DisentangledNonLocal1d,
    DisentangledNonLocal2d,
    DisentangledNonLocal3d,
    GlobalContext1d,
    GlobalContext2d,
    GlobalContext3d,
    NonLocal1d,
    NonLocal2d,
    NonLocal3d,
    RelationModule,
    SimplifiedNonLocal1d,
    SimplifiedNonLocal2d,
    SimplifiedNonLocal3d,
)
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

__all__ = [
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
    "concatenation_attention",
    "disentangled_attention",
    "dot_product_attention",
    "export",
    "mean_subtract",
    "pairwise_attention",
    "pairwise_softmax",
    "reference",
    "shared_key_logits",
    "show_config",
    "unary_attention",
    "unary_softmax",
    "whiten",
]

if torch.distributed.is_available():  # it teaches functions and blocks what lies on several devices
    from . import distributed as distributed


def _path_of_call(*question: Any) -> tuple[str, bool]:
    """Asked by the operators at the first call of a shape on CUDA."""
    from .tuning import advise  # measures with the benchmark, which most programs never need

    return advise(*question)


_load._C.set_path_query(_path_of_call)

for _name in ops.__all__:  # as in ops: of the functions under the names that they have here too
    torch.fx.wrap(_name)
