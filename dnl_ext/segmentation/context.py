"""A harder built-in task, in which a region's class is shown somewhere else in the image.

A mosaic as in :mod:`.mosaic`, with these changes. Its classes are few, and all cells of a class have the tint of that
class in that image; which tint it is, is drawn anew for every image, so a tint says nothing about the class by itself.
Only some cells of a class are *clear* and show its photograph. The others are *hidden*: they show noise of the same
contrast. What class a hidden cell has can be told in one way only: find a clear cell of the same tint, which may lie
anywhere, and see what it shows. A convolution sees as far as its receptive field; attention between pixels of one
tint (a pairwise relation) that favours clear cells (a unary one) sees the whole image.
"""

import colorsys

import numpy as np
import torch
import torch.nn.functional as F

from .metrics import IGNORE
from .mosaic import PHOTOGRAPHS, MosaicData, cells, smooth_noise, texture

#: Photographs whose texture a small cell shows.
CLASSES = ("brick", "grass", "gravel", "coins", "stars", "tissue")
#: Range of the photographs' size in the image, as a factor on their own resolution.
ZOOM = (0.5, 0.8)

#: Classes in one image, and so tints.
GROUPS = 3
#: Part of a class's cells that are clear; at least one is.
CLEAR = 0.34
#: Strength of the tints, as distance from grey in each colour channel.
TINT = 0.16


def tints(rng):
    """One tint per class: float32 array (GROUPS, 3), evenly spaced hues from a random one, in random order."""
    first, order = rng.uniform(), rng.permutation(GROUPS)
    colors = [colorsys.hsv_to_rgb((first + number / GROUPS) % 1, 1, 1) for number in order]
    return (2 * np.array(colors, dtype=np.float32) - 1) * TINT


def noise(rng, size):
    """What a hidden cell shows: noise of deviation 1, slightly blurred, float32 tensor ``size``."""
    grain = torch.from_numpy(rng.standard_normal((1, 1, size[0] + 2, size[1] + 2), dtype=np.float32))
    blurred = F.avg_pool2d(grain, 3, 1)[0, 0]
    return blurred * 3


def compose(rng, sources, size):
    """One mosaic: image (3, *size) in 0 .. 1, label (*size), and which pixels are clear, bool (*size).

    Args:
        rng: numpy Generator; the same state gives the same mosaic, bit for bit.
        sources: one tensor (h, w) per class, from :func:`mosaic.load_photograph`.
        size: (height, width) in pixels.
    """
    index, count = cells(rng, size)
    kinds, colors = rng.permutation(len(sources))[:GROUPS], tints(rng)
    groups = np.arange(count) % GROUPS
    is_clear = np.zeros(count, dtype=bool)
    for group in range(GROUPS):
        members = np.flatnonzero(groups == group)
        is_clear[members[: max(1, round(CLEAR * len(members)))]] = True
    order = rng.permutation(count)
    groups, is_clear = groups[order], is_clear[order]
    image, label = torch.zeros(3, *size), torch.zeros(size, dtype=torch.int64)
    clear, zoom = torch.zeros(size, dtype=torch.bool), np.exp(rng.uniform(*np.log(ZOOM)))
    for number in range(count):
        inside = index == number
        rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
        level, contrast = rng.uniform(0.42, 0.58), rng.uniform(0.12, 0.2)
        cell_zoom = zoom * np.exp(rng.uniform(-0.1, 0.1))
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
    image *= 1 + 0.1 * smooth_noise(rng, size, max(size), 1)
    image += 0.02 * torch.from_numpy(rng.standard_normal((1, *size), dtype=np.float32))
    return image.clamp_(0, 1), label, clear


class ContextData(MosaicData):
    """The task as a data set, with the interface of :class:`mosaic.MosaicData`.

    Args:
        size, validation_size: as there.
        clear_only: give hidden cells the label ``IGNORE``: what an encoder without a block can learn.
    """

    name = "context"
    photographs = tuple(photograph for photograph in PHOTOGRAPHS if photograph.name in CLASSES)

    def __init__(self, size=(128, 256), validation_size=16, clear_only=False):
        super().__init__(size, validation_size)
        self.clear_only = clear_only

    def _sample(self, key, part, size):
        image, label, clear = compose(np.random.default_rng(key), self.sources[part], size)
        return image, torch.where(clear, label, IGNORE) if self.clear_only else label

    def training_sample(self, seed, index, crop):
        """Training image number ``index``: image (3, h, w) in 0 .. 1, label (h, w); a function of its arguments."""
        return self._sample((seed, index, 4), "train", crop)

    def validation_sample(self, index):
        """Held-out mosaic number ``index``, the same for every seed: image (3, H, W) in 0 .. 1, label (H, W)."""
        return self._sample((2020, index, 5), "val", self.size)

    def clear(self, index):
        """Which pixels of held-out mosaic ``index`` are clear: bool tensor (H, W)."""
        return compose(np.random.default_rng((2020, index, 5)), self.sources["val"], self.size)[2]
