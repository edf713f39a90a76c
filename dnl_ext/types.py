"""Names of options, as types for a type checker. ``typing.get_args(Variant)`` is the tuple of a type's names."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import nn

__all__ = [
    "Backend",
    "BlockWhitening",
    "Exchange",
    "FusionType",
    "Joint",
    "Mesh",
    "Mode",
    "Norm",
    "PoolingType",
    "Style",
    "SubSample",
    "Variant",
    "Whitening",
]

#: Whitenings of query and key, see :func:`dnl_ext.whiten`. ``csrc/ops/whiten/whiten.h`` has the same list.
Whitening: TypeAlias = Literal["channel", "in_nostd", "spatial", "ln_nostd", "fln_nostd", "in", "ln", "fln"]
#: Whitenings of a block, which has layers for two more, batch norms of query and key without and with weights.
BlockWhitening: TypeAlias = Whitening | Literal["bn", "bn_affine"]
#: Which terms a block has, see :class:`dnl_ext.DisentangledNonLocal2d`.
Variant: TypeAlias = Literal["nl", "pairwise", "unary", "dnl_shared_key", "dnl"]
#: How a pairwise term weighs the values. The first two are softmaxes.
Mode: TypeAlias = Literal["embedded_gaussian", "gaussian", "dot_product", "concatenation"]
#: Who computes the attention, the operators of this library or plain PyTorch, which holds the N x N map.
Backend: TypeAlias = Literal["fused", "reference"]
#: Whose names a block's layers have, and whose initialisation.
Style: TypeAlias = Literal["plain", "official", "mmseg"]
#: Where a block max-pools keys and values, before or after their convolutions.
SubSample: TypeAlias = Literal["before", "after"]
#: How :class:`dnl_ext.GlobalContext2d` pools, by attention weights or evenly.
PoolingType: TypeAlias = Literal["att", "avg"]
#: How :class:`dnl_ext.GlobalContext2d` puts the pooled vector into its input.
FusionType: TypeAlias = Literal["channel_add", "channel_mul"]
#: How a block joins its pairwise and unary terms, see :class:`dnl_ext.analysis.Terms`.
Joint: TypeAlias = Literal["product", "sum", "pairwise", "unary"]
#: What becomes the norm behind a block's out-projection, which is a batch norm, what a callable makes of the number of
#: channels, such as ``functools.partial(nn.GroupNorm, 32)``, or none.
Norm: TypeAlias = Literal["batch"] | Callable[[int], nn.Module] | None
#: How keys and values travel between processes, see :mod:`dnl_ext.distributed`.
Exchange: TypeAlias = Literal["ring", "gather"]

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    Mesh: TypeAlias = DeviceMesh | ProcessGroup
else:  # a torch without torch.distributed has neither
    #: The processes over which positions are sharded, a DeviceMesh of one dimension or a ProcessGroup.
    Mesh = Any
