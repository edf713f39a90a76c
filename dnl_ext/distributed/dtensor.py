"""DTensors: how the operators act on them, registered when this module is imported.

The first DTensor that a function of :mod:`dnl_ext` sees imports it (dnl_ext/ops/_handlers.py); whoever calls
``torch.ops.dnl_ext.*`` on DTensors imports it. `import dnl_ext` alone does not load torch.distributed.tensor, which
takes seconds.

- Sharded over leading dimensions (batch, heads): every operator acts on each shard, forward and backward, no messages.
- Sharded over positions: `disentangled_attention` and `pairwise_attention` go to dnl_ext.distributed.functions, over
  the mesh dimension that shards them; the other functions gather positions first.
- Sharded over channels, or Partial: gathered, or summed, first.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

from ..ops._common import empty_like_layout, ops
from ..types import Whitening
from . import functions
from ._shards import is_dtensor


def _all_but(trailing: int) -> Callable[..., Iterable[int]]:
    """Every leading dimension of an operator whose first tensor has `trailing` dimensions of its own."""
    return lambda first, *_: range(first.ndim - trailing)


def _whitened(*arguments: Any) -> Iterable[int]:
    first, name, apart = arguments[0], *arguments[-3:-1]
    return range(apart if name in ("fln", "fln_nostd") else first.ndim - 2)


#: Operator: the dimensions, as a function of its arguments, over which it is the same computation many times.
SHARED_DIMS: dict[str, Callable[..., Iterable[int]]] = {
    "mean_subtract": lambda x, dim: [i for i in range(x.ndim) if i != dim % x.ndim],
    "whiten_forward": _whitened,
    "whiten_backward": _whitened,
    "softmax": _all_but(1),
    "softmax_backward": _all_but(1),
    "unary_forward": _all_but(1),  # mask_logits (..., Nk)
    "unary_backward": _all_but(1),  # grad_pooled (..., Dv)
    "pairwise_forward": _all_but(2),
    "pairwise_backward": _all_but(2),
    "pairwise_double_backward": lambda _, query, *__: range(query.ndim - 2),  # grad_output may be None
}


def _rule(shared_dims: Callable[..., Iterable[int]], results: int) -> Callable[..., Any]:
    def rule(*arguments):
        def placements(placement):
            return [placement] * results, [placement if hasattr(x, "placements") else None for x in arguments]

        return [placements(Replicate()), *(placements(Shard(dim)) for dim in shared_dims(*arguments))]

    return rule


def _register() -> None:
    propagator = DTensor._op_dispatcher.sharding_propagator
    for name, shared_dims in SHARED_DIMS.items():
        overload = getattr(ops, name).default
        schema = overload._schema
        register_sharding(overload)(_rule(shared_dims, len(schema.returns)))
        # register_sharding leaves floats, strings and flags out of the key under which it remembers what it found; here
        # they decide over shapes.
        static = next((i for i, x in enumerate(schema.arguments) if "Tensor" not in str(x.type)), 100)
        info = RuntimeSchemaInfo(static, needs_pytree=True)
        propagator.register_op_strategy(overload, propagator.op_strategy_funcs[overload], info)


def disentangled_attention(
    query: Any,
    key: Any,
    value: Any,
    mask_logits: Any,
    scale: float,
    whiten: Whitening | None,
) -> torch.Tensor | None:
    """:func:`dnl_ext.disentangled_attention` of DTensors of which one is sharded over positions; None if none is.

    Raises:
        TypeError: a plain tensor beside a DTensor.
        ValueError: different meshes, or positions over several dimensions of one.
    """
    inputs = [("query", query, -2), ("key", key, -2), ("value", value, -2), ("mask_logits", mask_logits, -1)]
    inputs = [(name, x, dim % x.dim()) for name, x, dim in inputs if x is not None]
    sharding = {
        i for _, x, dim in inputs if is_dtensor(x) for i, place in enumerate(x.placements) if place.is_shard(dim)
    }
    if not sharding:
        return None
    for name, x, _ in inputs:
        if not is_dtensor(x):
            raise TypeError(f"{name}: expected a DTensor beside others, got {type(x).__name__}")
        if x.device_mesh != query.device_mesh:
            raise ValueError(f"{name}: expected the mesh of query ({query.device_mesh}), got {x.device_mesh}")
    if len(sharding) > 1:
        raise ValueError(
            f"query, key, value: expected positions sharded over one mesh dimension, got {sorted(sharding)}"
        )
    (over,) = sharding
    mesh, lead = query.device_mesh, query.dim() - 2

    def placements(positions):
        keep = [place if place.is_shard() and place.dim < lead else Replicate() for place in query.placements]
        return [Shard(positions) if i == over else place for i, place in enumerate(keep)]

    local = [x.redistribute(placements=placements(dim)).to_local() for _, x, dim in inputs]
    output = functions.disentangled_attention(*local, group=mesh.get_group(over), scale=scale, whiten=whiten)
    shape = torch.Size((*query.shape[:-1], value.shape[-1]))
    stride = empty_like_layout(torch.empty_strided(query.shape, query.stride(), device="meta"), shape).stride()
    return DTensor.from_local(output, mesh, placements(lead), run_check=False, shape=shape, stride=stride)


_register()
