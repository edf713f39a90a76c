"""What a block's attention receives: the one thing that :mod:`dnl_ext.analysis` asks of a block."""

from typing import NamedTuple

import torch

from ..types import Whitening


class AttentionInputs(NamedTuple):
    """What a block's attention receives: arguments of :func:`dnl_ext.disentangled_attention`, and shapes to draw them.

    Every block with attention weights has a method ``attention_inputs(x)`` that returns this for an input ``x`` of the
    block. :mod:`dnl_ext.analysis` asks nothing else of a block, so any module with such a method can be analysed. In
    the shapes below "..." is batch, or batch and heads.

    Attributes:
        query: tensor (..., Nq, Dqk), before whitening; None for a block without a pairwise term.
        key: tensor (..., Nk, Dqk), before whitening; None with ``query``.
        value: tensor (..., Nk, Dv).
        mask_logits: tensor (..., Nk), the logits of the unary term; None without one.
        scale: factor of the pairwise logits.
        whiten: name of the whitening of query and key, as :func:`dnl_ext.whiten` takes it, or None.
        gain: factor of the pairwise term in the sum of the two (a learned gamma), a tensor of one element or a float.
        query_shape: spatial shape of the Nq queries.
        key_shape: spatial shape of the Nk keys, smaller where the block sub-samples.
        whitened: whether layers of the block have whitened query and key already; ``whiten`` is None then.

    Example:
        >>> import torch
        >>> from dnl_ext import NonLocal2d
        >>> inputs = NonLocal2d(8).attention_inputs(torch.randn(1, 8, 5, 6))
        >>> inputs.query.shape, inputs.mask_logits, inputs.query_shape
        (torch.Size([1, 30, 4]), None, (5, 6))
    """

    query: torch.Tensor | None
    key: torch.Tensor | None
    value: torch.Tensor
    mask_logits: torch.Tensor | None
    scale: float
    whiten: Whitening | None
    gain: torch.Tensor | float
    query_shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    whitened: bool = False
