"""Disentangled attention whose positions are sharded over the ranks of a group; each rank calls it with its own.

The mathematics is that of one process (csrc/ops/pairwise/pairwise.h), cut as follows, for R ranks:

    means       of query, key and value over all ranks: one all-gather of (R, 2 Dqk + Dv) sums in float64
    unary       softmax and pooled values of each rank's own keys, merged: u_j = exp(m_j - lse), pooled = sum_j u_j v_j
    pairwise    for each block of keys that comes by (_exchange.py): the softmax over this block alone, with its shift
                s_r and factor f_r, merged by  w_r = exp(|scale| (s_r - s)) / f_r,  y = sum_r w_r y_r / sum_r w_r,  s
                the largest of them
    backward    Delta_i = <dy_i, y_i> once; then for each block that comes by, P with the statistics of whole rows, dq
                added where it is and dk, dv to the sums that travel; G = sum_i dy_i and the mean of dq over all ranks

Centring is done here and not in the operator, whose means would be those of a block (dnl_ext/ops/part.py): query and
key with whitening; in float32 and float64 keys and values always, as in one process, where it costs nothing and keeps
large offsets out of the products. 16-bit queries and keys are rounded again when they are centred, as in plain PyTorch
and unlike in one process. Delta of 16-bit inputs needs the rounding error of y, which is kept beside it in 16 bits.

Queries are taken in blocks, which bound the workspace of an operator; centred copies live as long as a block.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd import Function

from ..ops._common import accumulate_type, empty_like_layout, last_derivative, ops
from . import _exchange
from ._shards import Shards

#: Positions that are widened to float64 at a time.
SUM_BLOCK = 4096


def ranges(positions: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + SUM_BLOCK, positions)) for begin in range(0, positions, SUM_BLOCK))


def column_sums(x: torch.Tensor) -> torch.Tensor:
    """Sum over positions, (..., n, D) to (..., D), in float64."""
    total = x.new_zeros((*x.shape[:-2], x.shape[-1]), dtype=torch.float64)
    for begin, end in ranges(x.shape[-2]):
        total += x[..., begin:end, :].sum(-2, dtype=torch.float64)
    return total


def row_products(x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """<x_i, vector>, (..., n, D) and (..., D) to (..., n), in float64."""
    out = x.new_empty(x.shape[:-1], dtype=torch.float64)
    for begin, end in ranges(x.shape[-2]):
        out[..., begin:end] = (x[..., begin:end, :].double() @ vector.double().unsqueeze(-1)).squeeze(-1)
    return out


def centred(x: torch.Tensor, mean: torch.Tensor | None) -> torch.Tensor:
    """x less `mean` (..., D), rounded once to the dtype of x; x itself where there is no mean."""
    if mean is None:
        return x
    wide = accumulate_type(x.dtype)
    return (x - mean.to(wide).unsqueeze(-2)).to(x.dtype)


class Means:
    """Means over all ranks that are taken off query, key and value before anything else, (..., D), or None."""

    def __init__(
        self, shards: Shards, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, centre: bool
    ) -> None:
        self.query = self.key = self.value = None
        wide = query.dtype.itemsize > 2
        if not (centre or wide):
            return
        width = query.shape[-1]
        sums = shards.total(torch.cat([column_sums(x) for x in (query, key, value)], dim=-1))
        if centre:
            self.query = sums[..., :width] / max(sum(shards.queries), 1)
        self.key = sums[..., width : 2 * width] / sum(shards.keys)
        if not centre:
            # Where centring is ours and not the caller's, what is not finite must spoil its own products only.
            self.key = self.key.nan_to_num(0, 0, 0)
        if wide:
            self.value = (sums[..., 2 * width :] / sum(shards.keys)).nan_to_num(0, 0, 0).to(value.dtype)

    def pack(self, key: torch.Tensor, value: torch.Tensor) -> Callable[..., None]:
        """The function that fills a block with a rank's own keys and values, centred: see _exchange.blocks."""

        def fill(begin, end, key_block, value_block):
            key_block.copy_(centred(key[..., begin:end, :], self.key))
            value_block.copy_(centred(value[..., begin:end, :], self.value))

        return fill


class Rows:
    """The running softmax of a rank's queries: y (..., Nq, Dv) so far, and the maximum and the sum of every row."""

    def __init__(self, query: torch.Tensor, channels: int, scale: float) -> None:
        self.scale = scale
        wide = accumulate_type(query.dtype)
        self.sum_of_values = empty_like_layout(query, (*query.shape[:-1], channels), wide).zero_()
        self.shift = query.new_full(query.shape[:-1], -torch.inf, dtype=wide)
        self.sum = query.new_zeros(query.shape[:-1], dtype=wide)

    def weight(self, difference: torch.Tensor) -> torch.Tensor:
        """exp(|scale| difference), in float64: there a scale that is no float32 is a number too."""
        magnitude = abs(self.scale) or 1.0  # with a scale of 0 shifts are 0, or -inf where there is no key yet
        return (difference.double() * magnitude).exp().to(difference.dtype)

    def add(self, begin: int, end: int, output: torch.Tensor, stats: torch.Tensor, residual: torch.Tensor) -> None:
        """What pairwise_part_forward gives for the queries from begin to end."""
        here = slice(begin, end)
        values, shift, total = self.sum_of_values[..., here, :], self.shift[..., here], self.sum[..., here]
        part_shift, factor = stats.unbind(-1)
        nothing = part_shift == -torch.inf  # none of these keys has a probability; the operator's output is NaN
        largest = torch.maximum(shift, part_shift)
        off = largest.masked_fill(largest == -torch.inf, 0)
        before = self.weight(shift - off)
        weight = (self.weight(part_shift - off) / factor).masked_fill(nothing, 0)
        values.mul_(before.unsqueeze(-1))
        for part in (output, residual) if residual.dim() == output.dim() else (output,):
            values.addcmul_(part.masked_fill_(nothing.unsqueeze(-1), 0).to(values.dtype), weight.unsqueeze(-1))
        total.mul_(before).add_(weight)
        shift.copy_(largest)

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """y, complete, and softmax_stats (..., Nq, 2)."""
        factor = 1 / self.sum
        return self.sum_of_values.mul_(factor.unsqueeze(-1)), torch.stack((self.shift, factor), dim=-1)


def pool(shards: Shards, mask_logits: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled values over all ranks (..., Dv) and the lse of all mask logits (...), in float64."""
    if mask_logits.shape[-1]:
        pooled, lse = ops.unary_forward(mask_logits, value)
    else:
        pooled = value.new_zeros((*value.shape[:-2], value.shape[-1]))
        lse = value.new_full(value.shape[:-2], -torch.inf)
    parts = shards.gathered(torch.cat((pooled.double(), lse.double().unsqueeze(-1)), dim=-1))
    pooled, lse = parts[..., :-1], parts[..., -1]
    total = lse.logsumexp(0)
    weight = (lse - total).exp().unsqueeze(-1)
    return torch.where(weight == 0, 0, weight * pooled).sum(0), total  # a rank without keys has no pooled values


class UnaryGradients:
    """dm_j = u_j (<G, v_j> - <G, pooled>) and dv_j = u_j G, with G (..., Dv) = sum over all ranks of dy."""

    def __init__(
        self, mask_logits: torch.Tensor, value: torch.Tensor, lse: torch.Tensor, grad_pooled: torch.Tensor
    ) -> None:
        self.map = (mask_logits.double() - lse.unsqueeze(-1)).exp()  # (..., Nk), up to a common factor
        self.grad_pooled, self.like = grad_pooled, value
        self.dot = row_products(value, grad_pooled)

    def sums(self) -> torch.Tensor:
        """What is to be added up over ranks, (..., 2): sum_j u_j <G, v_j> and sum_j u_j."""
        return torch.stack(((self.map * self.dot).sum(-1), self.map.sum(-1)), dim=-1)

    def set_total(self, sums: torch.Tensor) -> None:
        """The means are over u as it is here, not as rounded in the forward: then dm sums to zero."""
        weighted, total = sums.unbind(-1)
        self.map = self.map / total.unsqueeze(-1)
        self.mean = (weighted / total).unsqueeze(-1)

    def mask(self) -> torch.Tensor:
        return self.map * (self.dot - self.mean)

    def add_value(self, total: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Add dv of the keys from begin to end to `total` (..., end - begin, Dv)."""
        return total.addcmul_(
            self.map[..., begin:end, None].to(total.dtype), self.grad_pooled.unsqueeze(-2).to(total.dtype)
        )


class ShardedAttention(Function):
    """y_i = sum_j (P_ij + u_j) v_j with j over all ranks' keys; backward in `_backward`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask_logits: torch.Tensor | None,
        shards: Shards,
        scale: float,
        centre: bool,
        keep: bool,
    ) -> torch.Tensor:
        means, rows = Means(shards, query, key, value, centre), Rows(query, value.shape[-1], scale)
        pooled, mask_lse = (None, None) if mask_logits is None else pool(shards, mask_logits, value)
        widths = (key.shape[-1], value.shape[-1])
        for keys, values in _exchange.blocks(shards, widths, key, means.pack(key, value)):
            for begin, end in shards.query_ranges():
                part = ops.pairwise_part_forward(
                    centred(query[..., begin:end, :], means.query), keys, values, scale, True
                )
                rows.add(begin, end, *part)
        wide, stats = rows.finish()
        offset = [x for x in (means.value, pooled) if x is not None]
        # Rounded here, once: Delta takes off what y was given, or all rows would share the difference.
        offset = sum(offset[1:], offset[0]).to(wide.dtype) if offset else None
        if offset is not None:
            wide += offset.unsqueeze(-2)
        output, residual = wide, None
        if query.dtype != wide.dtype:
            output = wide.to(query.dtype)
            residual = (wide - output).to(query.dtype) if keep else None
        if keep:
            ctx.save_for_backward(query, key, value, mask_logits, output, residual, stats, offset, mask_lse)
            ctx.means, ctx.shards, ctx.scale, ctx.centre = means, shards, scale, centre
        ctx.set_materialize_grads(True)  # every rank must take part, whether or not its loss has its output in it
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = _run_backward(
            grad_output, *ctx.saved_tensors, ctx.means, ctx.shards, ctx.scale, ctx.centre, ctx.needs_input_grad[:4]
        )
        return *grads, None, None, None, None  # shards, scale, centre, keep


def _backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask_logits: torch.Tensor | None,
    output: torch.Tensor,
    residual: torch.Tensor | None,
    stats: torch.Tensor,
    offset: torch.Tensor | None,
    mask_lse: Any,
    means: Means,
    shards: Shards,
    scale: float,
    centre: bool,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    need_query, need_key, need_value, need_mask = needs
    wide = accumulate_type(query.dtype)
    need_logits = need_query or need_key
    delta = _delta(grad_output, output, residual, offset) if need_logits else query.new_zeros(query.shape[:-1])
    delta = delta.to(wide)
    unary: Any = None
    if mask_logits is not None and (need_value or need_mask):
        unary = UnaryGradients(mask_logits, value, mask_lse, shards.total(column_sums(grad_output)))
        unary.set_total(shards.total(unary.sums()))
    grad_query: Any = empty_like_layout(query, query.shape, wide).zero_() if need_query else None
    grad_key: Any = empty_like_layout(key, key.shape) if need_key else None
    grad_value: Any = empty_like_layout(value, value.shape) if need_value else None

    def work(keys: torch.Tensor, values: torch.Tensor) -> Any:
        total = None
        for begin, end in shards.query_ranges():
            here = slice(begin, end)
            dq, *share = ops.pairwise_part_backward(
                grad_output[..., here, :], centred(query[..., here, :], means.query), keys, values,
                stats[..., here, :], delta[..., here], scale, *needs[:3],
            )  # fmt: skip
            if need_query:
                grad_query[..., here, :] += dq
            share = [x.to(wide) if need else None for x, need in zip(share, needs[1:3], strict=True)]
            total = (
                share if total is None else [x if x is None else x.add_(y) for x, y in zip(total, share, strict=True)]
            )
        return total and [keys[..., :0].to(wide) if x is None else x for x in total]

    def deliver(begin: int, end: int, key_sum: torch.Tensor, value_sum: torch.Tensor) -> None:
        if need_key:
            grad_key[..., begin:end, :] = key_sum
        if need_value:
            grad_value[..., begin:end, :] = value_sum if unary is None else unary.add_value(value_sum, begin, end)

    pack, widths = means.pack(key, value), (key.shape[-1], value.shape[-1])
    if need_key or need_value:
        grad_widths = (widths[0] if need_key else 0, widths[1] if need_value else 0)
        _exchange.blocks_and_back(shards, widths, grad_widths, key, wide, pack, work, deliver)
    elif need_query:
        for pair in _exchange.blocks(shards, widths, key, pack):
            work(*pair)

    if need_query:
        if centre:
            mean = shards.total(column_sums(grad_query)) / max(sum(shards.queries), 1)
            grad_query -= mean.to(wide).unsqueeze(-2)
        grad_query = grad_query.to(query.dtype)
    return grad_query, grad_key, grad_value, unary.mask().to(query.dtype) if need_mask else None


def _delta(
    grad_output: torch.Tensor, output: torch.Tensor, residual: torch.Tensor | None, offset: torch.Tensor | None
) -> torch.Tensor:
    """<dy_i, y_i - offset> (..., Nq) in float64: the pairwise term alone, about the mean that values are centred by."""
    delta = output.new_empty(output.shape[:-1], dtype=torch.float64)
    for begin, end in ranges(output.shape[-2]):
        y = output[..., begin:end, :].to(torch.float64, copy=True)
        if residual is not None:
            y += residual[..., begin:end, :]
        if offset is not None:
            y -= offset.unsqueeze(-2)
        delta[..., begin:end] = y.mul_(grad_output[..., begin:end, :]).sum(-1)
    return delta


class ShardedUnary(Function):
    """sum_j u_j v_j with j over all ranks' keys, on every rank; the loss is the sum of all ranks' losses."""

    @staticmethod
    def forward(ctx: Any, mask_logits: torch.Tensor, value: torch.Tensor, shards: Shards) -> torch.Tensor:
        pooled, lse = pool(shards, mask_logits, value)
        ctx.save_for_backward(mask_logits, value, lse)
        ctx.shards = shards
        return pooled.to(value.dtype)

    @staticmethod
    def backward(ctx: Any, grad_pooled: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_run_unary_backward(grad_pooled, *ctx.saved_tensors, ctx.shards, ctx.needs_input_grad[:2]), None


def _unary_backward(
    grad_pooled: torch.Tensor,
    mask_logits: torch.Tensor,
    value: torch.Tensor,
    lse: torch.Tensor,
    shards: Shards,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    unary = UnaryGradients(mask_logits, value, lse, shards.total(grad_pooled.double()))
    unary.set_total(shards.total(unary.sums()))
    grad_value = None
    if needs[1]:
        grad_value = empty_like_layout(value, value.shape, accumulate_type(value.dtype)).zero_()
        grad_value = unary.add_value(grad_value, 0, value.shape[-2]).to(value.dtype)
    return unary.mask().to(mask_logits.dtype) if needs[0] else None, grad_value


class ShardedMean(Function):
    """Mean of all ranks' positions, (..., n, D) to (..., D), in the accumulate type, on every rank."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shards: Shards) -> torch.Tensor:
        ctx.shards, ctx.shape, ctx.dtype = shards, x.shape, x.dtype
        return (shards.total(column_sums(x)) / sum(shards.queries)).to(accumulate_type(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad_mean: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _run_mean_backward(grad_mean, ctx.shape, ctx.dtype, ctx.shards), None


def _mean_backward(grad_mean: torch.Tensor, shape: torch.Size, dtype: torch.dtype, shards: Shards) -> torch.Tensor:
    grad = shards.total(grad_mean.double()) / sum(shards.queries)
    return grad.to(dtype).unsqueeze(-2).expand(shape)


_MISSING = "second derivatives of attention over sharded positions"
_run_backward, _run_unary_backward = last_derivative(_backward, _MISSING), last_derivative(_unary_backward, _MISSING)
_run_mean_backward = last_derivative(_mean_backward, _MISSING)
