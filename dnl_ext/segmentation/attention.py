"""Attention maps of a block for chosen queries, and how well they keep to the query's class.

Rows are computed for the queries asked for only: a few rows of the N x N map, never the map.
"""

from typing import NamedTuple

import torch

from .. import reference
from ..modules._block import BATCH_NORM_WHITEN, VARIANTS
from .metrics import IGNORE
from .network import STRIDE


class AttentionRows(NamedTuple):
    """Attention weights over positions (h, w) of the keys; each map sums to 1.

    pairwise: float32 tensor (queries, h, w). unary: float32 tensor (h, w), None for a block without the unary term.
    """

    pairwise: torch.Tensor
    unary: torch.Tensor | None


@torch.no_grad()
def attention_rows(block, features, queries):
    """Where chosen positions look.

    Args:
        block: a ``DisentangledNonLocal2d``.
        features: its input, tensor (1, C, H, W).
        queries: (row, column) positions on the H x W grid.

    Returns:
        An :class:`AttentionRows`.

    Raises:
        ValueError: ``features`` holds more than one image, a query lies outside of it, or the block has no rows.
    """
    if features.shape[0] != 1:
        raise ValueError(f"features: expected one image, got {features.shape[0]}")
    height, width = features.shape[2:]
    for row, column in queries:
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"queries: expected positions on {height} x {width}, got ({row}, {column})")
    if not VARIANTS[block.variant].pairwise or block.mode not in ("embedded_gaussian", "gaussian"):
        raise ValueError(f"block: expected one whose pairwise term is a softmax, got {block.variant}, {block.mode}")
    query, key, _, mask = block._embed(features)
    sub_sampled = block.sub_sample is not None
    grid = block.pool(features[:, :1]).shape[2:] if sub_sampled else features.shape[2:]
    whiten = None if block.whiten in BATCH_NORM_WHITEN else block.whiten
    # Means are over all queries of the image, not over those that were chosen.
    query, key = (reference.whiten(x.float(), whiten)[0] for x in (query, key))  # (positions, C')
    chosen = torch.tensor([row * width + column for row, column in queries], device=query.device)
    pairwise = reference.pairwise_softmax(query[chosen], key, scale=block._scale(), whiten=None)
    unary = None if mask is None else reference.unary_softmax(mask[0].float()).view(grid).cpu()
    return AttentionRows(pairwise.view(-1, *grid).cpu(), unary)


def token_labels(label):
    """Class of the pixel in the middle of each token: label (H, W) to (H / 8, W / 8), sides rounded up."""
    rows, columns = (
        (torch.arange(-(-side // STRIDE)) * STRIDE + STRIDE // 2).clamp(max=side - 1) for side in label.shape
    )
    return label[rows[:, None], columns[None]]


class Focus(NamedTuple):
    """Means over queries.

    same_class: share of a query's attention that lies on tokens of its own class.
    uniform: the same for attention spread evenly, which is the class's share of the image.
    variety: total variation distance between a query's map and the mean map, 0 .. 1; 0 means that all queries of an
        image look at the same places.
    images: how many images were looked at.
    """

    same_class: float
    uniform: float
    variety: float
    images: int


def focus(trainer, queries=128, images=4):
    """How a trained block's pairwise maps relate to the classes, over the first validation images.

    This is a measure of ours, not the paper's (whose definition is not public).

    Args:
        trainer: a :class:`trainer.Trainer` whose network has a block.
        queries: random queries per image.
        images: how many images, at most; each costs a forward pass at full size.

    Returns:
        A :class:`Focus`.
    """
    network, totals, count = trainer.network.eval(), torch.zeros(3, dtype=torch.float64), 0
    for index in range(min(images, trainer.data.validation_size)):
        image, label = trainer.data.validation_sample(index)
        labels = token_labels(label)
        generator = torch.Generator().manual_seed(index)
        places = (labels != IGNORE).nonzero()
        places = places[torch.randint(len(places), (queries,), generator=generator)].tolist()
        with torch.no_grad():
            features = network.features(image[None].to(trainer.device))
        maps = attention_rows(network.block, features, places).pairwise.flatten(1)
        own = torch.tensor([labels[row, column] for row, column in places])
        same = (own[:, None] == labels.flatten()[None]).float()
        variety = (maps - maps.mean(0)).abs().sum(1).mean() / 2
        totals += torch.stack([(maps * same).sum(1).mean(), same.mean(), variety]).double()
        count += 1
    return Focus(*(totals / count).tolist(), images=count)
