"""Attention over a part of the keys: what :mod:`dnl_ext.distributed` is made of. Not a public function.

``torch.ops.dnl_ext.pairwise_part_forward(query, key, value, scale, save_residual)`` gives, for keys that are some of
those that a row of P sums over, the softmax over these alone: output (..., Nq, Dv), softmax_stats (..., Nq, 2) in the
accumulate type, residual as in ``pairwise_forward``. ``pairwise_part_backward(grad_output, query, key, value,
softmax_stats, delta, scale, need_query, need_key, need_value)`` takes the statistics of whole rows and Delta_i =
<dy_i, y_i> (..., Nq) with whole rows' y, and gives this part's share of the gradients. Neither centres anything: sums
over a part of a row of dS are not zero, so a caller who centres must do it with means over everything.
"""

import torch

from ._checks import check_alike, check_pairwise, check_saved
from ._common import accumulate_type, empty_like_layout, ops, register_batching


@torch.library.register_fake("dnl_ext::pairwise_part_forward")
def allocate_pairwise_part_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, save_residual: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_pairwise(query, key, value, None, scale, None)
    output = empty_like_layout(query, (*query.shape[:-1], value.shape[-1]))
    stats = query.new_empty((*query.shape[:-1], 2), dtype=accumulate_type(query.dtype))
    if save_residual and query.dtype.itemsize == 2:
        return output, stats, empty_like_layout(query, output.shape)
    return output, stats, query.new_empty((*query.shape[:-2], 0))


@torch.library.register_fake("dnl_ext::pairwise_part_backward")
def allocate_pairwise_part_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    softmax_stats: torch.Tensor,
    delta: torch.Tensor,
    scale: float,
    need_query: bool,
    need_key: bool,
    need_value: bool,
) -> tuple[torch.Tensor, ...]:
    check_pairwise(query, key, value, None, scale, None)
    check_alike("grad_output", grad_output, "query", query, (*query.shape[:-1], value.shape[-1]))
    check_saved("softmax_stats", softmax_stats, "query", query, (*query.shape[:-1], 2))
    check_saved("delta", delta, "query", query, query.shape[:-1])
    return tuple(
        empty_like_layout(x, x.shape) if need else query.new_empty((*query.shape[:-2], 0))
        for x, need in ((query, need_query), (key, need_key), (value, need_value))
    )


register_batching("dnl_ext::pairwise_part_forward")(ops.pairwise_part_forward)
register_batching("dnl_ext::pairwise_part_backward")(ops.pairwise_part_backward)
