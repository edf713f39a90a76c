"""What the ranks of a group agree on before they compute: sizes of all shards, and the same call on every rank.

A wrong call on one rank must not leave the others waiting in a collective. So every rank tells the others whether
its own call is valid, how many positions it has, and a checksum of all that must be equal; where something is wrong,
all of them raise, and say which rank and what. That costs one all-gather of four integers; on a GPU the host waits for
it.

Sums over ranks are all-gathers, added up in the order of the ranks: every rank gets the same bits, in every run,
whatever algorithm the backend would choose for an all-reduce. They are small: means and a few numbers per batch
element.
"""

import itertools
import struct
import zlib
from collections.abc import Sequence
from typing import Any, get_args

import torch
import torch.distributed as dist

from ..types import Exchange

#: A shard is passed on in about this many blocks, so that what a rank holds of others' is a fraction of its own.
BLOCKS_PER_SHARD = 4
#: Bounds of a block, in positions: below, products no longer fill a machine; above, only memory would grow.
LEAST_BLOCK, MOST_BLOCK = 1024, 16_384
#: Where the largest shard of keys and values has at most this many bytes, they are gathered at once: a ring's messages
#: would be so small that their number, and not their size, is what they cost.
GATHER_BYTES = 2**20

EXCHANGES: tuple[Exchange, ...] = get_args(Exchange)


def is_dtensor(x: object) -> bool:
    """Whether `x` is a torch.distributed.tensor.DTensor, found out without importing that."""
    return type(x).__name__ == "DTensor" and type(x).__module__.startswith("torch.distributed.")


def process_group(group: Any, name: str = "group") -> dist.ProcessGroup:
    """The process group of what `group` may be: a ProcessGroup, a DeviceMesh of one dimension, or None for the default.

    `name` is what messages call it.

    Raises:
        TypeError: anything else.
        ValueError: a mesh of several dimensions, or a group that this process is not in.
        RuntimeError: no default group.
    """
    if not dist.is_initialized():
        raise RuntimeError(f"{name}: expected an initialised process group, call torch.distributed.init_process_group")
    if group is None:
        group = dist.group.WORLD
    if hasattr(group, "get_group") and hasattr(group, "ndim"):  # a DeviceMesh, whose import is not cheap
        if group.ndim != 1:
            raise ValueError(f"{name}: expected a DeviceMesh of one dimension, as mesh['name'] gives, got {group}")
        return group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{name}: expected a group that this process belongs to, got one that it does not")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{name}: expected a ProcessGroup, a DeviceMesh or None, got {type(group).__name__}")
    return group


class Shards:
    """The shards of one call.

    Attributes:
        group, rank, world: the process group, this process's place in it and its size.
        queries, keys: positions of every rank, lists of `world` numbers.
        exchange: ``"ring"`` or ``"gather"``.
        turns: blocks into which every shard of keys is cut, as evenly as it goes.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        sizes: Sequence[tuple[int, int]],
        exchange: Exchange | None,
        block: int | None,
        bytes_per_key: int,
    ) -> None:
        self.group, self.rank, self.world = group, dist.get_rank(group), dist.get_world_size(group)
        self.queries, self.keys = ([size[i] for size in sizes] for i in (0, 1))
        if exchange is None:
            exchange = "gather" if max(self.keys) * bytes_per_key <= GATHER_BYTES else "ring"
        self.exchange = exchange
        if block is None:
            largest = max(*self.queries, *self.keys)
            block = min(max(-(-largest // BLOCKS_PER_SHARD), LEAST_BLOCK), MOST_BLOCK)
        self.block = block
        self.turns = max(1, -(-max(self.keys) // block)) if exchange == "ring" else 1

    def key_range(self, rank: int, turn: int) -> tuple[int, int]:
        """[begin, end) of a rank's own keys in its block number `turn`."""
        return self.keys[rank] * turn // self.turns, self.keys[rank] * (turn + 1) // self.turns

    def query_ranges(self) -> list[tuple[int, int]]:
        """[begin, end) of this rank's blocks of queries."""
        count = -(-self.queries[self.rank] // self.block)
        bounds = [self.queries[self.rank] * i // max(count, 1) for i in range(count + 1)]
        return list(itertools.pairwise(bounds))

    def gathered(self, x: torch.Tensor) -> torch.Tensor:
        """x of every rank, equal shapes: (world, *x.shape)."""
        return gathered(x, self.group)

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of x over the ranks, in their order."""
        return self.gathered(x).sum(0)


def gathered(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    world = dist.get_world_size(group)
    if world == 1:
        return x.unsqueeze(0)
    out = x.new_empty((world, *x.shape))
    dist.all_gather(list(out.unbind(0)), x.contiguous(), group=group)
    return out


def agree(
    group: dist.ProcessGroup,
    device: torch.device | str,
    sizes: tuple[int, int],
    common: dict[str, Any],
    error: Exception | None,
) -> list[tuple[int, int]]:
    """Positions of every rank, once all ranks have been found to make the same call.

    Args:
        group: a process group.
        device: where the backend takes its messages.
        sizes: (Nq, Nk) of this rank.
        common: dict of what must be equal on all ranks; values have a `repr` that says all.
        error: the exception of this rank's own checks, which all ranks then raise, or None.

    Returns:
        list of (Nq, Nk).

    Raises:
        ValueError: ranks differ.
        RuntimeError: another rank's checks failed. Where there is an `error`, it is raised instead.
    """
    checksum = zlib.crc32(repr(sorted(common.items())).encode())
    mine = torch.tensor([error is None, *sizes, checksum], dtype=torch.int64, device=device)
    rows = gathered(mine, group).tolist()
    if all(row[0] for row in rows) and len({row[3] for row in rows}) == 1:
        return [(row[1], row[2]) for row in rows]
    everyone: list[Any] = [None] * len(rows)
    dist.all_gather_object(everyone, (common, None if error is None else f"{error}"), group=group)
    if error is not None:
        raise error
    for rank, (_, message) in enumerate(everyone):
        if message is not None:
            raise RuntimeError(f"rank {rank} of the group refused its shard: {message}")
    for name, value in everyone[0][0].items():
        for rank, (other, _) in enumerate(everyone):
            if other.get(name) != value:
                raise ValueError(
                    f"{name}: expected the same on all ranks, got {value!r} on 0, {other.get(name)!r} on {rank}"
                )
    raise AssertionError("ranks differ in nothing that they told each other")


def exact(number: float) -> str:
    """A float as a string that tells it from every other, for `common`."""
    return struct.pack("<d", number).hex()
