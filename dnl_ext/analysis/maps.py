"""Maps to look at: the rows of chosen queries in the spatial shape of the keys. A few rows, never the N x N map."""

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..modules import AttentionInputs
from ..types import Joint
from .blocks import block_inputs
from .terms import split_images


class AttentionMaps(NamedTuple):
    """Attention weights of chosen queries over the key positions, each map of sum 1, float32 or float64 on the CPU.

    Attributes:
        joint: how the block joins its terms, "product", "sum", "pairwise" or "unary"; :class:`Terms` says what the maps
            then are.
        pairwise: tensor ``(queries, *key_shape)``; None where the block has no such map.
        unary: tensor ``(*key_shape)``, which all queries share; None where the block has no such map.
        total: tensor ``(queries, *key_shape)``, what the block applies; None where a learned gain is negative.

    Example:
        >>> import torch
        >>> from dnl_ext import DisentangledNonLocal2d
        >>> from dnl_ext.analysis import attention_rows
        >>> maps = attention_rows(DisentangledNonLocal2d(8), torch.randn(1, 8, 5, 6), [(0, 0)])
        >>> maps.joint, maps.unary.shape, maps.positions
        ('sum', torch.Size([5, 6]), 30)
    """

    joint: Joint
    pairwise: torch.Tensor | None
    unary: torch.Tensor | None
    total: torch.Tensor | None

    @property
    def positions(self) -> int:
        """Number of key positions."""
        first = self.unary if self.pairwise is None else self.pairwise[0]
        assert first is not None  # every block has one of the two
        return first.numel()

    @property
    def own(self) -> torch.Tensor | None:
        """Where a query looks by itself, which is the pairwise map of a sum and all there is of any other block."""
        return self.pairwise if self.joint == "sum" else self.total


@torch.no_grad()
def attention_rows(block: nn.Module, features: torch.Tensor, queries: Sequence[Sequence[int]]) -> AttentionMaps:
    """Where chosen positions look: the attention weights of a few queries, never the whole N x N map.

    Args:
        block: any block that :func:`dnl_ext.analysis.block_inputs` knows.
        features: its input, tensor ``(1, C, *spatial)``.
        queries: positions on the spatial grid, each a tuple of as many numbers.

    Returns:
        :class:`AttentionMaps`.

    Raises:
        ValueError: ``features`` holds more than one image or head, there is no query, or one lies outside of it.
        TypeError: a query is not of integers.
        NotAttention: see :func:`dnl_ext.analysis.block_inputs`.

    Example:
        >>> import torch
        >>> from dnl_ext import NonLocal2d
        >>> from dnl_ext.analysis import attention_rows
        >>> maps = attention_rows(NonLocal2d(8), torch.randn(1, 8, 5, 6), [(0, 0), (4, 5)])
        >>> maps.total.shape  # two queries, each with a weight for each of 5 x 6 keys
        torch.Size([2, 5, 6])
    """
    if features.shape[0] != 1:
        raise ValueError(f"features: expected one image, got {features.shape[0]}")
    shape = tuple(features.shape[2:])
    if not len(queries):
        raise ValueError("queries: expected at least one position")
    try:
        queries = [tuple(map(operator.index, query)) for query in queries]
    except TypeError:
        raise TypeError(f"queries: expected positions of integers, got {queries!r}") from None
    for query in queries:
        if len(query) != len(shape) or not all(0 <= place < size for place, size in zip(query, shape, strict=True)):
            raise ValueError(f"queries: expected positions on {' x '.join(map(str, shape))}, got {query}")
    inputs = block_inputs(block, features)
    with torch.autocast(features.device.type, enabled=False):  # the inputs are what it made them; the rows are not
        return _rows(inputs, queries, shape)


def _rows(inputs: AttentionInputs, queries: Sequence[Sequence[int]], shape: Sequence[int]) -> AttentionMaps:
    images = list(split_images(inputs))
    if len(images) != 1:
        raise ValueError(f"block: expected one head, got {len(images)}")
    places = torch.tensor(queries).view(-1, len(shape))
    strides = torch.tensor([1, *shape[:0:-1]]).cumprod(0).flip(0)
    rows = images[0].rows((places * strides).sum(1).to(inputs.value.device))

    def on_grid(x, *lead):
        return None if x is None else x.view(*lead, *inputs.key_shape).cpu()

    return AttentionMaps(images[0].joint, on_grid(rows.pairwise, -1), on_grid(rows.unary), on_grid(rows.total, -1))
