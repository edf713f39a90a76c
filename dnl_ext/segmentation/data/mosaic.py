"""The built-in data: mosaics of real photographs with exact class masks.

Eight photographs that scikit-image's wheel carries (nothing is downloaded) are cut into a part for training and a part
that is held out, so that no pixel of a held-out mosaic was ever trained on. A mosaic is a Voronoi diagram with curved
borders; each cell shows one photograph, mirrored where it ends, at a random scale, angle, brightness, contrast and
tint. Photographs are grey and brought to one mean and deviation first, so that only texture tells the classes apart.
A class occurs in several cells that do not touch: that is what a non-local block can make use of.
"""

import importlib.util
import os
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import InputError

#: (height, width) in pixels.
Size: TypeAlias = tuple[int, ...]

#: Side of a Voronoi cell in pixels, on average, where the mosaic is large enough for the least number of cells.
CELL = 190
#: Least number of cells in a mosaic.
LEAST_CELLS = 9
#: Pixels left out between the training part and the held-out part of a photograph.
GAP = 16
#: Part of a photograph's width that is for training.
TRAIN_SHARE = 0.65


class Photograph(NamedTuple):
    """A photograph of scikit-image's wheel, whose texture is a class of the built-in data.

    Attributes:
        name: of the class.
        file: name of the file in the wheel.
        box: part of it to use in pixels, (left, top, right, bottom); None is all.
        factor: on its size.

    Example:
        >>> from dnl_ext.segmentation.data import PHOTOGRAPHS
        >>> PHOTOGRAPHS[0].name, PHOTOGRAPHS[0].file
        ('brick', 'brick.png')
    """

    name: str
    file: str
    box: tuple[int, int, int, int] | None = None
    factor: float = 1.0


PHOTOGRAPHS = (
    Photograph("brick", "brick.png"),
    Photograph("grass", "grass.png"),
    Photograph("gravel", "gravel.png"),
    Photograph("coins", "coins.png"),
    Photograph("moon", "moon.png"),
    Photograph("stars", "hubble_deep_field.jpg"),
    Photograph("tissue", "ihc.png"),
    Photograph("page", "page.png"),
)


def photograph_folder() -> str:
    """Folder of scikit-image's photographs. Raises InputError where the package is missing."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise InputError('the built-in photographs need scikit-image: pip install "dnl_ext[cli]", or give --data DIR')
    return os.path.join(spec.submodule_search_locations[0], "data")


def load_photograph(photograph: Photograph, part: str) -> torch.Tensor:
    """One part of a photograph.

    Args:
        photograph: a :class:`Photograph`.
        part: "train" (the left ``TRAIN_SHARE``) or "val" (the rest, ``GAP`` pixels away).

    Returns:
        float32 tensor (h, w) of mean 0 and deviation 1 over the whole photograph, clipped at 3 deviations.

    Raises:
        InputError: the file is missing or unreadable.
    """
    from PIL import Image

    path = os.path.join(photograph_folder(), photograph.file)
    try:
        with Image.open(path) as image:
            image = image.convert("L")
            if photograph.box:
                image = image.crop(photograph.box)
            if photograph.factor != 1.0:
                image = image.resize([round(side * photograph.factor) for side in image.size], Image.Resampling.BOX)
            pixels = np.asarray(image, dtype=np.float32)
    except (OSError, SyntaxError) as error:
        raise InputError(f"cannot read the built-in photograph {path}: {error}") from None
    pixels = np.clip((pixels - pixels.mean()) / pixels.std(), -3, 3)
    cut = round(pixels.shape[1] * TRAIN_SHARE)
    return torch.from_numpy(pixels[:, :cut].copy() if part == "train" else pixels[:, cut + GAP :].copy())


def smooth_noise(rng: np.random.Generator, size: Size, cell: int, channels: int) -> torch.Tensor:
    """Noise that varies over about ``cell`` pixels: float32 tensor (channels, h, w), roughly in -1 .. 1."""
    height, width = size
    cell = max(1, cell)
    grid = rng.uniform(-1, 1, (1, channels, height // cell + 3, width // cell + 3)).astype(np.float32)
    return F.interpolate(torch.from_numpy(grid), size=size, mode="bicubic", align_corners=True)[0]


def cells(rng: np.random.Generator, size: Size) -> tuple[torch.Tensor, int]:
    """Voronoi cells with curved borders: int64 tensor (h, w) of cell numbers 0 .. n-1, and n."""
    height, width = size
    count = max(LEAST_CELLS, round(height * width / CELL**2))
    cell = round((height * width / count) ** 0.5)
    # The best of several random sets of points: the one whose closest pair is farthest apart (no slivers).
    candidates = rng.uniform(0, 1, (8, count, 2)) * (height, width)
    gaps = np.linalg.norm(candidates[:, :, None] - candidates[:, None], axis=-1) + np.eye(count) * 1e9
    points = torch.from_numpy(candidates[gaps.min(axis=(1, 2)).argmax()].astype(np.float32))
    shift = 0.22 * cell * smooth_noise(rng, size, cell // 2, 2) + 0.04 * cell * smooth_noise(rng, size, cell // 8, 2)
    rows = torch.arange(height)[:, None] + shift[0]
    columns = torch.arange(width)[None] + shift[1]
    best, index = torch.full(size, torch.inf), torch.zeros(size, dtype=torch.int64)
    for number, (row, column) in enumerate(points):
        distance = (rows - row) ** 2 + (columns - column) ** 2
        closer = distance < best
        best = torch.where(closer, distance, best)
        index[closer] = number
    return index, count


def texture(rng: np.random.Generator, source: torch.Tensor, size: Size, zoom: float) -> torch.Tensor:
    """A view of a photograph, mirrored where it ends: source (h, w) to float32 tensor ``size``.

    The zoom is 1 at the photograph's own resolution; angle, place and mirroring are drawn from ``rng``.
    """
    height, width = size
    source_height, source_width = source.shape
    angle, mirror = rng.uniform(-0.35, 0.35), rng.choice((-1.0, 1.0))
    row0, column0 = rng.uniform(0, source_height), rng.uniform(0, source_width)
    rows = (torch.arange(height, dtype=torch.float32) - height / 2)[:, None] / zoom
    columns = (torch.arange(width, dtype=torch.float32) - width / 2)[None] / zoom * mirror
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    row, column = row0 + cos * rows + sin * columns, column0 - sin * rows + cos * columns
    grid = torch.stack([(2 * column + 1) / source_width - 1, (2 * row + 1) / source_height - 1], dim=-1)
    return F.grid_sample(source[None, None], grid[None], padding_mode="reflection", align_corners=False)[0, 0]


def compose(rng: np.random.Generator, sources: Sequence[torch.Tensor], size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    """One mosaic.

    Args:
        rng: numpy Generator; the same state gives the same mosaic, bit for bit.
        sources: one tensor (h, w) per class, from :func:`load_photograph`.
        size: (height, width) in pixels.

    Returns:
        image, float32 tensor (3, height, width) in 0 .. 1, and label, int64 tensor (height, width).
    """
    index, count = cells(rng, size)
    kinds = rng.permutation(len(sources))[: min(len(sources), max(2, round(count * 0.4)))]
    # Each class of this mosaic once, then again at random: classes recur in cells that lie apart.
    classes = np.concatenate([kinds, rng.choice(kinds, max(0, count - len(kinds)))])[:count]
    rng.shuffle(classes)
    image, label = torch.zeros(3, *size), torch.zeros(size, dtype=torch.int64)
    zoom = np.exp(rng.uniform(np.log(0.8), np.log(1.4)))
    for number in range(count):
        inside = index == number
        rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
        level, contrast = rng.uniform(0.35, 0.65), rng.uniform(0.12, 0.25)
        tint = torch.from_numpy(rng.uniform(-0.05, 0.05, 3).astype(np.float32))
        cell_zoom = zoom * np.exp(rng.uniform(-0.2, 0.2))
        if len(rows) == 0:
            continue
        box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        inside = inside[box]
        view = texture(rng, sources[classes[number]], tuple(inside.shape), cell_zoom)
        patch = level + contrast * view + tint[:, None, None]
        image[(slice(None), *box)] = torch.where(inside, patch, image[(slice(None), *box)])
        label[box][inside] = int(classes[number])
    image *= 1 + 0.2 * smooth_noise(rng, size, 2 * CELL, 1)
    image += 0.02 * torch.from_numpy(rng.standard_normal((1, *size), dtype=np.float32))
    return image.clamp_(0, 1), label


class MosaicData:
    """The built-in data set: mosaics of eight photographs, whose textures are the classes.

    Training mosaics never end; the held-out ones are a fixed set, and show parts of the photographs that no training
    mosaic shows.

    Args:
        size: (height, width) of the held-out mosaics in pixels.
        validation_size: how many of them.

    Attributes:
        name: of the data set.
        classes: names of the classes.
        epoch: training images that are counted as one epoch.
        validation_size: number of validation images.
        summary: a line on the images.

    Raises:
        InputError: scikit-image is not installed, or a photograph in it cannot be read.

    Example:
        >>> from dnl_ext.segmentation.data import MosaicData
        >>> data = MosaicData(size=(64, 128), validation_size=2)
        >>> image, label = data.training_sample(seed=0, index=7, crop=(64, 96))
        >>> image.shape, image.dtype, label.shape, label.dtype
        (torch.Size([3, 64, 96]), torch.float32, torch.Size([64, 96]), torch.int64)
    """

    epoch = 256
    name = "mosaic"
    photographs: tuple[Photograph, ...] = PHOTOGRAPHS

    def __init__(self, size: Size = (512, 1024), validation_size: int = 8) -> None:
        self.classes: tuple[str, ...] = tuple(photograph.name for photograph in self.photographs)
        self.size: Size = tuple(size)
        self.validation_size: int = validation_size
        self.summary: str = (
            f"training images without end, {self.epoch} an epoch, and {validation_size} validation images"
        )
        self.sources: dict[str, list[torch.Tensor]] = {
            part: [load_photograph(photograph, part) for photograph in self.photographs] for part in ("train", "val")
        }

    def training_sample(self, seed: int, index: int, crop: Size) -> tuple[torch.Tensor, torch.Tensor]:
        """Training image number ``index``, which the arguments determine: image (3, h, w) in 0 .. 1, label (h, w)."""
        return compose(np.random.default_rng((seed, index, 0)), self.sources["train"], crop)

    def validation_name(self, index: int) -> str:
        """Name for files about validation image number ``index``, without ending."""
        return f"{self.name}-{index}"

    def validation_sample(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Held-out mosaic number ``index``, the same for every seed: image (3, H, W) in 0 .. 1, label (H, W)."""
        return compose(np.random.default_rng((2020, index, 1)), self.sources["val"], self.size)
