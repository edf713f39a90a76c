"""From a block to its attention: any module with ``attention_inputs(x)``, or a known kind of plain-PyTorch block.

The blocks of this library have the method. Blocks of other code are known by the names of their convolutions, one line
of ``KINDS`` each; to teach it another kind, give your module the method or append a line.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from ..modules import AttentionInputs
from ..types import Whitening


class NotAttention(TypeError):
    """Raised for a module that is no non-local block, or one without a softmax over positions.

    Example:
        >>> import torch
        >>> from dnl_ext import NonLocal2d
        >>> from dnl_ext.analysis import NotAttention, block_inputs
        >>> try:
        ...     block_inputs(torch.nn.Linear(2, 2), torch.zeros(1, 2))
        ... except NotAttention as error:
        ...     print(str(error)[:37])
        block: expected attention_inputs(x) o
    """


def spatial_inputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float,
    whiten: Whitening | None,
    gain: torch.Tensor | float = 1.0,
    whitened: bool = False,
) -> AttentionInputs:
    """:class:`AttentionInputs` from channel-first tensors (B, channels, *shape); the mask has one channel."""

    def positions(x):
        return x.flatten(2).transpose(1, 2)

    return AttentionInputs(
        positions(query), positions(key), positions(value), None if mask is None else mask.flatten(1),
        scale=scale, whiten=whiten, gain=gain, query_shape=tuple(query.shape[2:]), key_shape=tuple(key.shape[2:]),
        whitened=whitened,
    )  # fmt: skip


def mmseg_inputs(block: Any, x: torch.Tensor) -> AttentionInputs:
    """mmcv's NonLocal1d/2d/3d (no mask, no whitening) and mmsegmentation's DisentangledNonLocal2d (both).

    Reads ``theta``, ``phi``, ``g``, ``conv_mask`` and the attributes ``mode``, ``use_scale``, ``temperature``.
    """
    mode = getattr(block, "mode", "embedded_gaussian")
    if mode != "embedded_gaussian":
        raise NotAttention(f"block: expected mode 'embedded_gaussian', a softmax of theta and phi, got {mode!r}")
    query, key, value = block.theta(x), block.phi(x), block.g(x)
    mask = block.conv_mask(x) if getattr(block, "conv_mask", None) is not None else None
    if mask is not None and mask.shape[2:] != key.shape[2:]:
        raise NotAttention(f"block: its mask has shape {tuple(mask.shape[2:])}, its keys {tuple(key.shape[2:])}")
    scale = 1 / math.sqrt(query.shape[1]) if getattr(block, "use_scale", True) else 1.0
    scale /= getattr(block, "temperature", 1.0)
    return spatial_inputs(query, key, value, mask, scale=scale, whiten=None if mask is None else "channel")


#: The paper's code: its names of whitening that are layers, by the statistics of a batch.
OFFICIAL_NORMS = ("bn", "bn_affine")


def official_inputs(block: Any, x: torch.Tensor) -> AttentionInputs:
    """The paper's NonLocal2d_bn and NonLocal2dGc.

    Reads ``conv_query``, ``conv_key``, ``conv_value``, ``conv_mask``, ``downsample``, ``gamma`` and the attributes
    ``whiten_type`` (a name or a list of at most one), ``temperature``, ``scale``, ``with_unary``.
    """
    source = x if getattr(block, "downsample", None) is None else block.downsample(x)
    query, key, value = block.conv_query(x), block.conv_key(source), block.conv_value(source)
    mask = block.conv_mask(source) if getattr(block, "conv_mask", None) is not None else None
    if mask is None and getattr(block, "with_unary", False):
        mean = query.mean(tuple(range(2, query.dim())), keepdim=True)
        mask = (mean * key).sum(1, keepdim=True)
    names = getattr(block, "whiten_type", "channel")
    names = [names] if isinstance(names, str) else list(names or ())
    if len(names) > 1:
        raise NotAttention(f"block: expected at most one whiten_type, got {names}")
    whiten: Any = names[0] if names else None
    by_layers = whiten in OFFICIAL_NORMS
    if by_layers:
        query = getattr(block, f"query_{whiten}")(query.flatten(2)).view_as(query)
        key, whiten = getattr(block, f"key_{whiten}")(key.flatten(2)).view_as(key), None
    scale = 1 / (float(getattr(block, "scale", math.sqrt(query.shape[1]))) * getattr(block, "temperature", 1.0))
    gain = getattr(block, "gamma", 1.0)
    return spatial_inputs(query, key, value, mask, scale=scale, whiten=whiten, gain=gain, whitened=by_layers)


#: Names that a module's attributes must have -> its adapter (block, x) -> AttentionInputs.
KINDS = (
    (("theta", "phi", "g"), mmseg_inputs),
    (("conv_query", "conv_key", "conv_value"), official_inputs),
)


def adapter(module: nn.Module) -> Callable[[torch.Tensor], AttentionInputs] | None:
    """The function x -> AttentionInputs of a block, or None for a module that is no block."""
    own = getattr(module, "attention_inputs", None)
    if callable(own):
        return cast("Callable[[torch.Tensor], AttentionInputs]", own)
    for names, function in KINDS:
        if all(isinstance(getattr(module, name, None), torch.nn.Module) for name in names):
            return lambda x: function(module, x)
    return None


def block_inputs(block: nn.Module, x: torch.Tensor) -> AttentionInputs:
    """What a block's attention receives for an input.

    Args:
        block: a block of this library, any module with a method ``attention_inputs``, or one whose convolutions have
            the names of mmcv's, mmsegmentation's or the paper's blocks (``KINDS``).
        x: the input of the block, tensor ``(B, C, *spatial)``.

    Returns:
        :class:`dnl_ext.modules.AttentionInputs`.

    Raises:
        NotAttention: the module is no such block, or one without a softmax over positions.

    Example:
        >>> import torch
        >>> from dnl_ext import DisentangledNonLocal2d
        >>> from dnl_ext.analysis import block_inputs
        >>> inputs = block_inputs(DisentangledNonLocal2d(8), torch.randn(1, 8, 5, 6))
        >>> inputs.key.shape, inputs.mask_logits.shape, inputs.whiten
        (torch.Size([1, 30, 4]), torch.Size([1, 30]), 'channel')
    """
    function = adapter(block)
    if function is None:
        kinds = " or ".join(", ".join(names) for names, _ in KINDS)
        raise NotAttention(f"block: expected attention_inputs(x) or the layers {kinds}; got a {type(block).__name__}")
    return function(x)
