"""Blocks whose feature map is sharded over devices: how is known to a package above this one, which registers here."""

_shard = None


def register_sharding(shard):
    """From now on, `shard(block, mesh)` makes a block take and give slabs of a feature map over the ranks of `mesh`."""
    global _shard
    _shard = shard


def shard_block(block, mesh):
    """What the argument `mesh` of a block does.

    Raises:
        ImportError: nothing has registered, as with a torch that was built without torch.distributed.
    """
    if _shard is None:
        raise ImportError("mesh: needs dnl_ext.distributed, and that a torch with torch.distributed")
    _shard(block, mesh)
