"""Second derivatives of the attention operators, from their first-order parts, in memory linear in Nq and Nk.

Everything that two derivatives can ask for is one product with the Hessian of L = <dy, y(x)>, x = (q, k, v, m). Its
gradient is (y, J^T dy), J being the Jacobian of y; so the Hessian times (0, t) is (J t, d<dy, J t>/dx). The first half
is the derivative of y along t (forward mode), and what a double backward owes to dy. The second is what it owes to x
and, the Hessian being symmetric, the derivative of the gradient J^T dy along t.

The map exists a block of queries at a time, in up to six matrices. The blocks are made of torch's products in the
accumulate type: one code for every device, bound by its twelve products of Nq x Nk, without 16-bit intermediates.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from ._blocks import blocks
from ._checks import check_alike, check_in_operator, check_pairwise
from ._common import (
    accumulate_type,
    empty_like_layout,
    ops,
    product,
    register_batching,
    sum_type,
    without_autocast,
)

#: A tensor, or None for zero or for what nobody wants. Flags say which, and a type checker does not follow them.
_Optional = Any

_library = torch.library.Library("dnl_ext", "FRAGMENT")
_library.define(
    "pairwise_double_backward(Tensor? grad_output, Tensor query, Tensor key, Tensor value, Tensor? mask_logits, "
    "Tensor? tangent_query, Tensor? tangent_key, Tensor? tangent_value, Tensor? tangent_mask, float scale, "
    "str? whiten, bool need_output, bool need_query, bool need_key, bool need_value, bool need_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def less_mean_under(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x - <p, x> by row: the logarithmic derivative of p = softmax(s) where s moves along x."""
    return x - (p * x).sum(-1, keepdim=True)


def unary_double_backward(
    grad: torch.Tensor | None,
    mask_logits: torch.Tensor,
    value: torch.Tensor,
    tangent_mask: torch.Tensor | None,
    tangent_value: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Both halves for y = sum_j u_j v_j, u = softmax(m), in differentiable torch operators of O(Nk Dv).

    With e = tm - <u, tm>, a_j = <dy, v_j> and b_j = e_j (a_j - <u, a>) + <dy, tv_j>:
    J t = sum_j u_j (e_j v_j + tv_j),  d/dm_j = u_j (b_j - <u, b>),  d/dv_j = u_j e_j dy.

    Args:
        grad: dy, tensor (..., Dv), or None where only J t is wanted. mask_logits: m, tensor (..., Nk).
        value: v, tensor (..., Nk, Dv). tangent_mask: tm, tensor (..., Nk) or None for zero.
        tangent_value: tv, tensor (..., Nk, Dv) or None for zero.

    Returns:
        J t (..., Dv), d/dm (..., Nk), d/dv (..., Nk, Dv) in the accumulate type; the last two None without ``grad``.
    """
    wide = accumulate_type(value.dtype)
    v, tv = (None if x is None else x.to(wide) for x in (value, tangent_value))
    # What is one number a key is float64 where there is such: it costs nothing beside the products.
    fine = sum_type(value)
    u = torch.softmax(mask_logits.to(fine), -1)
    e = torch.zeros_like(u) if tangent_mask is None else less_mean_under(u, tangent_mask.to(fine))

    def pooled(weights, values):
        return product(weights.to(wide).unsqueeze(-2), values).squeeze(-2)

    output = pooled(u * e, v)
    if tv is not None:
        output = output + pooled(u, tv)
    if grad is None:
        return output, None, None
    dy = grad.to(wide).unsqueeze(-2)

    def dots(values):
        return product(dy, values.mT).squeeze(-2).to(fine)

    b = e * less_mean_under(u, dots(v))
    if tv is not None:
        b = b + dots(tv)
    by_mask = (u * less_mean_under(u, b)).to(wide)
    return output, by_mask, (u * e).to(wide).unsqueeze(-1) * dy


def pairwise_double_backward(
    grad_output: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask_logits: torch.Tensor | None,
    tangent_query: torch.Tensor | None,
    tangent_key: torch.Tensor | None,
    tangent_value: torch.Tensor | None,
    tangent_mask: torch.Tensor | None,
    scale: float,
    whiten: str | None,
    need_output: bool,
    need_query: bool,
    need_key: bool,
    need_value: bool,
    need_mask: bool,
) -> tuple[torch.Tensor, ...]:
    """Both halves for y_i = sum_j (P_ij + u_j) v_j: the operator ``dnl_ext::pairwise_double_backward``.

    S = s q' k'^T and P = softmax(S), with q' and k' less their means where whitened. Along the tangents tq, tk, tv, tm

        S. = s (tq' k'^T + q' tk'^T),  E = S. - <P, S.> by row,  P. = P E
        J t = P. v + P tv

    and, with dy held, from A = dy v^T and dS = P (A - <P, A>), which give dq' = s dS k', dk' = s dS^T q', dv = P^T dy,

        A. = dy tv^T,  B = E (A - <P, A>) + A.,  dS. = P (B - <P, B>)
        d/dq' = s (dS. k' + dS tk'),  d/dk' = s (dS.^T q' + dS^T tq'),  d/dv = P.^T dy

    dS. = P. (A - <P, A>) + P (A. - <P., A> - <P, A.>) has that form because rows of P. = P E sum to zero, and so
    <P., A> = <P, E (A - <P, A>)>. The unary term adds its own to J t, d/dv and d/dm: :func:`unary_double_backward` with
    G = sum_i dy_i for dy. Centring is a symmetric projection, so the derivatives by q and k are centred where q and k
    are; k's is already, since rows of dS and dS. sum to zero.

    For the same reason keys, their tangents and values may lose any constant vector in the products above. They always
    lose their means: what large means would round then does not arise.

    Args:
        grad_output: dy, tensor (..., Nq, Dv), or None where only J t is wanted.
        query: tensor (..., Nq, Dqk). key: tensor (..., Nk, Dqk). value: tensor (..., Nk, Dv).
        mask_logits: tensor (..., Nk) or None. tangent_*: tensors of those shapes, or None for zero.
        scale: s. whiten: "channel" or None. need_*: which results are wanted, in their order.

    Returns:
        J t (..., Nq, Dv), and d<dy, J t> by query, key, value and mask_logits, each of its input's shape and order of
        dimensions, all in the dtype of ``query``; (..., 0) for what is not wanted.
    """
    inputs, tangents = (query, key, value, mask_logits), (tangent_query, tangent_key, tangent_value, tangent_mask)
    needs = (need_output, need_query, need_key, need_value, need_mask and mask_logits is not None)
    results = _empty_results(grad_output, inputs, tangents, scale, whiten, needs)
    with without_autocast(query):
        wide = [*_pairwise_terms(grad_output, inputs, tangents, scale, whiten, needs), None]
        if mask_logits is not None:
            total = None if grad_output is None else grad_output.sum(-2, dtype=accumulate_type(query.dtype))
            pooled, *wide_mask_value = unary_double_backward(total, mask_logits, value, tangent_mask, tangent_value)
            for i, term in ((0, pooled.unsqueeze(-2)), (3, wide_mask_value[1])):
                if needs[i]:
                    wide[i] += term
            wide[4] = wide_mask_value[0]
    return tuple(x.copy_(y) if need else x for x, y, need in zip(results, wide, needs, strict=True))


def _empty_results(
    grad_output: _Optional,
    inputs: Sequence[_Optional],
    tangents: Sequence[_Optional],
    scale: float,
    whiten: str | None,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """Where the results go, after every check of a call."""
    query, _, value, _ = inputs
    check_pairwise(*inputs, scale, whiten)
    check_in_operator(whiten)
    shapes: tuple[Any, ...] = ((*query.shape[:-1], value.shape[-1]), *(None if x is None else x.shape for x in inputs))
    if grad_output is not None:
        check_alike("grad_output", grad_output, "query", query, shapes[0])
    elif any(needs[1:]):
        raise ValueError("grad_output: expected a tensor where more than the output's derivative is wanted, got None")
    for name, x, shape in zip(("query", "key", "value", "mask"), tangents, shapes[1:], strict=True):
        if x is not None and shape is None:
            raise ValueError(f"tangent_{name}: expected None without mask_logits, got a tensor")
        if x is not None:
            check_alike(f"tangent_{name}", x, "query", query, shape)
    return [
        empty_like_layout(like, shape) if need else query.new_empty((*query.shape[:-2], 0))
        for like, shape, need in zip((query, *inputs), shapes, needs, strict=True)
    ]


def _pairwise_terms(
    grad_output: _Optional,
    inputs: Sequence[_Optional],
    tangents: Sequence[_Optional],
    scale: float,
    whiten: str | None,
    needs: Sequence[bool],
) -> list[_Optional]:
    """The pairwise term's part of the results, in the accumulate type: [J t, d/dq, d/dk, d/dv], None if not wanted."""
    wide, lead = accumulate_type(inputs[0].dtype), inputs[0].shape[:-2]

    def operand(x: _Optional, centred: bool, factor: float = 1.0) -> _Optional:
        """`x` as (batches, N, C) in the accumulate type, times `factor`, less its mean over N where `centred`."""
        if x is None:
            return None
        x = x.to(wide).reshape(math.prod(lead), *x.shape[-2:])
        x = x - x.mean(-2, keepdim=True) if centred else x
        return x if factor == 1.0 else x * factor

    dy = operand(grad_output, False)
    q, tq = (operand(x, whiten is not None, scale) for x in (inputs[0], tangents[0]))
    k, v, tk = (operand(x, True) for x in (*inputs[1:3], tangents[1]))
    tv = operand(tangents[2], False)
    batches, queries, keys = *q.shape[:2], k.shape[1]
    sizes = ((queries, v.shape[2]), q.shape[1:], k.shape[1:], v.shape[1:])
    results = [q.new_zeros((batches, *size)) if need else None for size, need in zip(sizes, needs, strict=False)]
    if any(needs[:4]) and any(x is not None for x in (tq, tk, tv)):
        for batch, rows in blocks(batches, queries, keys, q.device.type):
            by_query: list[Any] = [None if x is None else x[batch, rows] for x in (dy, q, tq, results[0], results[1])]
            by_key: list[Any] = [None if x is None else x[batch] for x in (k, v, tk, tv, results[2], results[3])]
            _add_block(*by_query, *by_key)
    dq = results[1]
    if dq is not None:
        dq *= scale
        if whiten is not None:
            dq -= dq.mean(-2, keepdim=True)
    return [None if x is None else x.view(*lead, *x.shape[1:]) for x in results]


def _add_block(
    dy: _Optional,
    q: torch.Tensor,
    tq: _Optional,
    output: _Optional,
    dq: _Optional,
    k: torch.Tensor,
    v: torch.Tensor,
    tk: _Optional,
    tv: _Optional,
    dk: _Optional,
    dv: _Optional,
) -> None:
    """Adds what a block of queries gives to the results; all (batches, positions, channels), None if absent.

    q and tq are scaled here, so dq is without the factor s; the names are those of the formulas.
    """
    p = torch.softmax(q @ k.mT, -1)
    e = _sum_of_products((tq, k.mT), (q, None if tk is None else tk.mT))
    dot_p = None
    if e is not None:
        e -= (p * e).sum(-1, keepdim=True)
        dot_p = p * e
    if output is not None:
        output.copy_(_sum_of_products((dot_p, v), (p, tv)))
    if dv is not None and dot_p is not None:
        dv.baddbmm_(dot_p.mT, dy)
    if dq is None and dk is None:
        return
    del dot_p
    b: _Optional = None if tv is None else dy @ tv.mT
    ds: _Optional = None
    if e is not None:
        a = dy @ v.mT
        a -= (p * a).sum(-1, keepdim=True)
        e *= a
        b = e if b is None else b.add_(e)
        ds = a.mul_(p)
    b -= (p * b).sum(-1, keepdim=True)
    dot_ds = b.mul_(p)
    if dq is not None:
        dq.copy_(_sum_of_products((dot_ds, k), (ds, tk)))
    if dk is not None:
        dk.baddbmm_(dot_ds.mT, q)
        if tq is not None:
            dk.baddbmm_(ds.mT, tq)


def _sum_of_products(*pairs: tuple[_Optional, _Optional]) -> _Optional:
    """sum of a @ b over the pairs that have both, in one buffer; None without any."""
    total = None
    for a, b in pairs:
        if a is not None and b is not None:
            total = a @ b if total is None else total.baddbmm_(a, b)
    return total


_library.impl("pairwise_double_backward", pairwise_double_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("dnl_ext::pairwise_double_backward")
def _(
    grad_output: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask_logits: torch.Tensor | None,
    tq: torch.Tensor | None,
    tk: torch.Tensor | None,
    tv: torch.Tensor | None,
    tm: torch.Tensor | None,
    scale: float,
    whiten: str | None,
    *needs: bool,
) -> tuple[torch.Tensor, ...]:
    inputs = (query, key, value, mask_logits)
    needs = (*needs[:4], needs[4] and mask_logits is not None)
    return tuple(_empty_results(grad_output, inputs, (tq, tk, tv, tm), scale, whiten, needs))


register_batching("dnl_ext::pairwise_double_backward")(ops.pairwise_double_backward)
