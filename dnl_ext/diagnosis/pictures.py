"""Pictures of a network's attention heads: their figures as a grid, and the maps of a few."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import nn

from ..analysis import AttentionCall, AttentionCalls, ModelReport, Terms
from ..analysis.heads import on_device
from ..analysis.results import Estimate
from ..segmentation.errors import InputError
from ..segmentation.looking.overlay import QUERY_COLORS, heat, mark
from .images import ImageInputs

#: Key in a summary, title, greatest value of the colours (None: the greatest there is), colours, of which the brightest
#: is what ignores the query or looks everywhere.
PANELS = (
    ("total.jsd", "JSD of rows (0: ignores the query)", None, "viridis_r"),
    ("decomposition.unary_of_map", "Unary share of the logits (1: ignores the query)", 1.0, "viridis"),
    ("total.entropy_share", "Entropy / log N (1: uniform)", 1.0, "viridis"),
)
#: Heads to draw maps of, from either end of the ranking.
SHOWN = 2
#: Queries, in shares of height and width.
QUERIES = ((0.3, 0.3), (0.5, 0.5), (0.8, 0.75))
#: Most tokens in front of the grid: a class token, one of distillation, registers.
MOST_PREFIX = 16
#: Sides of patches, and strides of backbones, in pixels. Other tokens, such as object queries, make no grid.
STRIDES = (4, 7, 8, 14, 16, 28, 32, 64)
#: Heads from either end of the ranking of which some are drawn.
CANDIDATES = 24


def draw_heads(path: str | Path, report: ModelReport, title: str) -> None:
    """Draw the heads of a network as grids of layers and heads: degeneration, unary share and entropy.

    Args:
        path: file; its ending names the format (png, pdf, svg).
        report: of :func:`dnl_ext.analysis.measure_model`, with at least one layer.
        title: above the grids.

    Raises:
        InputError: the report has no layer, or the file cannot be written.

    Example:
        >>> import os, torch
        >>> from dnl_ext.analysis import measure_model
        >>> from dnl_ext.diagnosis import draw_heads
        >>> attention = torch.nn.MultiheadAttention(16, 4)
        >>> draw_heads("heads.png", measure_model(attention, [(torch.randn(9, 16),) * 3]), "mine")
        >>> os.path.exists("heads.png")
        True
    """
    if not report.layers:
        raise InputError(f"{title}: expected a report of at least one layer, got none")
    heads = report.heads()
    panels = [panel for panel in PANELS if any(panel[0] in summary for _, _, summary in heads)]
    names = list(report.layers)
    columns = max(len(layer.heads) for layer in report.layers.values())
    height = min(1.6 + 0.28 * len(names), 40)
    width = max(3.2, 1.0 + 0.24 * columns)
    figure, axes = plt.subplots(
        1, len(panels), squeeze=False, layout="constrained", sharey=True,
        figsize=(width * len(panels) + 0.09 * max(map(len, names)), height),
    )  # fmt: skip
    for axis, (key, label, top, colors) in zip(axes[0], panels, strict=True):
        grid = torch.full((len(names), columns), math.nan)
        for layer, head, summary in heads:
            if key in summary:
                grid[names.index(layer), head] = summary[key].value
        shown = axis.imshow(grid.numpy(), vmin=0, vmax=top, cmap=colors, aspect="auto")
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("head")
        axis.set_xticks(range(0, columns, max(1, columns // 8)))
        axis.set_yticks(range(len(names)), [name or "(the model)" for name in names], fontsize=8)
        figure.colorbar(shown, ax=axis, fraction=0.05, pad=0.02)
    figure.suptitle(f"{title}: {len(heads)} attention heads", fontsize=12)
    save(figure, path, 100)


def save(figure: Figure, path: str | Path, dpi: int) -> None:
    """Write a figure and close it. Raises InputError."""
    try:
        figure.savefig(path, dpi=dpi)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {path}: {' '.join(str(error).split())}") from None
    finally:
        plt.close(figure)


class Grid(NamedTuple):
    """How the keys of a layer lie in the image: ``prefix`` tokens, then height x width."""

    prefix: int
    height: int
    width: int


def token_grid(positions: int, size: Sequence[int]) -> Grid | None:
    """The grid of so many tokens in an image (height, width), at a usual stride and with as few in front as can be."""
    for prefix in range(MOST_PREFIX + 1):
        for stride in STRIDES:
            for rounded in (math.ceil, math.floor):
                height, width = (rounded(side / stride) for side in size)
                if min(height, width) > 1 and prefix + height * width == positions:
                    return Grid(prefix, height, width)
    return None


def token_grids(counts: Iterable[int], size: Sequence[int]) -> dict[int, Grid]:
    """The grids of a network's numbers of tokens.

    Of two with the same grid and different numbers in front, one is something else, such as 100 object queries beside
    8 x 12 positions: the one with fewer in front is taken.
    """
    found: dict[tuple[int, int], tuple[int, Grid]] = {}
    for count in sorted(set(counts)):
        grid = token_grid(count, size)
        if grid is not None:
            found.setdefault((grid.height, grid.width), (count, grid))
    return dict(found.values())


class HeadMaps(NamedTuple):
    """What is drawn of a head: ``total`` (queries, h, w), ``unary`` (h, w), and the queries' places in the grid."""

    total: torch.Tensor
    unary: torch.Tensor
    places: list[tuple[float, float]] | None


class MapRecorder:
    """Handler of :class:`AttentionCalls` that keeps the maps of chosen (layer, head)."""

    def __init__(self, chosen: Sequence[tuple[str, int]], grids: Mapping[int, Grid]) -> None:
        self.chosen: set[tuple[str, int]] = set(chosen)
        self.grids = grids
        self.maps: dict[tuple[str, int], HeadMaps] = {}

    def __call__(self, name: str, call: AttentionCall) -> None:
        """Keep the maps of the first call of a layer."""
        if not any(layer == name for layer, _ in self.chosen):
            return
        grid = self.grids.get(call.key.shape[-2])
        if grid is None or math.prod(call.query.shape[:-3]) != 1:  # windows, whose tokens are a part of the image
            return
        for _, head, terms in call.heads():
            if (name, head) in self.chosen and (name, head) not in self.maps and terms.positions == call.key.shape[-2]:
                self.maps[name, head] = head_maps(terms, grid)


def head_maps(terms: Terms, grid: Grid) -> HeadMaps:
    """Maps of a few queries, which are those at `QUERIES` where queries and keys are the same tokens."""
    prefix, height, width = grid
    places = None
    if terms.queries == terms.positions:
        cells = [(int(y * height), int(x * width)) for y, x in QUERIES]
        numbers = [prefix + row * width + column for row, column in cells]
        places = [((row + 0.5) / height, (column + 0.5) / width) for row, column in cells]
    else:
        numbers = [int(share * terms.queries) for share, _ in QUERIES]
    rows = terms.rows(torch.tensor(numbers, device=terms.value.device))
    assert rows.total is not None and rows.unary is not None  # a product
    total, unary = rows.total.cpu()[:, prefix:], rows.unary.cpu()[prefix:]
    return HeadMaps(total.unflatten(1, (height, width)), unary.view(height, width), places)


@torch.no_grad()
def draw_maps(path: Path, model: nn.Module, images: ImageInputs, number: int, report: ModelReport) -> bool:
    """Draw where the first and the last heads of the ranking look; False where no layer's tokens make a grid."""
    ranking = [(layer, head) for layer, head, _ in report.ranking()]
    keys = (image.keys for layer in report.layers.values() for head in layer.heads for image in head.images)
    recorder = MapRecorder([*ranking[:CANDIDATES], *ranking[-CANDIDATES:]], token_grids(keys, images.size))
    inputs = next(batch for place, batch in enumerate(images) if place == number)
    device = next((x.device for x in model.parameters()), torch.device("cpu"))
    with AttentionCalls(model, recorder):
        model(on_device(inputs, device))
    found = [key for key in ranking if key in recorder.maps]
    if not found:
        return False
    chosen = found if len(found) <= 2 * SHOWN else [*found[:SHOWN], *found[-SHOWN:]]
    figures = {(layer, head): summary for layer, head, summary in report.ranking()}
    image = images.picture(number)
    draw_rows(path, image, [(key, ranking.index(key) + 1, recorder.maps[key], figures[key]) for key in chosen])
    return True


def broken(name: str, length: int = 28) -> str:
    """The name of a layer in lines of at most so many letters, broken behind dots."""
    lines = [""]
    for part in name.replace(".", ". ").split():
        if lines[-1] and len(lines[-1]) + len(part) > length:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines) or "(the model)"


def draw_rows(
    path: Path, image: torch.Tensor, rows: Sequence[tuple[tuple[str, int], int, HeadMaps, dict[str, Estimate]]]
) -> None:
    """Draw a row for each head: the image, the total maps of the queries, and the unary map."""
    names = "ABC"
    titles = ["Image and queries", *(f"Total from {name}" for name in names), "Unary: the mean query"]
    shape = image.shape[1] / image.shape[2]
    figure, axes = plt.subplots(
        len(rows),
        len(titles),
        squeeze=False,
        layout="constrained",
        figsize=(3.2 * len(titles), 2.6 * shape * len(rows) + 0.8),
    )
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=12)
    for line, ((layer, head), rank, maps, summary) in zip(axes, rows, strict=True):
        line[0].imshow(image.permute(1, 2, 0).numpy())
        figures = f"head {head}, rank {rank}, JSD {summary['total.jsd'].value:.3f}"
        line[0].set_ylabel(f"{broken(layer)}\n{figures}", fontsize=9)
        shown: list[Any] = [*maps.total, maps.unary]
        for axis, weights in zip(line[1:], shown, strict=True):
            heat(figure, axis, image, weights)
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
        for place, name, color, axis in zip(maps.places or (), names, QUERY_COLORS, line[1:], strict=False):
            y, x = place[0] * image.shape[1] - 0.5, place[1] * image.shape[2] - 0.5
            for target in (line[0], axis):
                mark(target, x, y, name, color, 8)
    figure.supxlabel("Heat: attention in multiples of uniform attention, each map on its own scale.", fontsize=10)
    save(figure, path, 90)
