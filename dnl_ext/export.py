"""Programs that run without Python, or without this library.

:func:`library` is the file that a C++ program loads to run an AOTInductor package or a TorchScript file that holds the
operators of dnl_ext (examples/cpp). :func:`decompositions` replaces them by plain aten operators, for ONNX and other
targets that know nothing else.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import torch

from .ops._common import accumulate_type, memory_order, ops
from .ops.whiten import DEVIATION

__all__ = ["decompositions", "library"]


def library() -> pathlib.Path:
    """Path of libdnl_ext.so, which registers the operators in any process that has libtorch.

    It depends on libtorch's stable ABI alone, not on Python: ``dlopen`` it, or link to it. ``examples/cpp`` does.

    Example:
        >>> import dnl_ext
        >>> dnl_ext.export.library().name
        'libdnl_ext.so'
    """
    return pathlib.Path(__file__).with_name("libdnl_ext.so")


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """Table for :meth:`torch.export.ExportedProgram.run_decompositions` that leaves no forward operator of dnl_ext.

    What it leaves is plain PyTorch: sums and softmax in float32 or wider as in the operators, but the pairwise term
    holds the N x N map. The unary term stays linear in N. Backward operators are not in the table.

    Returns:
        dict from torch.ops.dnl_ext overloads to functions of the same arguments and results, memory order included.

    Example:
        >>> import torch, dnl_ext
        >>> block = dnl_ext.DisentangledNonLocal2d(8).eval()
        >>> program = torch.export.export(block, (torch.randn(1, 8, 4, 4),))
        >>> program = program.run_decompositions(dnl_ext.export.decompositions())
        >>> any("dnl_ext" in str(node.target) for node in program.graph.nodes)
        False
    """
    return {
        ops.mean_subtract.default: _mean_subtract,
        ops.whiten_forward.default: _whiten_forward,
        ops.softmax.default: _softmax,
        ops.unary_forward.default: _unary_forward,
        ops.pairwise_forward.default: _pairwise_forward,
    }


def _laid_out_as(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`x` with the memory order of `like`, which a view behind it in the program may rest on."""
    order = memory_order(like)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return x.permute(order).contiguous().permute(inverse)


def _mean_subtract(x: torch.Tensor, dim: int) -> torch.Tensor:
    wide = x.to(accumulate_type(x.dtype))
    return _laid_out_as((wide - wide.mean(dim, keepdim=True)).to(x.dtype), x)


def _whiten_forward(x: torch.Tensor, name: str, apart: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., N, C) whitened, and 1 / deviation in the shape of its mean."""
    kind = "in" if name == "channel" else name.removesuffix("_nostd")
    dims = {"in": [-2], "spatial": [-1], "ln": [-2, -1], "fln": list(range(apart, x.dim()))}[kind]
    wide = x.to(accumulate_type(x.dtype))
    y = wide - wide.mean(dims, keepdim=True)
    if name in DEVIATION:
        rstd = torch.rsqrt(wide.var(dims, keepdim=True) + eps)
        y, rstd = y * rstd, rstd.squeeze(dims)
    else:
        rstd = wide.new_empty((*x.shape[:-2], 0))
    return _laid_out_as(y.to(x.dtype), x), rstd


def _softmax(x: torch.Tensor) -> torch.Tensor:
    return _laid_out_as(torch.softmax(x.to(accumulate_type(x.dtype)), -1).to(x.dtype), x)


def _unary_forward(mask_logits: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """pooled (..., Dv) and lse (...), of mask_logits (..., Nk) and value (..., Nk, Dv)."""
    logits, wide = (x.to(accumulate_type(x.dtype)) for x in (mask_logits, value))
    pooled = (torch.softmax(logits, -1).unsqueeze(-2) @ wide).squeeze(-2)
    return pooled, torch.logsumexp(logits, -1)


def _pairwise_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask_logits: torch.Tensor | None,
    scale: float,
    whiten: str | None,
    save_residual: bool,
) -> tuple[torch.Tensor, ...]:
    """output (..., Nq, Dv), softmax_stats (..., Nq, 2), residual like output, pooled (..., Dv) and mask_lse (...).

    softmax_stats and residual are between an operator's forward and its own backward, and of one route: here they are
    NaN, so that a backward operator behind a decomposed forward cannot go unnoticed.
    """
    wide, lead = accumulate_type(query.dtype), query.shape[:-2]
    q, k, v = (x.to(wide) for x in (query, key, value))
    if whiten is not None:
        q, k = q - q.mean(-2, keepdim=True), k - k.mean(-2, keepdim=True)
    y = torch.softmax((q * scale) @ k.transpose(-2, -1), -1) @ v
    if mask_logits is None:
        pooled, mask_lse = q.new_empty((*lead, 0)), q.new_empty((*lead, 0))
    else:
        pooled, mask_lse = _unary_forward(mask_logits, value)
        y = y + pooled.unsqueeze(-2)
    output = _laid_out_as(y.to(query.dtype), query)
    softmax_stats = q.new_full((*query.shape[:-1], 2), torch.nan)
    has_residual = save_residual and query.dtype.itemsize == 2
    residual = torch.full_like(output, torch.nan) if has_residual else query.new_empty((*lead, 0))
    return output, softmax_stats, residual, pooled, mask_lse
