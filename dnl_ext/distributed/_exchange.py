"""How keys and values reach every rank's queries, and their gradients the way back: round a ring, or gathered at once.

Ring. A shard of keys is cut into `turns` blocks. In turn t all ranks start with block t of their own, and R times use
what they have while it travels on to the next rank; after R steps every rank has seen block t of every shard:

    step        0    1    2    3        rank r holds the block of rank (r - step) mod R
    rank 0     [0]   3    2    1   ->   gradients of block [1] go on to their owner
    rank 1     [1]   0    3    2
    rank 2     [2]   1    0    3
    rank 3     [3]   2    1    0

In the backward the sum of a block's gradients travels one step behind it, each rank adding its share, and arrives at
the owner after R steps: the order of the sum is that of the ring, so results repeat bit for bit. Two buffers of a
block, and in the backward two of its gradients, are all that a rank holds of other shards. An empty block is not sent,
which both ends know from the sizes.

Gather. Every rank gets all keys and values by one all-gather, padded to the largest shard, and gradients go back by one
all-to-all, whose parts are added in the order of the ranks. These are the same bytes in two messages, but every
rank holds all keys, values and their gradients, which only suits small ones.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from ._shards import Shards

#: Tags that tell keys from gradients on backends that match messages by tag.
KEYS, GRADIENTS = 1, 2


class Block:
    """A pair of dense tensors (..., n, widths[0]) and (..., n, widths[1]) in one buffer, to be sent as one.

    Their number of positions n may differ from use to use.
    """

    def __init__(
        self, lead: torch.Size, widths: tuple[int, int], most: int, like: torch.Tensor, dtype: torch.dtype | None = None
    ) -> None:
        self.lead, self.widths, self.count = tuple(lead), widths, lead.numel()
        self.buffer = like.new_empty(self.count * most * sum(widths), dtype=dtype)

    def flat(self, positions: int) -> torch.Tensor:
        return self.buffer[: self.count * positions * sum(self.widths)]

    def pair(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = self.widths
        split = self.count * positions * first
        flat = self.flat(positions)
        return flat[:split].view(*self.lead, positions, first), flat[split:].view(*self.lead, positions, second)


def _pass_on(shards: Shards, tag: int, outgoing: torch.Tensor, incoming: torch.Tensor) -> list[dist.Work]:
    """Start to send a flat buffer to the next rank and to receive one from the rank before; empty ones stay."""
    peers = (dist.isend, outgoing, shards.rank + 1), (dist.irecv, incoming, shards.rank - 1)
    operations = [
        dist.P2POp(operation, x, dist.get_global_rank(shards.group, peer % shards.world), shards.group, tag)
        for operation, x, peer in peers
        if x.numel()
    ]
    return dist.batch_isend_irecv(operations) if operations else []


def _wait(requests: Sequence[dist.Work]) -> None:
    for request in requests:
        request.wait()


def _length(shards: Shards, rank: int, turn: int) -> int:
    begin, end = shards.key_range(rank % shards.world, turn)
    return end - begin


def _most(shards: Shards) -> int:
    return max(_length(shards, rank, turn) for rank in range(shards.world) for turn in range(shards.turns))


def blocks(
    shards: Shards, widths: tuple[int, int], like: torch.Tensor, pack: Callable[..., None]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of all ranks, one block after the other, as pairs ((..., n, Dqk), (..., n, Dv)).

    Args:
        shards: a Shards. widths: (Dqk, Dv). like: a tensor (..., n, any) with the leading dimensions, dtype and device.
        pack: function (begin, end, key, value) that fills the pair with this rank's own positions from begin to end.
    """
    if shards.exchange == "gather":
        yield _gather(shards, widths, like, pack)
        return
    for arrival in _ring(shards, widths, like, pack):
        if arrival.length:
            yield arrival.pair


class Arrival(NamedTuple):
    """A block of keys and values that has come round the ring.

    Attributes:
        turn: number of the block in its owner's shard.
        step: number of times it was passed on; its owner is that many ranks back.
        length: its positions.
        coming: positions of the block that arrives next.
        pair: keys (..., length, Dqk) and values (..., length, Dv).
    """

    turn: int
    step: int
    length: int
    coming: int
    pair: tuple[torch.Tensor, torch.Tensor]


def _ring(shards: Shards, widths: tuple[int, int], like: torch.Tensor, pack: Callable[..., None]) -> Iterator[Arrival]:
    """Every rank's blocks, each sent on to the next rank while it is worked on here; arguments as in `blocks`."""
    here, there = (Block(like.shape[:-2], widths, _most(shards), like) for _ in range(2))
    for turn in range(shards.turns):
        pack(*shards.key_range(shards.rank, turn), *here.pair(_length(shards, shards.rank, turn)))
        for step in range(shards.world):
            owner = shards.rank - step
            length, coming = (_length(shards, rank, turn) for rank in (owner, owner - 1))
            last = step == shards.world - 1
            requests = [] if last else _pass_on(shards, KEYS, here.flat(length), there.flat(coming))
            yield Arrival(turn, step, length, coming, here.pair(length))
            _wait(requests)
            here, there = there, here


def blocks_and_back(
    shards: Shards,
    widths: tuple[int, int],
    grad_widths: tuple[int, int],
    like: torch.Tensor,
    dtype: torch.dtype,
    pack: Callable[..., None],
    work: Callable[[torch.Tensor, torch.Tensor], Sequence[torch.Tensor] | None],
    deliver: Callable[..., None],
) -> None:
    """The same, and the sums over ranks of a pair of gradients of every block back to the block's owner.

    Args:
        shards, widths, like, pack: as in `blocks`.
        grad_widths: widths of the pair of gradients, 0 for one that is not wanted. dtype: the type of their sums.
        work: function (key, value) that returns this rank's share, a pair ((..., n, *), (..., n, *)), or None for zero.
        deliver: function (begin, end, *gradients) that takes the sums for this rank's positions from begin to end.
    """
    if shards.exchange == "gather":
        return _gather_and_back(shards, widths, grad_widths, like, dtype, pack, work, deliver)
    sums, coming_sums = (Block(like.shape[:-2], grad_widths, _most(shards), like, dtype) for _ in range(2))
    arriving = []
    for turn, step, length, coming, pair in _ring(shards, widths, like, pack):
        share = work(*pair) if length else None
        _wait(arriving)
        if step == 0:
            sums.flat(length).zero_()
        if share is not None:
            for total, part in zip(sums.pair(length), share, strict=True):
                total.add_(part)
        if shards.world > 1:
            arriving = _pass_on(shards, GRADIENTS, sums.flat(length), coming_sums.flat(coming))
            sums, coming_sums = coming_sums, sums
        if step == shards.world - 1:
            _wait(arriving)
            arriving = []
            deliver(*shards.key_range(shards.rank, turn), *sums.pair(_length(shards, shards.rank, turn)))


def _gather(
    shards: Shards, widths: tuple[int, int], like: torch.Tensor, pack: Callable[..., None]
) -> tuple[torch.Tensor, torch.Tensor]:
    block = Block(like.shape[:-2], widths, max(shards.keys), like)
    pack(0, shards.keys[shards.rank], *block.pair(shards.keys[shards.rank]))
    pairs = []
    for length, buffer in zip(shards.keys, shards.gathered(block.buffer), strict=True):
        block.buffer = buffer
        pairs.append(block.pair(length))
    keys, values = zip(*pairs, strict=True)
    return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)


def _gather_and_back(
    shards: Shards,
    widths: tuple[int, int],
    grad_widths: tuple[int, int],
    like: torch.Tensor,
    dtype: torch.dtype,
    pack: Callable[..., None],
    work: Callable[[torch.Tensor, torch.Tensor], Sequence[torch.Tensor] | None],
    deliver: Callable[..., None],
) -> None:
    lead = like.shape[:-2]
    share = work(*_gather(shards, widths, like, pack))
    per_key = lead.numel() * sum(grad_widths)
    outgoing = like.new_zeros(per_key * sum(shards.keys), dtype=dtype)
    mine = shards.keys[shards.rank]
    if share is not None:
        parts = zip(outgoing.split([per_key * n for n in shards.keys]), shards.keys, strict=True)
        begin = 0
        for buffer, length in parts:
            block = Block(lead, grad_widths, 0, like, dtype)
            block.buffer = buffer
            for to, part in zip(block.pair(length), share, strict=True):
                to.copy_(part[..., begin : begin + length, :])
            begin += length
    incoming = outgoing.new_empty(shards.world * per_key * mine)
    if shards.world > 1:
        splits = [per_key * mine] * shards.world, [per_key * n for n in shards.keys]
        dist.all_to_all_single(incoming, outgoing, *splits, group=shards.group)
    else:
        incoming = outgoing
    total = Block(lead, grad_widths, 0, like, dtype)
    total.buffer = incoming.view(shards.world, -1).sum(0)
    deliver(0, mine, *total.pair(mine))
