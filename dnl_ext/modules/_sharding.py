"""Blocks whose feature map is sharded over devices. The package that computes them lies above, and registers here."""

from collections.abc import Callable
from typing import Any

_shard: Callable[[Any, Any], None] | None = None


def register_sharding(shard: Callable[[Any, Any], None]) -> None:
    """From now on, `shard(block, mesh)` makes a block take and give slabs of a feature map over the ranks of `mesh`."""
    global _shard
    _shard = shard


def shard_block(block: Any, mesh: Any) -> None:
    """What the argument `mesh` of a block does.

    Raises:
        ImportError: nothing has registered, as with a torch that was built without torch.distributed.
    """
    if _shard is None:
        raise ImportError("mesh: needs dnl_ext.distributed, and that a torch with torch.distributed")
    _shard(block, mesh)
