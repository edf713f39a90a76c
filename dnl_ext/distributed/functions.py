"""The attention functions on one rank's shard of the positions: checks, agreement of all ranks, call."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from ..ops._checks import check_alike, check_tensor, parse_scale
from ..ops._common import product
from ..ops.whiten import whiten as _whiten
from ..reference import check_whiten_name
from ..types import Exchange, Mesh, Whitening
from ._attention import ShardedAttention, ShardedMean, ShardedUnary
from ._shards import EXCHANGES, Shards, agree, exact, process_group

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

#: Whitenings whose statistics are taken over all ranks here, or over one position alone.
WHITEN_NAMES: tuple[Whitening | None, ...] = ("channel", "in_nostd", "spatial", None)


def _uncompiled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`function`, which torch.compile calls as it is: it asks other ranks for what a graph would have to know."""

    @functools.wraps(function)
    def run(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        if torch.compiler.is_compiling():
            uncompiled: Any = torch.compiler.disable(function)
            return uncompiled(*args, **options)
        return function(*args, **options)

    return run


def check_positions_whiten(whiten: str | None) -> None:
    check_whiten_name(whiten)
    if whiten not in WHITEN_NAMES:
        raise ValueError(f"whiten: expected 'channel', 'spatial' or None over sharded positions, got {whiten!r}")


def _check_query_key(query: torch.Tensor, key: torch.Tensor) -> None:
    check_tensor("query", query, "(..., Nq, Dqk)")
    check_tensor("key", key, "(..., Nk, Dqk)")
    check_alike("key", key, "query", query, (*query.shape[:-2], key.shape[-2], query.shape[-1]))
    if query.shape[-1] == 0:
        raise ValueError(f"query: expected at least one channel, got shape {tuple(query.shape)}")


def _check_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask_logits: torch.Tensor | None,
    scale: float | None,
    whiten: str | None,
    exchange: Exchange | None,
    block: int | None,
) -> None:
    """What `dnl_ext.disentangled_attention` asks, except for keys, of which a shard may have none."""
    _check_query_key(query, key)
    check_tensor("value", value, "(..., Nk, Dv)")
    check_alike("value", value, "query", query, (*key.shape[:-1], value.shape[-1]))
    if mask_logits is not None:
        check_alike("mask_logits", mask_logits, "query", query, key.shape[:-1])
    scale = parse_scale(query, scale)
    if not abs(scale) < float("inf"):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    check_positions_whiten(whiten)
    if exchange is not None and exchange not in EXCHANGES:
        raise ValueError(f"exchange: expected 'ring', 'gather' or None, got {exchange!r}")
    if block is not None and (isinstance(block, bool) or not isinstance(block, int) or block < 1):
        raise ValueError(f"block: expected a positive int or None, got {block!r}")


def _gradients_wanted(*inputs: torch.Tensor | None) -> tuple[bool, ...]:
    """Which inputs want a gradient: all ranks must agree on that, since they compute gradients together."""
    return tuple(x is not None and torch.is_grad_enabled() and x.requires_grad for x in inputs)


def _agree(
    group: dist.ProcessGroup,
    like: torch.Tensor,
    check: Callable[[], None],
    describe: Callable[[], tuple[tuple[int, int], dict[str, Any]]],
) -> list[tuple[int, int]]:
    """Sizes of all shards. `check()` raises where this rank's call is wrong; `describe()` gives (sizes, common)."""
    error, sizes, common = None, (0, 0), {}
    try:
        check()
        sizes, common = describe()
    except Exception as caught:  # whatever it is, the others must hear of it
        error = caught
    return agree(group, _device(group, like), sizes, common, error)


def _device(group: dist.ProcessGroup, like: Any) -> torch.device | str:
    """Where the group's messages are: one rank's wrong argument must not lead it elsewhere."""
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return like.device if isinstance(like, torch.Tensor) else "cpu"


@_uncompiled
def disentangled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask_logits: torch.Tensor | None = None,
    *,
    group: Mesh | None = None,
    scale: float | None = None,
    whiten: Whitening | None = "channel",
    exchange: Exchange | None = None,
    block: int | None = None,
) -> torch.Tensor:
    """:func:`dnl_ext.disentangled_attention` over the positions of all ranks, for this rank's queries.

    Args:
        query: tensor (..., Nq, Dqk), this rank's queries. Nq and Nk may differ from each other and from rank to rank,
            and be 0; leading dimensions, widths, dtype, options and which inputs require a gradient are the same on
            all ranks.
        key: tensor (..., Nk, Dqk), this rank's keys.
        value: tensor (..., Nk, Dv), this rank's values.
        mask_logits: tensor (..., Nk), or None.
        group: ProcessGroup or DeviceMesh of one dimension over which positions are sharded; None is the default group.
        scale: factor of the pairwise logits; None means 1 / sqrt(Dqk).
        whiten: ``"channel"``, with the means of all ranks' positions, ``"spatial"`` or None. The others raise.
        exchange: how keys and values travel, ``"ring"`` or ``"gather"``; None gathers where no rank's keys and values
            take more than 1 MiB. See `docs/scaling.md`.
        block: positions of a shard that travel and are computed at a time; None is a quarter of the largest shard, but
            from 1024 to 16,384.

    Returns:
        Tensor (..., Nq, Dv) of the dtype and dimension order of ``query``.

    Raises:
        ValueError: on all ranks, where the ranks' calls do not fit together, or no rank has a key.
        RuntimeError: another rank's arguments were wrong (there, what :func:`dnl_ext.disentangled_attention` raises),
            or a rank did not answer in time.
        NotImplementedError: second derivatives.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from dnl_ext.distributed import disentangled_attention
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> query, key, value = torch.randn(2, 30, 8), torch.randn(2, 30, 8), torch.randn(2, 30, 16)  # this rank's
        >>> disentangled_attention(query, key, value, torch.randn(2, 30)).shape
        torch.Size([2, 30, 16])
        >>> dist.destroy_process_group()

    Source: Yin et al., ECCV 2020, equation 10; partial softmaxes are merged as in Milakov and Gimelshein, "Online
    normalizer calculation for softmax", 2018, and keys go round a ring as in Liu et al., "Ring Attention", 2023.
    """
    group = process_group(group)

    def describe():
        return (query.shape[-2], key.shape[-2]), {
            "leading dimensions": tuple(query.shape[:-2]), "dtype": query.dtype, "query channels": query.shape[-1],
            "value channels": value.shape[-1], "mask_logits": mask_logits is not None,
            "scale": exact(parse_scale(query, scale)), "whiten": whiten, "exchange": exchange, "block": block,
            "gradients wanted": _gradients_wanted(query, key, value, mask_logits),
        }  # fmt: skip

    def check():
        _check_attention(query, key, value, mask_logits, scale, whiten, exchange, block)

    sizes = _agree(group, query, check, describe)
    if not sum(keys for _, keys in sizes):
        raise ValueError("key: expected at least one key on some rank, got none on any")
    bytes_per_key = query.shape[:-2].numel() * (key.shape[-1] + value.shape[-1]) * query.dtype.itemsize
    shards = Shards(group, sizes, exchange, block, bytes_per_key)
    if whiten == "spatial":
        query, key = _whiten(query, "spatial"), _whiten(key, "spatial")
    keep = any(_gradients_wanted(query, key, value, mask_logits))
    centre = whiten in ("channel", "in_nostd")
    return ShardedAttention.apply(query, key, value, mask_logits, shards, parse_scale(query, scale), centre, keep)


def pairwise_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    """The pairwise term alone: :func:`disentangled_attention` without ``mask_logits``, same options and errors.

    Args:
        query: tensor (..., Nq, Dqk), this rank's.
        key: tensor (..., Nk, Dqk), this rank's.
        value: tensor (..., Nk, Dv), this rank's.
        options: ``group``, ``scale``, ``whiten``, ``exchange`` and ``block``.

    Returns:
        Tensor (..., Nq, Dv) of the dtype and dimension order of ``query``.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from dnl_ext.distributed import pairwise_attention
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> pairwise_attention(torch.randn(30, 8), torch.randn(20, 8), torch.randn(20, 16), whiten=None).shape
        torch.Size([30, 16])
        >>> dist.destroy_process_group()
    """
    return disentangled_attention(query, key, value, **options)


@_uncompiled
def unary_attention(mask_logits: torch.Tensor, value: torch.Tensor, *, group: Mesh | None = None) -> torch.Tensor:
    """:func:`dnl_ext.unary_attention` over the positions of all ranks: one vector, the same on every rank.

    Args:
        mask_logits: tensor (..., Nk), this rank's; Nk may differ from rank to rank and be 0.
        value: tensor (..., Nk, Dv), this rank's.
        group: as in :func:`disentangled_attention`.

    Returns:
        Tensor (..., Dv) of the dtype of ``value``.

    Errors are those of :func:`disentangled_attention`.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from dnl_ext.distributed import unary_attention
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> unary_attention(torch.zeros(4), torch.tensor([[1.0], [2.0], [3.0], [6.0]]))
        tensor([3.])
        >>> dist.destroy_process_group()
    """
    group = process_group(group)

    def check():
        check_tensor("value", value, "(..., Nk, Dv)")
        check_alike("mask_logits", mask_logits, "value", value, value.shape[:-1])

    def describe():
        return (0, value.shape[-2]), {
            "leading dimensions": tuple(value.shape[:-2]), "dtype": value.dtype, "value channels": value.shape[-1],
            "gradients wanted": _gradients_wanted(mask_logits, value),
        }  # fmt: skip

    sizes = _agree(group, value, check, describe)
    if not sum(keys for _, keys in sizes):
        raise ValueError("value: expected at least one key on some rank, got none on any")
    return ShardedUnary.apply(mask_logits, value, Shards(group, sizes, "gather", None, 0))


@_uncompiled
def shared_key_logits(query: torch.Tensor, key: torch.Tensor, *, group: Mesh | None = None) -> torch.Tensor:
    """:func:`dnl_ext.shared_key_logits` with the mean over all ranks' queries, for this rank's keys.

    Args:
        query: tensor (..., Nq, Dqk), this rank's; Nq and Nk may differ from rank to rank and be 0.
        key: tensor (..., Nk, Dqk), this rank's.
        group: as in :func:`disentangled_attention`.

    Returns:
        Tensor (..., Nk) of the dtype of ``key``.

    Errors are those of :func:`disentangled_attention`.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from dnl_ext.distributed import shared_key_logits
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> shared_key_logits(torch.tensor([[1.0, 0.0], [3.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 2.0]]))
        tensor([3., 2.])
        >>> dist.destroy_process_group()
    """
    group = process_group(group)

    def describe():
        return (query.shape[-2], key.shape[-2]), {
            "leading dimensions": tuple(query.shape[:-2]), "dtype": query.dtype, "query channels": query.shape[-1],
            "gradients wanted": _gradients_wanted(query),
        }  # fmt: skip

    sizes = _agree(group, query, lambda: _check_query_key(query, key), describe)
    if not sum(queries for queries, _ in sizes):
        raise ValueError("query: expected at least one query on some rank, got none on any")
    mean = ShardedMean.apply(query, Shards(group, sizes, "gather", None, 0))
    return product(key, mean.to(key.dtype).unsqueeze(-1)).squeeze(-1)
