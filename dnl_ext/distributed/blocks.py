"""Non-local blocks whose feature map is sharded by rows: each rank's input is a slab (B, C, rows, ...) of it."""

from functools import partial
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from typing_extensions import Self

from ..modules._block import BATCH_NORM_WHITEN, VARIANTS, AttentionBlock
from ..modules.context import _Pooling
from ..types import Mesh
from . import functions
from ._shards import process_group

Module = TypeVar("Module", bound=nn.Module)

#: Norms that see one position at a time, or, in training, all ranks' (SyncBatchNorm); or that raise in training.
NORMS = (nn.modules.batchnorm._BatchNorm,)


class ShardedFunctions:
    """The functions that a block calls, for slabs of a feature map over `group`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        for name in ("disentangled_attention", "pairwise_attention", "unary_attention", "shared_key_logits"):
            setattr(self, name, partial(getattr(functions, name), group=group))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a process group cannot be copied; copies of a block are sharded over the same one


def _check_block(name: str, block: AttentionBlock) -> None:
    """Raise unless the block computes the same from slabs as from the whole map."""
    terms = VARIANTS[block.variant]
    where = f"module {name!r}: " if name else ""
    if block.backend != "fused":
        raise NotImplementedError(f"{where}expected backend='fused', got {block.backend!r}")
    if terms.pairwise and block.mode not in ("embedded_gaussian", "gaussian"):
        raise NotImplementedError(f"{where}expected mode='embedded_gaussian' or 'gaussian', got {block.mode!r}")
    if block.sub_sample is not None:
        raise NotImplementedError(f"{where}expected sub_sample=None, got {block.sub_sample!r}: windows may cross slabs")
    if block.whiten in BATCH_NORM_WHITEN:
        raise NotImplementedError(f"{where}expected a whitening without running statistics, got {block.whiten!r}")
    try:
        functions.check_positions_whiten(block.whiten)
    except ValueError as error:
        raise NotImplementedError(f"{where}{error}") from None
    norm = block._out_and_norm()[1]
    if norm is not None and not isinstance(norm, NORMS):
        raise NotImplementedError(
            f"{where}expected no norm, a BatchNorm or SyncBatchNorm, got {type(norm).__name__}, whose statistics over "
            f"positions would be those of a slab"
        )


def shard_block(block: AttentionBlock, mesh: Mesh) -> None:
    """What the argument `mesh` of a block does."""
    group = process_group(mesh, "mesh")
    _check_block("", block)
    block.sharded = ShardedFunctions(group)


def shard_positions(module: Module, group: Mesh | None = None) -> Module:
    """Make the blocks in a module take slabs of a feature map that is sharded by rows over the ranks of a group.

    Afterwards each rank calls the module with its own rows, (B, C, rows, W) in two dimensions, (B, C, frames, H, W) in
    three, (B, C, length) in one, in any split, also with no rows at all, and gets its rows of the block's output. B, C
    and W are the same on all ranks. Parameters stay as they are: same values on all ranks, and gradients that are each
    rank's share, to be summed over the ranks (the loss being the sum of the ranks' losses)::

        for parameter in module.parameters():
            torch.distributed.all_reduce(parameter.grad, group=group)

    Norms: a BatchNorm is exact in evaluation and raises in training, where its statistics would be those of the slab;
    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm(module, group)`` takes them over all ranks (it runs on GPUs only). A
    norm with statistics over positions in evaluation too (GroupNorm, InstanceNorm) is refused.

    Args:
        module: a block such as :class:`dnl_ext.DisentangledNonLocal2d`, or any module with such blocks in it, for
            instance after :func:`dnl_ext.integrations.convert`. Other layers are not looked at: convolutions wider
            than one row need their neighbours' rows, which is the caller's business.
        group: ProcessGroup or 1-d DeviceMesh, None is the default group.

    Returns:
        ``module``.

    Raises:
        ValueError: there is no block in it.
        NotImplementedError: a block that mixes positions in a way that does not shard: modes without a softmax,
            ``sub_sample``, whitenings other than ``"channel"``, ``"spatial"`` and None, norms; a block of global
            context beside them, which would pool this rank's positions alone.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from dnl_ext import DisentangledNonLocal2d
        >>> from dnl_ext.distributed import shard_positions
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> block = shard_positions(DisentangledNonLocal2d(8, norm=None))
        >>> block(torch.randn(1, 8, 5, 6)).shape  # this rank's 5 rows
        torch.Size([1, 8, 5, 6])
        >>> dist.destroy_process_group()
    """
    group = process_group(group)
    blocks = [(name, block) for name, block in module.named_modules() if isinstance(block, AttentionBlock)]
    if not blocks:
        raise ValueError(f"module: expected a dnl_ext non-local block in it, got {type(module).__name__} without one")
    for name, block in blocks:
        _check_block(name, block)
    for name, block in module.named_modules():
        if isinstance(block, _Pooling):
            raise NotImplementedError(f"{name}: {type(block).__name__} would pool this rank's positions alone")
    sharded = ShardedFunctions(group)
    for _, block in blocks:
        block.sharded = sharded
    return module
