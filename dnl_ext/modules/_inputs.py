"""What a block's attention receives: the one thing that :mod:`dnl_ext.analysis` asks of a block."""

from typing import NamedTuple

import torch

from ..types import Whitening


class AttentionInputs(NamedTuple):
    """Inputs of :func:`dnl_ext.disentangled_attention` as a block computes them from its own input.

    Any module whose ``attention_inputs(x)`` returns this can be analysed; ... is batch, or batch and heads.

    Attributes:
        query: tensor (..., Nq, Dqk), before whitening; None for a block without a pairwise term.
        key: tensor (..., Nk, Dqk), before whitening; None with ``query``.
        value: tensor (..., Nk, Dv).
        mask_logits: tensor (..., Nk), the unary term's logits; None without one.
        scale: factor of the pairwise logits.
        whiten: name of the whitening of query and key, as the functions take it.
        gain: factor of the pairwise term in the sum of the two (a learned gamma), a tensor of one element or a float.
        query_shape: spatial shape of the Nq queries.
        key_shape: spatial shape of the Nk keys, smaller where the block sub-samples.
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
