"""A harder built-in task, in which a region's class is shown somewhere else in the image.

A mosaic as in :mod:`.mosaic`, with these changes. Its classes are few, and all cells of a class have the tint of that
class in that image; which tint it is, is drawn anew for every image, so a tint says nothing about the class by itself.
Only some cells of a class are *clear* and show its photograph. The others are *hidden*: they show noise of the same
contrast. What class a hidden cell has can be told in one way only: find a clear cell of the same tint, which may lie
anywhere, and see what it shows. A convolution sees as far as its receptive field; attention between pixels of one
tint (a pairwise relation) that favours clear cells (a unary one) sees the whole image.
"""

import colorsys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from .mosaic import PHOTOGRAPHS, MosaicData, Photograph, Size, cells, smooth_noise, texture

#: Photographs whose texture a small cell shows.
CLASSES = ("brick", "grass", "gravel", "coins", "stars", "tissue")
#: Range of the photographs' size in the image, as a factor on their own resolution.
ZOOM = (0.5, 0.8)

#: Classes in one image, and so tints.
GROUPS = 3
#: Part of a class's cells that are clear, in the task and in :class:`PretextData`; at least one is.
CLEAR, PRETEXT_CLEAR = 0.34, 0.7
#: Chance that :class:`PretextData` labels a clear cell with its photograph.
ASK_TEXTURE = 0.75
#: Bins of hue in the labels of :class:`PretextData`.
HUES = 6
#: Strength of the tints, as distance from grey in each colour channel.
TINT = 0.16


def tints(rng: np.random.Generator) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Hues of the classes, 0 .. 1, and their colours: float64 array (GROUPS,), float32 array (GROUPS, 3)."""
    hues = (rng.uniform() + rng.permutation(GROUPS) / GROUPS) % 1
    colors = [colorsys.hsv_to_rgb(hue, 1, 1) for hue in hues]
    return hues, (2 * np.array(colors, dtype=np.float32) - 1) * TINT


def noise(rng: np.random.Generator, size: Size) -> torch.Tensor:
    """What a hidden cell shows: noise of deviation 1, slightly blurred, float32 tensor ``size``."""
    grain = torch.from_numpy(rng.standard_normal((1, 1, size[0] + 2, size[1] + 2), dtype=np.float32))
    blurred = F.avg_pool2d(grain, 3, 1)[0, 0]
    return blurred * 3


class Mosaic(NamedTuple):
    """One image of the context task with everything that is known of its pixels.

    Attributes:
        image: float32 tensor (3, h, w) in 0 .. 1.
        label: class numbers, int64 tensor (h, w).
        clear: whether a pixel shows its class's photograph, bool tensor (h, w); the others show noise.
        pretext: int64 tensor (h, w), the labels of :class:`PretextData`.

    Example:
        >>> from dnl_ext.segmentation.data import ContextData
        >>> mosaic = ContextData((64, 128)).validation_mosaic(0)
        >>> mosaic.image.shape, 0 < mosaic.clear.float().mean() < 1
        (torch.Size([3, 64, 128]), tensor(True))
    """

    image: torch.Tensor
    label: torch.Tensor
    clear: torch.Tensor
    pretext: torch.Tensor


def compose(rng: np.random.Generator, sources: Sequence[torch.Tensor], size: Size, share: float = CLEAR) -> Mosaic:
    """One :class:`Mosaic`.

    Args:
        rng: numpy Generator; the same state gives the same mosaic, bit for bit.
        sources: one tensor (h, w) per class, from :func:`mosaic.load_photograph`.
        size: (height, width) in pixels.
        share: part of a class's cells that are clear; at least one is.
    """
    index, count = cells(rng, size)
    kinds, (hues, colors) = rng.permutation(len(sources))[:GROUPS], tints(rng)
    groups = np.arange(count) % GROUPS
    is_clear = np.zeros(count, dtype=bool)
    for group in range(GROUPS):
        members = np.flatnonzero(groups == group)
        is_clear[members[: max(1, round(share * len(members)))]] = True
    order = rng.permutation(count)
    groups, is_clear = groups[order], is_clear[order]
    image, label = torch.zeros(3, *size), torch.zeros(size, dtype=torch.int64)
    clear, pretext = torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.int64)
    zoom = np.exp(rng.uniform(*np.log(ZOOM)))
    for number in range(count):
        inside = index == number
        rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
        level, contrast = rng.uniform(0.42, 0.58), rng.uniform(0.12, 0.2)
        cell_zoom, ask_texture = zoom * np.exp(rng.uniform(-0.1, 0.1)), is_clear[number] and rng.uniform() < ASK_TEXTURE
        if len(rows) == 0:
            continue
        box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        inside, kind = inside[box], int(kinds[groups[number]])
        shape = tuple(inside.shape)
        view = texture(rng, sources[kind], shape, cell_zoom) if is_clear[number] else noise(rng, shape)
        patch = level + contrast * view + torch.from_numpy(colors[groups[number]])[:, None, None]
        image[(slice(None), *box)] = torch.where(inside, patch, image[(slice(None), *box)])
        label[box][inside] = kind
        clear[box][inside] = bool(is_clear[number])
        pretext[box][inside] = kind if ask_texture else len(sources) + int(hues[groups[number]] * HUES)
    image *= 1 + 0.1 * smooth_noise(rng, size, max(size), 1)
    image += 0.02 * torch.from_numpy(rng.standard_normal((1, *size), dtype=np.float32))
    return Mosaic(image.clamp_(0, 1), label, clear, pretext)


class ContextData(MosaicData):
    """A harder built-in data set, in which a region's class may be shown somewhere else in the image.

    All cells of a class have one tint, drawn anew for every image. Some of them show the class's photograph, the others
    noise, so that the class of the latter can be told from a cell of the same tint far away, and from nothing else.
    Arguments, attributes and methods are those of :class:`MosaicData`.

    Example:
        >>> from dnl_ext.segmentation.data import ContextData
        >>> data = ContextData(size=(64, 128), validation_size=2)
        >>> image, label = data.training_sample(seed=0, index=7, crop=(64, 96))
        >>> image.shape, label.shape, len(label.unique())  # three classes in each image
        (torch.Size([3, 64, 96]), torch.Size([64, 96]), 3)
    """

    name = "context"
    clear_share = CLEAR
    photographs: tuple[Photograph, ...] = tuple(photograph for photograph in PHOTOGRAPHS if photograph.name in CLASSES)

    def training_mosaic(self, seed: int, index: int, crop: Size) -> Mosaic:
        """Training :class:`Mosaic` number ``index``, which the arguments determine."""
        return compose(np.random.default_rng((seed, index, 4)), self.sources["train"], crop, self.clear_share)

    def validation_mosaic(self, index: int) -> Mosaic:
        """Held-out :class:`Mosaic` number ``index``, the same for every seed."""
        return compose(np.random.default_rng((2020, index, 5)), self.sources["val"], self.size, self.clear_share)

    def training_sample(self, seed: int, index: int, crop: Size) -> tuple[torch.Tensor, torch.Tensor]:
        """Training image number ``index``: image (3, h, w) in 0 .. 1, label (h, w)."""
        return self.training_mosaic(seed, index, crop)[:2]

    def validation_sample(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Held-out mosaic number ``index``: image (3, H, W) in 0 .. 1, label (H, W)."""
        return self.validation_mosaic(index)[:2]


class PretextData(ContextData):
    """The same images with labels that every pixel's surroundings show: for an encoder to begin with.

    A cell of noise is labelled with the bin of its hue, a clear one with its photograph or the bin of its hue, one or
    the other by chance, so that features must hold both. Which cells belong together is left for the block to find.

    Example:
        >>> from dnl_ext.segmentation.data import PretextData
        >>> PretextData((64, 128)).classes[-3:]
        ('hue 3', 'hue 4', 'hue 5')
    """

    name = "pretext"
    clear_share = PRETEXT_CLEAR

    def __init__(self, size: Size = (128, 256), validation_size: int = 8) -> None:
        super().__init__(size, validation_size)
        self.classes: tuple[str, ...] = (*self.classes, *(f"hue {number}" for number in range(HUES)))

    def training_sample(self, seed: int, index: int, crop: Size) -> tuple[torch.Tensor, torch.Tensor]:
        mosaic = self.training_mosaic(seed, index, crop)
        return mosaic.image, mosaic.pretext

    def validation_sample(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        mosaic = self.validation_mosaic(index)
        return mosaic.image, mosaic.pretext
