"""What `torch.utils.flop_counter.FlopCounterMode` counts for each operator: its products, at 2 for a multiply-add.

As in torch's own formulas, sums, means, exponentials and everything else that is linear in the map or the inputs count
nothing, and a product that is computed again in the backward counts again: the backward computes S = q k^T again, since
the forward keeps no map. Eager PyTorch therefore counts one product less in a backward through q or k, and what is
common to both is equal. A gradient that nobody wants costs nothing.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch.utils.flop_counter import register_flop_formula

from . import double_backward as _registers_the_operator  # noqa: F401
from ._common import ops

_Shape = Sequence[int]


def _products(query_shape: _Shape, key_shape: _Shape, value_shape: _Shape) -> tuple[int, int]:
    """Cost of a product of the map with something as wide as the query, and as wide as the value."""
    pairs = 2 * math.prod(query_shape[:-1]) * key_shape[-2]
    return pairs * query_shape[-1], pairs * value_shape[-1]


def _pooling(value_shape: _Shape, mask_shape: _Shape | None) -> int:
    """Cost of sum_j u_j v_j, or of all <dy, v_j>; nothing without a unary term."""
    return 0 if mask_shape is None else 2 * math.prod(value_shape)


@register_flop_formula(ops.pairwise_forward)
def pairwise_forward(
    query: _Shape, key: _Shape, value: _Shape, mask_logits: _Shape | None, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    """S, P v, and the pooling."""
    by_query, by_value = _products(query, key, value)
    return by_query + by_value + _pooling(value, mask_logits)


@register_flop_formula(ops.pairwise_backward)
def pairwise_backward(
    grad: _Shape | None,
    query: _Shape,
    key: _Shape,
    value: _Shape,
    mask_logits: _Shape | None,
    *rest: Any,
    out_shape: Any = None,
    **_: Any,
) -> int:
    """S; dP = dy v^T where dq or dk is wanted; dS k, dS^T q, P^T dy; u G and <G, v_j> of the unary term."""
    need_query, need_key, need_value, need_mask = rest[-4:]
    by_query, by_value = _products(query, key, value)
    through_map = need_query or need_key
    total = by_query * ((through_map or need_value) + need_query + need_key) + by_value * (through_map + need_value)
    return total + _pooling(value, mask_logits) * (need_value + need_mask)


@register_flop_formula(ops.pairwise_part_forward)
def pairwise_part_forward(query: _Shape, key: _Shape, value: _Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """S and P v, over the keys of the part."""
    return pairwise_forward(query, key, value, None)


@register_flop_formula(ops.pairwise_part_backward)
def pairwise_part_backward(
    grad: _Shape | None,
    query: _Shape,
    key: _Shape,
    value: _Shape,
    stats: _Shape,
    delta: _Shape,
    scale: float,
    *needs: bool,
    out_shape: Any = None,
    **_: Any,
) -> int:
    """As the backward of whole rows, without a unary term."""
    return pairwise_backward(grad, query, key, value, None, *needs, False)


@register_flop_formula(ops.pairwise_double_backward)
def pairwise_double_backward(
    grad: _Shape | None,
    query: _Shape,
    key: _Shape,
    value: _Shape,
    mask_logits: _Shape | None,
    tq: _Shape | None,
    tk: _Shape | None,
    tv: _Shape | None,
    tm: _Shape | None,
    scale: float,
    whiten: str | None,
    *needs: bool,
    out_shape: Any = None,
    **_: Any,
) -> int:
    """The products of `_add_block` and of `unary_double_backward` in double_backward.py, whose names these are."""
    output, dq, dk, dv = needs[:4]
    by_query, by_value = _products(query, key, value)
    e, values = tq is not None or tk is not None, tv is not None
    total = 0
    if any(needs[:4]) and (e or values):
        logits = dq or dk
        total += by_query * (1 + (tq is not None) + (tk is not None))  # S, S.
        total += by_value * (output * (e + values) + (dv and e))  # P. v, P tv; P.^T dy
        total += by_value * logits * (e + values)  # A, A.
        total += by_query * (dq * (1 + (tk is not None)) + dk * (1 + (tq is not None)))
    pooled = (1 + values) * (1 if grad is None else 2)  # of v and tv; with dy, <dy, v_j> and <dy, tv_j> too
    return total + _pooling(value, mask_logits) * pooled


@register_flop_formula(ops.unary_forward)
def unary_forward(mask_logits: _Shape | None, value: _Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """sum_j u_j v_j."""
    return _pooling(value, mask_logits)


@register_flop_formula(ops.unary_backward)
def unary_backward(
    grad: _Shape | None,
    mask_logits: _Shape,
    value: _Shape,
    pooled: _Shape,
    lse: _Shape,
    need_mask: bool,
    need_value: bool,
    *_: Any,
    out_shape: Any = None,
    **__: Any,
) -> int:
    """<dy, v_j>, u_j dy."""
    return _pooling(value, mask_logits) * (need_mask + need_value)


@register_flop_formula([ops.softmax, ops.softmax_backward, ops.mean_subtract, ops.whiten_forward, ops.whiten_backward])
def no_products(*_: Any, out_shape: Any = None, **__: Any) -> int:
    return 0
