"""Disentangled non-local attention in plain PyTorch: the definition of correct.

Every function here has the name and the signature of its fused counterpart in :mod:`dnl_ext` and builds the maps
that the fused one never stores. Read it as the definition, test against it, and use it where the extension cannot
be built. Equations follow Yin et al., "Disentangled Non-Local Neural Networks", ECCV 2020 (arXiv 2006.06668).

Shapes: query (..., Nq, Dqk), key (..., Nk, Dqk), value (..., Nk, Dv), mask_logits (..., Nk); ... is batch and heads.
"""

import math
from typing import get_args

import torch
import torch.fx

from .types import Whitening

__all__ = [
    "WHITEN_NAMES",
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

#: Valid values of ``whiten``, see :func:`whiten`. ``"channel"`` is the paper's (equation 10); ``None`` is the standard
#: non-local block.
WHITEN_NAMES: tuple[Whitening | None, ...] = (*get_args(Whitening), None)


def check_whiten_name(name: object, argument: str = "whiten") -> None:
    """Raise unless `name` is one of WHITEN_NAMES."""
    if name is not None and not isinstance(name, str):
        raise TypeError(f"{argument}: expected a string or None, got {type(name).__name__}")
    if name not in WHITEN_NAMES:
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, WHITEN_NAMES))}, got {name!r}")


def mean_subtract(x: torch.Tensor, dim: int = -2) -> torch.Tensor:
    """``x - x.mean(dim)``: per-channel mean over positions, with positions on ``dim``."""
    return x - x.mean(dim, keepdim=True)


def whiten(x: torch.Tensor, name: Whitening | None = "channel", *, eps: float = 1e-5) -> torch.Tensor:
    """x (..., N, D) less a mean, and for ``in``, ``ln``, ``fln`` divided by sqrt(unbiased variance + eps).

    Mean and variance are over the positions N of a channel (``channel`` = ``in_nostd``, ``in``), the channels of a
    position (``spatial``), a sample's positions and channels (``ln_nostd``, ``ln``), or everything (``fln_nostd``,
    ``fln``). None returns x. Names and formulae of the paper's code.
    """
    check_whiten_name(name, "name")
    if name is None:
        return x
    dims = {"channel": -2, "in": -2, "spatial": -1, "ln": (-2, -1), "fln": tuple(range(x.dim()))}
    dims = dims["channel" if name == "in_nostd" else name.removesuffix("_nostd")]
    if name not in ("in", "ln", "fln"):
        return x - x.mean(dims, keepdim=True)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # as torch's norms: in float16 the gradient overflows
    centred = wide - wide.mean(dims, keepdim=True)
    return (centred / torch.sqrt(wide.var(dims, keepdim=True) + eps)).to(x.dtype)


def pairwise_softmax(
    query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None, whiten: Whitening | None = "channel"
) -> torch.Tensor:
    """P_ij = softmax_j(scale * <q'_i, k'_j>), shape (..., Nq, Nk). Paper, equation 10 (first term)."""
    check_whiten_name(whiten)
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    query, key = _whiten(query, whiten), _whiten(key, whiten)
    return torch.softmax((query * scale) @ key.transpose(-2, -1), dim=-1)


def unary_softmax(mask_logits: torch.Tensor) -> torch.Tensor:
    """u_j = softmax_j(m_j), shape (..., Nk). Paper, equation 10 (second term)."""
    return torch.softmax(mask_logits, dim=-1)


def pairwise_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    whiten: Whitening | None = "channel",
) -> torch.Tensor:
    """y_i = sum_j P_ij v_j, shape (..., Nq, Dv)."""
    return pairwise_softmax(query, key, scale=scale, whiten=whiten) @ value


def unary_attention(mask_logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """sum_j u_j v_j, one vector for all queries, shape (..., Dv)."""
    return (unary_softmax(mask_logits).unsqueeze(-2) @ value).squeeze(-2)


def disentangled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask_logits: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    whiten: Whitening | None = "channel",
) -> torch.Tensor:
    """y_i = sum_j (P_ij + u_j) v_j, shape (..., Nq, Dv). Paper, equation 10; pairwise alone without ``mask_logits``."""
    output = pairwise_attention(query, key, value, scale=scale, whiten=whiten)
    if mask_logits is not None:
        output = output + unary_attention(mask_logits, value).unsqueeze(-2)
    return output


def shared_key_logits(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """m_j = <mean_i q_i, k_j>, shape (..., Nk): the unary logits of a block whose two terms share their keys."""
    return (key @ query.mean(-2).unsqueeze(-1)).squeeze(-1)


def dot_product_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """y_i = sum_j <q_i, k_j> v_j / Nk, shape (..., Nq, Dv): the non-local block without softmax."""
    return (query @ key.transpose(-2, -1) / key.shape[-2]) @ value


def concatenation_attention(query_logits: torch.Tensor, key_logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """y_i = sum_j relu(a_i + b_j) v_j / Nk, shape (..., Nq, Dv), with a (..., Nq) and b (..., Nk)."""
    return (torch.relu(query_logits.unsqueeze(-1) + key_logits.unsqueeze(-2)) / key_logits.shape[-1]) @ value


_whiten = whiten  # an argument of the functions above has its name

for _name in __all__:  # functions are one call each in a graph of torch.fx
    if callable(globals()[_name]):
        torch.fx.wrap(_name)
