"""Pairwise attention in plain PyTorch, forward and backward, a block of queries at a time: see `plain.py`.

The formulas, the statistics and where means are taken off are those of csrc/ops/pairwise/pairwise.h for float32. A
block has all keys of its rows. So the backward of whole rows makes P and Delta from logits of its own, as plain PyTorch
does, and what cancels in dP - Delta is rounded alike; that of a part takes the statistics and Delta it is given.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ._blocks import blocks
from ._common import accumulate_type, sum_type
from .pairwise import allocate_pairwise_backward, allocate_pairwise_forward
from .part import allocate_pairwise_part_backward, allocate_pairwise_part_forward
from .plain import centred, kernel, mean, unary_backward, unary_forward


class _Scale:
    """P = exp(magnitude (t - max t)), t = sign <q, k>: the difference comes first, so the largest exponent is 0."""

    def __init__(self, scale: float, dtype: torch.dtype) -> None:
        limits = torch.finfo(dtype)
        self.sign = (scale > 0) - (scale < 0)
        # Where the scale is 0 t is too, and a factor of 0 would make NaN of -inf.
        self.magnitude = min(max(abs(scale), limits.tiny), limits.max) if scale else 1.0


class _Block(NamedTuple):
    """Some rows of the map, and the operands of their batch elements: (batches, positions, channels)."""

    batch: slice
    rows: slice
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    value_mean: torch.Tensor | float


def _flat(x: torch.Tensor) -> torch.Tensor:
    """`x` (..., N, C) as (batches, N, C)."""
    return x.reshape(x.shape[:-2].numel(), *x.shape[-2:])


def _map_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, whiten: str | None, part: bool
) -> Iterator[_Block]:
    """The blocks of the map. Operands are made for the batch elements of a block, and kept for their other blocks.

    Keys are centred with or without whitening, and values too: that adds a constant to each row of logits and nothing
    to dq, and is made good in y. 16-bit keys are centred if the caller whitens: products of 16-bit numbers are exact in
    float32, those of centred ones no longer. A part is used as it comes.
    """
    wide, (queries, keys) = accumulate_type(query.dtype), (query.shape[-2], key.shape[-2])
    q, k, v = (_flat(x) for x in (query, key, value))
    shape = q.shape[0], queries, keys
    for batch, group in itertools.groupby(blocks(*shape, query.device.type), lambda block: block[0]):
        if part:
            operands = (q[batch].to(wide), k[batch].to(wide), v[batch].to(wide), 0.0)
        else:
            own_query = centred(q[batch], True)[0] if whiten else q[batch].to(wide)
            exact = not whiten and k.dtype != wide
            own_key = k[batch].to(wide) if exact else centred(k[batch], bool(whiten))[0]
            operands = (own_query, own_key, *centred(v[batch], False))
        for _, rows in group:
            yield _Block(batch, rows, *operands)


def _logits(block: _Block, scale: _Scale) -> torch.Tensor:
    return (block.query[:, block.rows] * scale.sign) @ block.key.mT


def _exponentials(t: torch.Tensor, scale: _Scale) -> torch.Tensor:
    """exp(magnitude (t - max t)) by row, in place; returns max t."""
    most = t.amax(-1, keepdim=True)
    t.sub_(torch.where(most == -torch.inf, 0.0, most)).mul_(scale.magnitude).exp_()
    return most


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    whiten: str | None,
    part: bool,
    pooled: torch.Tensor | None,
    output: torch.Tensor,
    stats: torch.Tensor,
    residual: torch.Tensor,
) -> None:
    """Fills output, stats and, unless it is absent, residual."""
    factors = _Scale(scale, stats.dtype)
    wide_output = stats.new_empty(output.shape[:-2].numel(), *output.shape[-2:])
    flat_stats = _flat(stats)
    for block in _map_blocks(query, key, value, whiten, part):
        p = _logits(block, factors)
        most = _exponentials(p, factors)
        factor = 1 / p.sum(-1, keepdim=True)
        wide_output[block.batch, block.rows] = (p @ block.value).mul_(factor).add_(block.value_mean)
        flat_stats[block.batch, block.rows] = torch.cat([most, factor], -1)
    wide_output = wide_output.view(output.shape)
    if pooled is not None:
        wide_output += pooled.unsqueeze(-2)
    output.copy_(wide_output)
    if residual.shape == output.shape:
        residual.copy_(wide_output.sub_(output))


def _backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    whiten: str | None,
    part: tuple[torch.Tensor, torch.Tensor] | None,
    needs: Sequence[bool],
) -> list[Any]:
    """dq, dk and dv of the pairwise term, (..., N, C) in the accumulate type; None where not wanted.

    part: statistics and Delta of the rows, where the keys are a part of theirs.
    """
    wide = accumulate_type(query.dtype)
    factors = _Scale(scale, wide)
    dy = _flat(grad_output)
    inputs = (query, key, value)
    grads: list[Any] = [
        torch.zeros(_flat(x).shape, dtype=wide, device=x.device) if need else None
        for x, need in zip(inputs, needs, strict=True)
    ]
    dq, dk, dv = grads
    for block in _map_blocks(query, key, value, whiten, part is not None):
        batch, rows = block.batch, block.rows
        dy_rows = dy[batch, rows].to(wide)
        p = _logits(block, factors)
        if part is None:
            _exponentials(p, factors)
            p /= p.sum(-1, keepdim=True)
        else:
            shift, factor = _flat(part[0])[batch, rows].split(1, -1)
            # Another order of summation may make a logit exceed the shift: it counts as the shift.
            p.sub_(shift).clamp_(max=0).mul_(factors.magnitude).exp_().mul_(factor)
        if dv is not None:
            dv[batch].baddbmm_(p.mT, dy_rows)
        if dq is None and dk is None:
            continue
        ds = dy_rows @ block.value.mT
        if part is None:
            ds.sub_((p * ds).sum(-1, keepdim=True)).mul_(p)
        else:
            delta = part[1].reshape(dy.shape[:2])[batch, rows].unsqueeze(-1)
            # Where P rounds to 1 the difference is rounding, which a steep scale would make a gradient of.
            ds.sub_(delta).mul_(p.masked_fill_(p == 1, 0))
        del p
        if dq is not None:
            dq[batch, rows] = ds @ block.key
        if dk is not None:
            dk[batch].baddbmm_(ds.mT, block.query[:, rows])
        del ds
    if dq is not None:
        if whiten:
            dq -= mean(dq, -2).to(wide)
        dq *= scale
    if dk is not None:
        dk *= scale
    return [None if x is None else x.view(like.shape) for x, like in zip(grads, inputs, strict=True)]


def _fill(results: tuple[torch.Tensor, ...], grads: list[Any]) -> None:
    for result, grad in zip(results, grads, strict=True):
        if grad is not None:
            result.copy_(grad)


@kernel("pairwise_forward")
def pairwise_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask_logits: torch.Tensor | None,
    scale: float,
    whiten: str | None,
    save_residual: bool,
) -> tuple[torch.Tensor, ...]:
    output, stats, residual, pooled, mask_lse = allocate_pairwise_forward(
        query, key, value, mask_logits, scale, whiten, save_residual
    )
    if mask_logits is not None:
        pooled, mask_lse = unary_forward(mask_logits, value)
    offset = None if mask_logits is None else pooled
    _forward(query, key, value, scale, whiten, False, offset, output, stats, residual)
    return output, stats, residual, pooled, mask_lse


@kernel("pairwise_backward")
def pairwise_backward(
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
    *needs: bool,
) -> tuple[torch.Tensor, ...]:
    saved = (output, softmax_stats, residual, pooled, mask_lse)
    results = allocate_pairwise_backward(grad_output, query, key, value, mask_logits, *saved, scale, whiten, *needs)
    grads = [*_backward(grad_output, query, key, value, scale, whiten, None, needs[:3]), None]
    if mask_logits is not None and any(needs[2:]):
        wide = accumulate_type(query.dtype)
        grad_pooled = grad_output.sum(-2, dtype=sum_type(query)).to(wide)
        if needs[2]:
            weights = torch.softmax(mask_logits.to(sum_type(query)), -1).to(wide)
            grads[2].addcmul_(weights.unsqueeze(-1), grad_pooled.unsqueeze(-2))
        if needs[3]:
            grads[3] = unary_backward(grad_pooled, mask_logits, value, pooled, mask_lse, True, False)[0]
    _fill(results, grads)
    return results


@kernel("pairwise_part_forward")
def pairwise_part_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, save_residual: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    output, stats, residual = allocate_pairwise_part_forward(query, key, value, scale, save_residual)
    _forward(query, key, value, scale, None, True, None, output, stats, residual)
    return output, stats, residual


@kernel("pairwise_part_backward")
def pairwise_part_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    softmax_stats: torch.Tensor,
    delta: torch.Tensor,
    scale: float,
    *needs: bool,
) -> tuple[torch.Tensor, ...]:
    results = allocate_pairwise_part_backward(grad_output, query, key, value, softmax_stats, delta, scale, *needs)
    _fill(results, _backward(grad_output, query, key, value, scale, None, (softmax_stats, delta), needs))
    return results
