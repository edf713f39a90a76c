"""Maps to look at: the rows of chosen queries in the spatial shape of the keys. A few rows, never the N x N map."""

from typing import NamedTuple

import torch

from .blocks import block_inputs
from .terms import split_images


class AttentionMaps(NamedTuple):
    """Weights over the key positions, each map of sum 1, float32 or float64 on the CPU.

    Attributes:
        joint: "product", "sum", "pairwise" or "unary", see :class:`Terms`, which also says what the maps are.
        pairwise: tensor ``(queries, *key_shape)``, None where the block has no such map.
        unary: tensor ``(*key_shape)``, or None.
        total: as ``pairwise``.
    """

    joint: str
    pairwise: torch.Tensor | None
    unary: torch.Tensor | None
    total: torch.Tensor | None

    @property
    def positions(self):
        """Number of key positions."""
        return (self.unary if self.pairwise is None else self.pairwise[0]).numel()

    @property
    def own(self):
        """Where a query looks by itself, which is the pairwise map of a sum and all there is of any other block."""
        return self.pairwise if self.joint == "sum" else self.total


@torch.no_grad()
def attention_rows(block, features, queries):
    """Where chosen positions look.

    Args:
        block: any block that :func:`block_inputs` knows.
        features: its input, tensor ``(1, C, *spatial)``.
        queries: positions on the spatial grid, each a tuple of as many numbers.

    Returns:
        :class:`AttentionMaps`.

    Raises:
        ValueError: ``features`` holds more than one image or head, or a query lies outside of it.
        NotAttention: see :func:`block_inputs`.
    """
    if features.shape[0] != 1:
        raise ValueError(f"features: expected one image, got {features.shape[0]}")
    shape = tuple(features.shape[2:])
    for query in queries:
        if len(query) != len(shape) or not all(0 <= place < size for place, size in zip(query, shape, strict=True)):
            raise ValueError(f"queries: expected positions on {' x '.join(map(str, shape))}, got {tuple(query)}")
    inputs = block_inputs(block, features)
    with torch.autocast(features.device.type, enabled=False):  # the inputs are what it made them; the rows are not
        return _rows(inputs, queries, shape)


def _rows(inputs, queries, shape):
    images = list(split_images(inputs))
    if len(images) != 1:
        raise ValueError(f"block: expected one head, got {len(images)}")
    places = torch.tensor([list(query) for query in queries]).view(-1, len(shape))
    strides = torch.tensor([1, *shape[:0:-1]]).cumprod(0).flip(0)
    rows = images[0].rows((places * strides).sum(1).to(inputs.value.device))

    def on_grid(x, *lead):
        return None if x is None else x.view(*lead, *inputs.key_shape).cpu()

    return AttentionMaps(images[0].joint, on_grid(rows.pairwise, -1), on_grid(rows.unary), on_grid(rows.total, -1))
