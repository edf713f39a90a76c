"""The attention picture: a held-out image, two query pixels, where each block looks from them, and the unary map."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from scipy import ndimage

from ...analysis import AttentionMaps
from ..data.colors import colorize, palette
from ..metrics import IGNORE
from ..network import STRIDE
from .class_focus import token_labels
from .overlay import QUERY_COLORS, class_handles, heat, mark

TITLES = {"nl": "Standard\nnon-local block", "dnl": "Disentangled\nnon-local block"}


class Query(NamedTuple):
    """A token to look from.

    Attributes:
        row: its place on the grid of tokens, which are 8 x 8 pixels.
        column: the same.
        kind: its class number.

    Example:
        >>> from dnl_ext.segmentation.looking import Query
        >>> Query(row=3, column=5, kind=2).column * 8  # the token's left edge in pixels
        40
    """

    row: int
    column: int
    kind: int


class Rows(NamedTuple):
    """A line of the picture: a variant's name, its attention maps and each query's share on its own class."""

    variant: str
    maps: AttentionMaps
    shares: list[float]


def choose_queries(label: torch.Tensor, count: int = 2) -> list[Query]:
    """Tokens to look from: centres of the largest cells of classes that also have other cells, far from any border.

    Args:
        label: int64 tensor (H, W) of class numbers.
        count: how many, each of another class.

    Returns:
        ``count`` of :class:`Query`, fewer only where the image has fewer classes. The choice depends on the labels
        alone, so that no picture can be flattered by it.

    Example:
        >>> import torch
        >>> from dnl_ext.segmentation.looking import choose_queries
        >>> label = torch.zeros(64, 64, dtype=torch.int64)
        >>> label[:, 32:] = 1
        >>> sorted(query.kind for query in choose_queries(label))
        [0, 1]
    """
    labels = token_labels(label).numpy()
    found = []
    for kind in np.unique(labels):
        labelled: Any = ndimage.label(labels == kind)
        cells, number = labelled
        sizes = ndimage.sum_labels(np.ones_like(cells), cells, range(1, number + 1))
        largest = int(np.argmax(sizes)) + 1
        # Distance to the cell's border; the image's edge counts as a border.
        padded: Any = ndimage.distance_transform_edt(np.pad(cells == largest, 1))
        depth = padded[1:-1, 1:-1]
        row, column = np.unravel_index(np.argmax(depth), depth.shape)
        elsewhere = float((labels == kind).sum() - sizes[largest - 1])
        found.append((min(elsewhere, 0.02 * labels.size), sizes[largest - 1], Query(int(row), int(column), int(kind))))
    found.sort(key=lambda entry: entry[:2], reverse=True)
    return [query for _, _, query in found[:count]]


def place_of(query: Query) -> tuple[float, float]:
    """Pixel (x, y) in the middle of a query's token."""
    return STRIDE * (query.column + 0.5), STRIDE * (query.row + 0.5)


def class_share(weights: torch.Tensor, labels: torch.Tensor, kind: int) -> float:
    """Share of an attention map (h, w) that lies on tokens (h, w) of one class."""
    return float((weights * (labels == kind)).sum())


def draw(
    path: Path,
    image: torch.Tensor,
    label: torch.Tensor,
    prediction: torch.Tensor,
    classes: Sequence[str],
    queries: Sequence[Query],
    rows: Sequence[Rows],
    shown: str = "Held-out mosaic of photographs",
    data: str = "mosaic",
) -> None:
    """Write the picture.

    Args:
        path: PNG file.
        image: float tensor (3, H, W) in 0 .. 1. label: int64 tensor (H, W).
        prediction: the disentangled block's, int64 tensor (H, W).
        classes: class names.
        queries: two :class:`Query`.
        rows: one :class:`Rows` per variant, drawn from top to bottom.
        shown: what the image is.
        data: name of the data set whose colours the classes have.
    """
    labels = token_labels(label)
    area = [float((labels == query.kind).float().mean()) for query in queries]
    figure, axes = plt.subplots(1 + len(rows), 3, figsize=(17, 3.1 * (1 + len(rows)) + 0.3), layout="constrained")
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.06, h_pad=0.05, hspace=0.02, wspace=0.02)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])

    axes[0, 0].imshow(image.permute(1, 2, 0).numpy())
    axes[0, 0].set_title(f"{shown}, and two query pixels A and B")
    for query, name, color in zip(queries, "AB", QUERY_COLORS, strict=False):
        mark(axes[0, 0], *place_of(query), name, color)
    class_map(axes[0, 1], label, classes, "True classes", data)
    right = float((prediction == label)[label != IGNORE].float().mean())
    title = f"Predicted with the disentangled block ({100 * right:.0f} % right)"
    class_map(axes[0, 2], prediction, classes, title, data)

    for line, (variant, maps, shares) in enumerate(rows, 1):
        for column, query in enumerate(queries):
            axis, name, kind = axes[line, column], "AB"[column], classes[query.kind]
            assert maps.own is not None
            heat(figure, axis, image, maps.own[column])
            mark(axis, *place_of(query), name, QUERY_COLORS[column])
            share = f"{100 * shares[column]:.0f} % of it on {kind}"
            axis.set_title(f"Where {name} looks: {share} ({100 * area[column]:.0f} % of the area)")
        axes[line, 0].set_ylabel(TITLES[variant], fontsize=13, fontweight="bold")
        if maps.joint != "sum":
            axes[line, 2].axis("off")
            text = "This block has no unary term.\n\nAll its attention is in the maps on the left."
            axes[line, 2].text(0.5, 0.5, text, ha="center", va="center", fontsize=12, transform=axes[line, 2].transAxes)
        else:
            assert maps.unary is not None
            heat(figure, axes[line, 2], image, maps.unary)
            axes[line, 2].set_title("Unary term: where every pixel looks, whatever it is")
    figure.supxlabel(
        f"Heat: attention in multiples of what it would be if spread evenly (1/{labels.numel():,} per token); "
        "each map has its own scale. Queries are chosen from the true classes alone.", fontsize=10,
    )  # fmt: skip
    figure.savefig(path, dpi=80)
    plt.close(figure)


def class_map(axis: Axes, label: torch.Tensor, classes: Sequence[str], title: str, data: str) -> None:
    """Classes as colours, with the names of those present."""
    colors = palette(data, len(classes))
    axis.imshow(colorize(label.numpy(), colors), interpolation="nearest")
    axis.legend(
        handles=class_handles([label], classes, colors), loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=8,
        fontsize=8.5, frameon=False, handlelength=1, handletextpad=0.4, columnspacing=1,
    )  # fmt: skip
    axis.set_title(title)
