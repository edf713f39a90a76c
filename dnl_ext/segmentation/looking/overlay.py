"""Heat or classes over a photograph, query markers, legends: what the pictures share."""

from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.patheffects as effects
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ..data.colors import colorize

HEAT = "inferno"
#: Most classes in a legend.
LEGEND = 24
#: One colour per query, easy to tell from the heat and from each other.
QUERY_COLORS = ("#00e5ff", "#7cff00", "#ff5fd2", "#ffd400", "#ffffff", "#b388ff")


def mark(axis: Axes, x: float, y: float, name: str, color: str, size: float = 13) -> None:
    """A ring and a letter at a pixel; ``size`` is the ring's diameter in points."""
    for edge, width in (("black", size / 2.6), (color, size / 5.2)):
        axis.plot(x, y, "o", markersize=size, markerfacecolor="none", markeredgecolor=edge, markeredgewidth=width)
    axis.annotate(
        name, (x, y), xytext=(0.75 * size, 0.55 * size), textcoords="offset points", color=color, fontsize=1.3 * size,
        fontweight="bold", path_effects=[effects.withStroke(linewidth=size / 3.2, foreground="black")],
        annotation_clip=False,
    )  # fmt: skip


def heat(
    figure: Figure,
    axis: Axes,
    image: torch.Tensor,
    weights: torch.Tensor,
    *,
    fontsize: int = 9,
    label: str = "x uniform",
) -> None:
    """An attention map over the darkened photograph, in multiples of uniform attention, with a colour bar.

    Args:
        image: float tensor (3, H, W) in 0 .. 1. weights: tensor (h, w) of sum 1.
        fontsize: of the colour bar. label: its label.
    """
    times = weights.float() * weights.numel()
    # The brightest half per cent share one colour: single tokens would leave the rest black.
    top = max(2.0, float(torch.quantile(times.flatten(), 0.995)))
    scale = PowerNorm(0.6, 0, top, clip=True)
    strength = scale(F.interpolate(times[None, None], size=image.shape[1:], mode="bilinear")[0, 0].numpy()).data
    axis.imshow(image.mean(0).numpy(), cmap="gray", vmin=0, vmax=1.6)
    colors = plt.get_cmap(HEAT)(0.12 + 0.88 * strength)
    colors[..., 3] = 0.25 + 0.7 * strength
    axis.imshow(colors)
    bar = figure.colorbar(plt.cm.ScalarMappable(scale, HEAT), ax=axis, fraction=0.024, pad=0.01, extend="max")
    bar.set_label(label, fontsize=fontsize)
    bar.ax.tick_params(labelsize=fontsize - 1)
    bar.set_ticks([tick for tick in MaxNLocator(4).tick_values(0, top) if 0 <= tick <= top])
    bar.minorticks_off()


def tinted(
    image: torch.Tensor, label: torch.Tensor, colors: np.ndarray[Any, Any], opacity: float = 0.45
) -> np.ndarray[Any, Any]:
    """A photograph in grey under the colours of its classes.

    Args:
        image: float tensor (3, H, W) in 0 .. 1. label: int64 tensor (H, W).
        colors: of the classes, uint8 array (C, 3). opacity: of the colours, 0 .. 1.

    Returns:
        float32 array (H, W, 3) in 0 .. 1.
    """
    grey = image.mean(0)[..., None].numpy()
    return ((1 - opacity) * grey + opacity / 255 * colorize(label.numpy(), colors)).astype(np.float32)


def outlines(label: torch.Tensor) -> torch.Tensor:
    """Borders between classes, light on grey: what stands in for a photograph that is not to be shown.

    Args:
        label: int64 tensor (H, W).

    Returns:
        float tensor (3, H, W) in 0 .. 1.
    """
    border = torch.zeros_like(label, dtype=torch.bool)
    border[:, 1:] |= label[:, 1:] != label[:, :-1]
    border[1:] |= label[1:] != label[:-1]
    return torch.where(border, 1.0, 0.45).expand(3, -1, -1)


def class_handles(
    labels: Iterable[torch.Tensor], classes: Sequence[str], colors: np.ndarray[Any, Any], most: int = LEGEND
) -> list[Patch]:
    """What a legend shows of the classes in some label maps: those that are there, the largest areas first.

    Args:
        labels: int64 tensors of any shape; what is no class is left out.
        classes: names. colors: uint8 array (C, 3).
        most: classes to name; of more, the last entry is the number of the others.
    """
    areas = sum(torch.bincount(label.flatten(), minlength=256)[: len(classes)] for label in labels)
    assert isinstance(areas, torch.Tensor)
    present = [number for number in areas.argsort(descending=True, stable=True).tolist() if areas[number]]
    handles = [Patch(color=tuple(colors[number] / 255), label=classes[number]) for number in present[:most]]
    if len(present) > most:
        handles.append(Patch(fill=False, linewidth=0, label=f"and {len(present) - most} more"))
    return handles
