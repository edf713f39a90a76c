"""Whitened pairwise attention, alone and with the unary term, in memory linear in the number of positions."""

from typing import Any

import torch
from torch.autograd import Function

from ..types import Whitening
from ._checks import (
    check_alike,
    check_in_operator,
    check_pairwise,
    check_query_key,
    check_saved,
    check_tensor,
    parse_scale,
)
from ._common import (
    REFUSED,
    Differentiable,
    accumulate_type,
    at_once,
    empty_like_layout,
    gradient_by,
    mark_constant,
    ops,
    product,
    register_batching,
    save,
)
from ._handlers import handler_of
from .pairwise_autograd import AttentionGradient, AttentionTangent
from .unary import softmax
from .whiten import whiten as _whiten


class DisentangledAttention(Function):
    """y_i = sum_j (P_ij + u_j) v_j with P = softmax(scale <q'_i, k'_j>) and u = softmax(m).

    Backward, with G = sum_i dy_i, pooled = sum_j u_j v_j and Delta_i = <dy_i, y_i - pooled>:
    dS_ij = P_ij (<dy_i, v_j> - Delta_i), dq_i = scale (sum_j dS_ij k'_j less its mean), dk_j = scale sum_i dS_ij q'_i,
    dv_j = sum_i P_ij dy_i + u_j G, dm_j = u_j (<G, v_j> - <G, pooled>).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask_logits: torch.Tensor | None,
        scale: float,
        whiten: str | None,
        save_residual: bool,
    ) -> tuple[torch.Tensor, ...]:
        return ops.pairwise_forward(query, key, value, mask_logits, scale, whiten, save_residual)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        query, key, value, mask_logits, ctx.scale, ctx.whiten, _ = inputs
        save(ctx, query, key, value, mask_logits, *output)
        mark_constant(ctx, *output[1:])  # softmax_stats, residual, pooled, mask_lse
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        needs = ctx.needs_input_grad[:4]
        if grad_output is None or not any(needs):
            return (None,) * 7
        grads = _gradient(grad_output, *ctx.saved_tensors, ctx.scale, ctx.whiten, *needs)
        grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        return *grads, None, None, None  # scale, whiten, save_residual

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        tangent = AttentionTangent.apply(*ctx.saved_tensors, *tangents[:4], ctx.scale, ctx.whiten)
        return tangent, *(torch.zeros_like(x) for x in ctx.saved_tensors[5:])


_gradient = gradient_by("pairwise_backward", AttentionGradient)
_attend = Differentiable("pairwise_forward", DisentangledAttention, constants=True)


@torch.library.register_fake("dnl_ext::pairwise_forward")
def allocate_pairwise_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask_logits: torch.Tensor | None,
    scale: float,
    whiten: str | None,
    save_residual: bool,
) -> tuple[torch.Tensor, ...]:
    check_in_operator(whiten)
    check_pairwise(query, key, value, mask_logits, scale, whiten)
    dtype, lead = accumulate_type(query.dtype), query.shape[:-2]
    output = empty_like_layout(query, (*query.shape[:-1], value.shape[-1]))
    softmax_stats = query.new_empty((*query.shape[:-1], 2), dtype=dtype)
    has_residual = save_residual and query.dtype.itemsize == 2
    residual = empty_like_layout(query, output.shape) if has_residual else query.new_empty((*lead, 0))
    if mask_logits is None:
        absent = query.new_empty((*lead, 0), dtype=dtype)
        return output, softmax_stats, residual, absent, torch.empty_like(absent)
    pooled = value.new_empty((*lead, value.shape[-1]), dtype=dtype)
    return output, softmax_stats, residual, pooled, value.new_empty(lead, dtype=dtype)


@torch.library.register_fake("dnl_ext::pairwise_backward")
def allocate_pairwise_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask_logits: torch.Tensor | None,
    output: torch.Tensor,
    softmax_stats: torch.Tensor,
    residual: torch.Tensor,
    pooled: torch.Tensor,
    mask_lse: torch.Tensor,
    scale: float,
    whiten: str | None,
    need_query: bool,
    need_key: bool,
    need_value: bool,
    need_mask: bool,
) -> tuple[torch.Tensor, ...]:
    check_in_operator(whiten)
    check_pairwise(query, key, value, mask_logits, scale, whiten)
    lead, output_shape = query.shape[:-2], (*query.shape[:-1], value.shape[-1])
    check_alike("grad_output", grad_output, "query", query, output_shape)
    check_alike("output", output, "query", query, output_shape)
    check_saved("softmax_stats", softmax_stats, "query", query, (*query.shape[:-1], 2))
    check_tensor("residual", residual, "(...)")
    check_alike("residual", residual, "query", query, output_shape if residual.shape[-1:] != (0,) else (*lead, 0))
    if mask_logits is not None:
        check_saved("pooled", pooled, "query", query, (*lead, value.shape[-1]))
        check_saved("mask_lse", mask_lse, "query", query, lead)
    needs = (need_query, need_key, need_value, need_mask)
    return tuple(
        empty_like_layout(x, x.shape) if need and x is not None else query.new_empty((*query.shape[:-2], 0))
        for x, need in zip((query, key, value, mask_logits), needs, strict=True)
    )


register_batching("dnl_ext::pairwise_forward")(ops.pairwise_forward)
register_batching("dnl_ext::pairwise_backward")(ops.pairwise_backward)


def _whitened(
    query: torch.Tensor, key: torch.Tensor, whiten: Whitening | None
) -> tuple[torch.Tensor, torch.Tensor, str | None]:
    """Query and key as the operator takes them, and its own `whiten`, which is "channel" or None."""
    if whiten is None or whiten in ("channel", "in_nostd"):
        return query, key, None if whiten is None else "channel"
    return _whiten(query, whiten), _whiten(key, whiten), None


def disentangled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask_logits: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    whiten: Whitening | None = "channel",
) -> torch.Tensor:
    """Disentangled non-local attention, exact, in memory linear in the numbers of queries and keys.

    Every query i gets a weighted sum of the values. A weight is the sum of two attention weights: a pairwise one, from
    the similarity of query and key after both have lost their mean over positions ("whitening"), and a unary one, which
    is the same for every query::

        y_i = sum_j (P_ij + u_j) v_j
        P_ij = softmax_j(scale * <q_i - mean(q), k_j - mean(k)>)
        u_j = softmax_j(m_j)

    Args:
        query: tensor (..., Nq, Dqk), float64, float32, bfloat16 or float16; "..." is batch and heads. Any strides: the
            view ``x.flatten(2).transpose(1, 2)`` of a convolution's output is read where it lies.
        key: tensor (..., Nk, Dqk) with Nk >= 1.
        value: tensor (..., Nk, Dv).
        mask_logits: m, tensor (..., Nk), the logits of the unary term; None leaves that term out.
        scale: factor of the pairwise logits; None is 1 / sqrt(Dqk). A temperature T is ``scale=1 / (sqrt(Dqk) * T)``.
        whiten: ``"channel"`` (the paper's: each channel loses its mean over positions), None (a standard non-local
            block), or another name of :func:`whiten`, which then is applied to query and key first. ``"channel"`` is
            part of the operator.

    All tensors share dtype, device and leading dimensions. DTensors: see :mod:`dnl_ext.distributed`.

    Returns:
        Tensor (..., Nq, Dv) of the dtype and dimension order of ``query``: channel-first in, channel-first out.

    Raises:
        TypeError: an argument is not a tensor, or ``scale`` not a number.
        ValueError: a shape, dtype, device or option that does not fit.
        NotImplementedError: complex, sparse, nested or quantised input; third derivatives.

    Example:
        >>> import torch
        >>> from dnl_ext import disentangled_attention
        >>> query, key, value = (torch.randn(2, 64, 12, 16, requires_grad=True) for _ in range(3))  # of convolutions
        >>> mask_logits = torch.randn(2, 1, 12, 16)
        >>> q, k, v = (x.flatten(2).transpose(1, 2) for x in (query, key, value))  # (2, 192, 64), views
        >>> output = disentangled_attention(q, k, v, mask_logits.flatten(1))
        >>> output.transpose(1, 2).unflatten(2, (12, 16)).shape
        torch.Size([2, 64, 12, 16])
        >>> output.sum().backward()

    Source: Yin et al., "Disentangled Non-Local Neural Networks", ECCV 2020, equation 10.
    """
    if at_once(query, key, value, mask_logits):
        try:
            number, (query_in, key_in, operator_whiten) = parse_scale(query, scale), _whitened(query, key, whiten)
            differentiated = torch.is_grad_enabled() and (
                query.requires_grad
                or key.requires_grad
                or value.requires_grad
                or (mask_logits is not None and mask_logits.requires_grad)
            )
            return _attend.direct(
                differentiated, query_in, key_in, value, mask_logits, number, operator_whiten, differentiated
            )
        except REFUSED:
            pass  # the checks below say what is wrong; where they find nothing, the operator raises again
    check_tensor("query", query, "(..., Nq, Dqk)")
    scale = parse_scale(query, scale)
    check_pairwise(query, key, value, mask_logits, scale, whiten)
    handler = handler_of(query)
    if handler is not None:
        output = handler.disentangled_attention(query, key, value, mask_logits, scale, whiten)
        if output is not None:
            return output
    query, key, operator_whiten = _whitened(query, key, whiten)
    # A 16-bit output alone is too coarse for the backward; what its rounding lost is kept only if there may be one.
    # A trace is the same whoever requires grad, and for inference.
    inputs = [x for x in (query, key, value, mask_logits) if x is not None]
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    save_residual = differentiated and not torch.jit.is_tracing()
    return _attend(query, key, value, mask_logits, scale, operator_whiten, save_residual)[0]


def pairwise_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    whiten: Whitening | None = "channel",
) -> torch.Tensor:
    """Whitened pairwise attention, y_i = sum_j P_ij v_j: :func:`disentangled_attention` without the unary term.

    Args:
        query: tensor (..., Nq, Dqk), float64, float32, bfloat16 or float16.
        key: tensor (..., Nk, Dqk) with Nk >= 1.
        value: tensor (..., Nk, Dv).
        scale: as in :func:`disentangled_attention`.
        whiten: likewise. With None this is ordinary attention.

    Returns:
        Tensor (..., Nq, Dv) of the dtype and dimension order of ``query``.

    Errors are those of :func:`disentangled_attention`.

    Example:
        >>> import torch
        >>> from dnl_ext import pairwise_attention
        >>> query, key, value = torch.randn(2, 100, 16), torch.randn(2, 80, 16), torch.randn(2, 80, 300)
        >>> ours = pairwise_attention(query, key, value, whiten=None)
        >>> torch.allclose(ours, torch.nn.functional.scaled_dot_product_attention(query, key, value), atol=1e-5)
        True

    Source: Yin et al., ECCV 2020, equation 10 (first term).
    """
    return disentangled_attention(query, key, value, scale=scale, whiten=whiten)


def pairwise_softmax(
    query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None, whiten: Whitening | None = "channel"
) -> torch.Tensor:
    """The pairwise attention weights P themselves, Nq x Nk numbers: to be looked at, for nothing else here holds them.

    P_ij = softmax_j(scale * <q_i - mean(q), k_j - mean(k)>)

    Args:
        query: tensor (..., Nq, Dqk), float64, float32, bfloat16 or float16.
        key: tensor (..., Nk, Dqk) with Nk >= 1.
        scale: as in :func:`disentangled_attention`.
        whiten: likewise.

    Returns:
        Tensor (..., Nq, Nk) of the dtype of ``query``; each row sums to 1. Logits are computed in float32 or wider.

    Errors are those of :func:`disentangled_attention`.

    Example:
        >>> import torch
        >>> from dnl_ext import pairwise_softmax
        >>> weights = pairwise_softmax(torch.randn(5, 16), torch.randn(7, 16))
        >>> weights.shape
        torch.Size([5, 7])
        >>> torch.allclose(weights.sum(-1), torch.ones(5))
        True

    Source: Yin et al., ECCV 2020, equation 10 (first term).
    """
    check_tensor("query", query, "(..., Nq, Dqk)")
    scale = parse_scale(query, scale)
    check_query_key(query, key, scale, whiten)
    wide = accumulate_type(query.dtype)
    wide_query, wide_key = _whiten(query.to(wide), whiten), _whiten(key.to(wide), whiten)
    logits = product(wide_query * scale, wide_key.mT)
    if at_once(logits):
        weights = softmax.direct(torch.is_grad_enabled() and logits.requires_grad, logits)
        return weights if weights.dtype == query.dtype else weights.to(query.dtype)
    return softmax(logits).to(query.dtype)
