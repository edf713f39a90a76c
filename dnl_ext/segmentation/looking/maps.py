"""The picture of ``dnl-ext maps``: one image, some query pixels, and where the blocks of several networks look.

One row per checkpoint. Columns: the image with the queries on it, the prediction, then the pairwise map of every query,
the unary map, and the total of every query, which is what the block applies. What a block lacks is said in its place.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

from ...analysis import AttentionMaps, attention_rows
from ..data.colors import palette
from ..errors import InputError
from ..network import STRIDE
from ..training.trained import Trained
from .overlay import QUERY_COLORS, class_handles, heat, mark, tinted

#: What the attention of a block is called in its row.
JOINTS = {"product": "(product)", "sum": "(sum)", "pairwise": "(one term)", "unary": "(one term)"}
#: Largest side of an image here: four times the tokens of a Cityscapes photograph at stride 8.
LARGEST = 4096
#: Width of a panel in inches.
PANEL = 3.0


class MapRow(NamedTuple):
    """A row of the picture: what one network makes of the image.

    Attributes:
        title: of the row.
        prediction: predicted classes, int64 tensor (H, W).
        maps: attention from the query pixels, :class:`dnl_ext.analysis.AttentionMaps`.

    Example:
        >>> import torch
        >>> from dnl_ext import NonLocal2d
        >>> from dnl_ext.analysis import attention_rows
        >>> from dnl_ext.segmentation.looking import MapRow
        >>> maps = attention_rows(NonLocal2d(8), torch.randn(1, 8, 4, 4), [(0, 0)])
        >>> MapRow("mine", torch.zeros(32, 32, dtype=torch.int64), maps).maps.joint
        'product'
    """

    title: str
    prediction: torch.Tensor
    maps: AttentionMaps


def row_titles(paths: Sequence[str], variants: Sequence[str]) -> list[str]:
    """A short name for each checkpoint: the variant, with the folder where two would be called the same."""
    return [
        variant if variants.count(variant) == 1 else f"{variant} ({Path(path).resolve().parent.name})"
        for variant, path in zip(variants, paths, strict=True)
    ]


def check_queries(queries: Sequence[tuple[int, int]], size: Sequence[int], path: str | Path) -> None:
    """Raise InputError unless there are some pixels, at most as many as colours, and all inside the image."""
    height, width = size
    if not 0 < len(queries) <= len(QUERY_COLORS):
        raise InputError(f"--query: expected 1 to {len(QUERY_COLORS)} of them, got {len(queries)}")
    for x, y in queries:
        if not (0 <= x < width and 0 <= y < height):
            raise InputError(f"--query {x},{y} is outside of {path}, which is {width} x {height} pixels (X,Y from 0)")


@torch.inference_mode()
def look(trained: Trained, title: str, image: torch.Tensor, queries: Sequence[tuple[int, int]]) -> MapRow:
    """Predict an image, and compute where a network's block looks from some of its pixels.

    Args:
        trained: the network, of :func:`~dnl_ext.segmentation.training.restore`.
        title: of the row.
        image: float tensor (3, H, W) in 0 .. 1.
        queries: pixels (x, y).

    Returns:
        A :class:`MapRow`.

    Example:
        >>> import torch
        >>> from dnl_ext.segmentation import SegmentationNetwork
        >>> from dnl_ext.segmentation.looking import look
        >>> from dnl_ext.segmentation.training import TrainConfig, Trained
        >>> trained = Trained(SegmentationNetwork(2, width=4).eval(), TrainConfig(width=4), ("road", "sky"), 0, None)
        >>> row = look(trained, "mine", torch.rand(3, 64, 96), [(10, 20), (80, 40)])
        >>> row.prediction.shape, row.maps.pairwise.shape  # a map of 8 x 12 tokens for each query
        (torch.Size([64, 96]), torch.Size([2, 8, 12]))
    """
    network = trained.network
    features = network.features(image[None])
    prediction = network.classify(features, image.shape[1:]).argmax(1)[0]
    maps = attention_rows(network.block, features, [(y // STRIDE, x // STRIDE) for x, y in queries])
    return MapRow(title, prediction, maps)


def draw_maps(
    path: str | Path,
    image: torch.Tensor,
    queries: Sequence[tuple[int, int]],
    rows: Sequence[MapRow],
    classes: Sequence[str],
    data: str = "",
) -> None:
    """Draw where the blocks of several networks look, a row for each network.

    Args:
        path: file; its ending names the format (png, pdf, svg).
        image: float tensor (3, H, W) in 0 .. 1.
        queries: pixels (x, y), at most 6.
        rows: a :class:`MapRow` per network, from top to bottom.
        classes: names of the classes.
        data: name of the data set whose colours they have, as in :func:`~dnl_ext.segmentation.data.palette`.

    Raises:
        InputError: the file cannot be written.

    Example:
        >>> import os, torch
        >>> from dnl_ext.segmentation import SegmentationNetwork
        >>> from dnl_ext.segmentation.looking import draw_maps, look
        >>> from dnl_ext.segmentation.training import TrainConfig, Trained
        >>> trained = Trained(SegmentationNetwork(2, width=4).eval(), TrainConfig(width=4), ("road", "sky"), 0, None)
        >>> image, queries = torch.rand(3, 64, 96), [(10, 20)]
        >>> draw_maps("maps.png", image, queries, [look(trained, "mine", image, queries)], trained.classes)
        >>> os.path.exists("maps.png")
        True
    """
    colors = palette(data, len(classes))
    names = "ABCDEF"[: len(queries)]
    unary = any(row.maps.joint != "pairwise" for row in rows)
    total = any(row.maps.joint in ("product", "sum") for row in rows)
    titles = ["Image and queries", "Prediction"]
    titles += [f"Pairwise from {name}" for name in names]
    titles += ["Unary, for all queries"] * unary + [f"Total from {name}" for name in names] * total
    height, width = image.shape[1:]
    panel = (PANEL + 0.55, max(1.2, PANEL * height / width) + 0.15)
    figure, axes = plt.subplots(
        len(rows), len(titles), squeeze=False, layout="constrained",
        figsize=(panel[0] * len(titles) + 0.4, panel[1] * len(rows) + 0.95),
    )  # fmt: skip
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.04, h_pad=0.04, hspace=0.03, wspace=0.02)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=13)
    for line, row in zip(axes, rows, strict=True):
        line[0].set_ylabel(f"{row.title}\n{JOINTS[row.maps.joint]}", fontsize=13)
        draw_row(figure, line, image, queries, names, row, colors, unary, total)
    figure.legend(
        handles=class_handles([row.prediction for row in rows], classes, colors),
        loc="outside lower center", ncols=12, frameon=False, fontsize=11, title_fontsize=11,
        title=f"Heat: attention in multiples of uniform attention (1 / {rows[0].maps.positions:,} per position), "
        "each map on its own scale. Predicted classes:",
    )  # fmt: skip
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {path}: {' '.join(str(error).split())}") from None
    finally:
        plt.close(figure)


def draw_row(
    figure: Figure,
    line: Any,
    image: torch.Tensor,
    queries: Sequence[tuple[int, int]],
    names: str,
    row: MapRow,
    colors: np.ndarray[Any, Any],
    unary: bool,
    total: bool,
) -> None:
    """Fill one row of axes."""
    for axis in line:
        axis.set_xticks([])
        axis.set_yticks([])
    line[0].imshow(image.permute(1, 2, 0).numpy())
    line[1].imshow(tinted(image, row.prediction, colors))
    size = 8
    for (x, y), name, color in zip(queries, names, QUERY_COLORS, strict=False):
        mark(line[0], x, y, name, color, size + 1)

    count, maps = len(queries), row.maps
    columns: list[Any] = [
        (axis, number, maps.pairwise, "no pairwise term") for number, axis in enumerate(line[2 : count + 2])
    ]
    if unary:
        columns.append((line[count + 2], None, None if maps.unary is None else maps.unary[None], "no unary term"))
    if total:
        both = maps.joint in ("product", "sum")
        shown = maps.total if both else None
        single = "negative gain: no map" if both else f"the {maps.joint} map is all there is"
        columns += [(axis, number, shown, single) for number, axis in enumerate(line[count + 2 + unary :])]
    for axis, number, weights, missing in columns:
        if weights is None:
            axis.axis("off")
            axis.text(0.5, 0.5, missing, ha="center", va="center", fontsize=12, transform=axis.transAxes)
            continue
        heat(figure, axis, image, weights[number or 0])
        if number is not None:
            x, y = queries[number]
            mark(axis, x, y, names[number], QUERY_COLORS[number], size)
