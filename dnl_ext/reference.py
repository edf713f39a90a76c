"""Disentangled non-local attention in plain PyTorch: the definition of correct.

Every function here has the name and the signature of its fused counterpart in :mod:`dnl_ext` and builds the maps
that the fused one never stores. Read it as the definition, test against it, and use it where the extension cannot
be built. Equations follow Yin et al., "Disentangled Non-Local Neural Networks", ECCV 2020 (arXiv 2006.06668).

Shapes: query (..., Nq, Dqk), key (..., Nk, Dqk), value (..., Nk, Dv), mask_logits (..., Nk); ... is batch and heads.
"""

import math

import torch

__all__ = [
    "WHITEN_NAMES",
    "disentangled_attention",
    "mean_subtract",
    "pairwise_attention",
    "pairwise_softmax",
    "unary_attention",
    "unary_softmax",
]

#: Valid values of ``whiten``. ``"channel"`` is the paper's (equation 10); ``None`` is the standard non-local block.
WHITEN_NAMES = ("channel", None)


def mean_subtract(x, dim=-2):
    """``x - x.mean(dim)``: per-channel mean over positions, with positions on ``dim``."""
    return x - x.mean(dim, keepdim=True)


def pairwise_softmax(query, key, *, scale=None, whiten="channel"):
    """P_ij = softmax_j(scale * <q'_i, k'_j>), shape (..., Nq, Nk). Paper, equation 10 (first term)."""
    if whiten not in WHITEN_NAMES:
        raise ValueError(f"whiten: expected one of {WHITEN_NAMES}, got {whiten!r}")
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    if whiten == "channel":
        query, key = mean_subtract(query), mean_subtract(key)
    return torch.softmax((query * scale) @ key.transpose(-2, -1), dim=-1)


def unary_softmax(mask_logits):
    """u_j = softmax_j(m_j), shape (..., Nk). Paper, equation 10 (second term)."""
    return torch.softmax(mask_logits, dim=-1)


def pairwise_attention(query, key, value, *, scale=None, whiten="channel"):
    """y_i = sum_j P_ij v_j, shape (..., Nq, Dv)."""
    return pairwise_softmax(query, key, scale=scale, whiten=whiten) @ value


def unary_attention(mask_logits, value):
    """sum_j u_j v_j, one vector for all queries, shape (..., Dv)."""
    return (unary_softmax(mask_logits).unsqueeze(-2) @ value).squeeze(-2)


def disentangled_attention(query, key, value, mask_logits=None, *, scale=None, whiten="channel"):
    """y_i = sum_j (P_ij + u_j) v_j, shape (..., Nq, Dv). Paper, equation 10; pairwise alone without ``mask_logits``."""
    output = pairwise_attention(query, key, value, scale=scale, whiten=whiten)
    if mask_logits is not None:
        output = output + unary_attention(mask_logits, value).unsqueeze(-2)
    return output
