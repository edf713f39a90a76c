"""Disentangled non-local attention in plain PyTorch: the definition that everything is tested against.

Every function here has the name and the signature of its fused counterpart in :mod:`dnl_ext`, where errors are
documented, and builds the attention maps that the fused one never stores. Read it as the definition, test against it,
and use it where the extension cannot be built. Equations follow Yin et al., "Disentangled Non-Local Neural Networks",
ECCV 2020 (arXiv 2006.06668).

Shapes: query (..., Nq, Dqk), key (..., Nk, Dqk), value (..., Nk, Dv), mask_logits (..., Nk), where "..." is batch and
heads. Results have the dtype of the inputs, in which everything is computed.
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
    """Raise unless `name` is one of WHITEN_NAMES; `argument` is what messages call it.

    Raises:
        TypeError: neither a string nor None.
        ValueError: an unknown name.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"{argument}: expected a string or None, got {type(name).__name__}")
    if name not in WHITEN_NAMES:
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, WHITEN_NAMES))}, got {name!r}")


def mean_subtract(x: torch.Tensor, dim: int = -2) -> torch.Tensor:
    """Subtract the mean over one dimension: ``x - x.mean(dim, keepdim=True)``. See :func:`dnl_ext.mean_subtract`.

    Example:
        >>> import torch
        >>> from dnl_ext import reference
        >>> reference.mean_subtract(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
        tensor([[ -1., -10.],
                [  1.,  10.]])
    """
    return x - x.mean(dim, keepdim=True)


def whiten(x: torch.Tensor, name: Whitening | None = "channel", *, eps: float = 1e-5) -> torch.Tensor:
    """x (..., N, D) less a mean, and for ``in``, ``ln``, ``fln`` divided by sqrt(unbiased variance + eps).

    Mean and variance are over the positions N of a channel (``channel`` = ``in_nostd``, ``in``), the channels of a
    position (``spatial``), a sample's positions and channels (``ln_nostd``, ``ln``), or everything (``fln_nostd``,
    ``fln``). None returns x. Names and formulae of the paper's code. See :func:`dnl_ext.whiten`.

    Example:
        >>> import torch
        >>> from dnl_ext import reference
        >>> reference.whiten(torch.tensor([[1.0, 10.0], [3.0, 30.0]]), "in")
        tensor([[-0.7071, -0.7071],
                [ 0.7071,  0.7071]])
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
    """Pairwise attention weights P_ij = softmax_j(scale * <q'_i, k'_j>), shape (..., Nq, Nk); q' and k' are whitened.

    Paper, equation 10 (first term). See :func:`dnl_ext.pairwise_softmax`.

    Example:
        >>> import torch
        >>> from dnl_ext import reference
        >>> reference.pairwise_softmax(torch.randn(2, 5, 16), torch.randn(2, 7, 16)).shape
        torch.Size([2, 5, 7])
    """
    check_whiten_name(whiten)
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    query, key = _whiten(query, whiten), _whiten(key, whiten)
    return torch.softmax((query * scale) @ key.transpose(-2, -1), dim=-1)


def unary_softmax(mask_logits: torch.Tensor) -> torch.Tensor:
    """Unary attention weights u_j = softmax_j(m_j), shape (..., Nk).

    Paper, equation 10 (second term). See :func:`dnl_ext.unary_softmax`.

    Example:
        >>> import torch
        >>> from dnl_ext import reference
        >>> reference.unary_softmax(torch.zeros(4))
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    return torch.softmax(mask_logits, dim=-1)


def pairwise_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    whiten: Whitening | None = "channel",
) -> torch.Tensor:
    """y_i = sum_j P_ij v_j with the weights of :func:`pairwise_softmax`, shape (..., Nq, Dv).

    Paper, equation 10 without its second term. See :func:`dnl_ext.pairwise_attention`.

    Example:
        >>> import torch
        >>> from dnl_ext import reference
        >>> reference.pairwise_attention(torch.randn(5, 16), torch.randn(7, 16), torch.randn(7, 3)).shape
        torch.Size([5, 3])
    """
    return pairwise_softmax(query, key, scale=scale, whiten=whiten) @ value


def unary_attention(mask_logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """sum_j u_j v_j with the weights of :func:`unary_softmax`: one vector for all queries, shape (..., Dv).

    Paper, equation 10 without its first term. See :func:`dnl_ext.unary_attention`.

    Example:
        >>> import torch
        >>> from dnl_ext import reference
        >>> reference.unary_attention(torch.zeros(4), torch.tensor([[1.0], [2.0], [3.0], [6.0]]))  # an even mean
        tensor([3.])
    """
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
    """y_i = sum_j (P_ij + u_j) v_j, shape (..., Nq, Dv); the pairwise term alone without ``mask_logits``.

    Paper, equation 10. See :func:`dnl_ext.disentangled_attention`.

    Example:
        >>> import torch
        >>> from dnl_ext import reference
        >>> query, key, value = torch.randn(5, 16), torch.randn(7, 16), torch.randn(7, 3)
        >>> output = reference.disentangled_attention(query, key, value, torch.randn(7))
        >>> output.shape
        torch.Size([5, 3])
    """
    output = pairwise_attention(query, key, value, scale=scale, whiten=whiten)
    if mask_logits is not None:
        output = output + unary_attention(mask_logits, value).unsqueeze(-2)
    return output


def shared_key_logits(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """m_j = <mean_i q_i, k_j>, shape (..., Nk): the unary logits of a block whose two terms share their keys.

    Paper, equation 5. See :func:`dnl_ext.shared_key_logits`.

    Example:
        >>> import torch
        >>> from dnl_ext import reference
        >>> reference.shared_key_logits(torch.tensor([[1.0, 0.0], [3.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 2.0]]))
        tensor([3., 2.])
    """
    return (key @ query.mean(-2).unsqueeze(-1)).squeeze(-1)


def dot_product_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """y_i = sum_j <q_i, k_j> v_j / Nk, shape (..., Nq, Dv): the non-local block without softmax.

    Wang et al., "Non-local Neural Networks", CVPR 2018, equation 4. See :func:`dnl_ext.dot_product_attention`.

    Example:
        >>> import torch
        >>> from dnl_ext import reference
        >>> reference.dot_product_attention(torch.randn(5, 16), torch.randn(7, 16), torch.randn(7, 3)).shape
        torch.Size([5, 3])
    """
    return (query @ key.transpose(-2, -1) / key.shape[-2]) @ value


def concatenation_attention(query_logits: torch.Tensor, key_logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """y_i = sum_j relu(a_i + b_j) v_j / Nk, shape (..., Nq, Dv), with a (..., Nq) and b (..., Nk).

    Wang et al., "Non-local Neural Networks", CVPR 2018, equation 5. See :func:`dnl_ext.concatenation_attention`.

    Example:
        >>> import torch
        >>> from dnl_ext import reference
        >>> a, b = torch.tensor([0.0, 2.0]), torch.tensor([1.0, -1.0])
        >>> reference.concatenation_attention(a, b, torch.tensor([[1.0], [10.0]]))
        tensor([[0.5000],
                [6.5000]])
    """
    return (torch.relu(query_logits.unsqueeze(-1) + key_logits.unsqueeze(-2)) / key_logits.shape[-1]) @ value


_whiten = whiten  # an argument of the functions above has its name

for _name in __all__:  # functions are one call each in a graph of torch.fx
    if callable(globals()[_name]):
        torch.fx.wrap(_name)
