"""Training data from a folder of images and label PNGs: checks, random scale, crop and mirroring."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import InputError
from ..metrics import IGNORE
from .files import exif_turn, read_image, read_label
from .layouts import Sample, find_layout
from .mosaic import Size

#: Range of the random scale of training images.
SCALES = (0.5, 2.0)
#: Parts of a data set that a network can be measured on, and how a line of text calls them.
SPLITS = {"val": "validation", "test": "test"}


def read_sample(sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """Read an image and its label: float32 tensor (3, H, W) in 0 .. 1, int64 tensor (H, W) of class numbers and IGNORE.

    Raises:
        InputError: a file cannot be read, the sizes differ, or a label value is no class.

    Example:
        >>> import numpy
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from dnl_ext.segmentation.data import Sample, read_sample
        >>> Image.new("RGB", (2, 1)).save("photograph.png")
        >>> Image.fromarray(numpy.array([[0, 1]], dtype=numpy.uint8)).save("mask.png")
        >>> lookup = numpy.full(256, -1)  # of the values in the file: -1 is an error
        >>> lookup[:2] = 0, 255  # 0 is class 0, 1 is to be ignored
        >>> image, label = read_sample(Sample(Path("photograph.png"), Path("mask.png"), lookup))
        >>> label
        tensor([[  0, 255]])
    """
    image = read_image(sample.image)
    label = read_classes(sample)
    if label.shape != image.shape[1:]:
        label_size, image_size = (f"{size[-2]}x{size[-1]}" for size in (label.shape, image.shape))
        orientation = exif_turn(sample.image)
        turned = f", turned upright by its EXIF orientation {orientation}" if orientation else ""
        raise InputError(f"label {sample.label} is {label_size}, but its image {sample.image} is {image_size}{turned}")
    return image, label


def read_classes(sample: Sample) -> torch.Tensor:
    """The label of a sample: int64 tensor (H, W) of class numbers and IGNORE. Raises InputError."""
    raw = read_label(sample.label)
    label = sample.lookup[np.clip(raw, 0, 255)]
    wrong = (label < 0) | (raw > 255) | (raw < 0)
    if wrong.any():
        valid = sorted(set(np.flatnonzero(sample.lookup >= 0).tolist()))
        raise InputError(f"label {sample.label} holds {int(raw[wrong][0])}: expected {spans(valid)}")
    return torch.from_numpy(label.astype(np.int64))


def spans(values: Sequence[int]) -> str:
    """Sorted integers as text: 0..18, 255."""
    parts, start = [], None
    for value, following in zip(values, [*values[1:], None], strict=True):
        start = value if start is None else start
        if following != value + 1:
            parts.append(str(start) if start == value else f"{start}..{value}")
            start = None
    return ", ".join(parts)


def augment(
    rng: np.random.Generator, image: torch.Tensor, label: torch.Tensor, crop: Size
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random scale, crop and mirroring, drawn from ``rng``: image (3, H, W), label (H, W) to (3, *crop), crop.

    Where the scaled image is smaller than the crop, grey and IGNORE fill it up.
    """
    scale = float(np.exp(rng.uniform(*np.log(SCALES))))
    size = [max(1, round(side * scale)) for side in label.shape]
    # A place in the scaled image, and only then the scaling of that part: large photographs stay cheap.
    place = [int(rng.integers(0, max(0, side - want) + 1)) for side, want in zip(size, crop, strict=True)]
    part = [
        slice(int(start / scale), min(full, int(np.ceil((start + want) / scale)) + 1))
        for start, want, full in zip(place, crop, label.shape, strict=True)
    ]
    taken = [min(side, want) for side, want in zip(size, crop, strict=True)]
    image = F.interpolate(image[(slice(None), *part)][None], size=taken, mode="bilinear", antialias=scale < 1)[0]
    label = F.interpolate(label[tuple(part)][None, None].float(), size=taken, mode="nearest")[0, 0].long()
    if rng.integers(2):
        image, label = image.flip(2), label.flip(1)
    margin = (0, crop[1] - taken[1], 0, crop[0] - taken[0])
    return F.pad(image.clamp(0, 1), margin, value=0.5), F.pad(label, margin, value=IGNORE)


class FolderData:
    """Images and labels of a folder in a known layout. Its attributes and methods are those of :class:`MosaicData`.

    Training images are scaled by a random factor of 0.5 to 2, cropped and mirrored at random; validation images are
    whole.

    Args:
        root, layout, classes: see :func:`find_layout`.
        validation_size: images of the validation part to use, spread evenly over it; None is all.
        split: the part that is validated on, "val" or "test".

    Attributes:
        summary: a line of what was found in the folder, and of what in it is not used.
        train: training samples, a list of :class:`Sample`.
        val: validation samples, of ``split``.

    Raises:
        InputError: see :func:`find_layout`; the folder has no such part. An image is read, and an error in it found,
            when its turn comes.

    Example:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from dnl_ext.segmentation.data import FolderData
        >>> for name in ("images/a.jpg", "images/b.jpg", "labels/a.png", "labels/b.png"):
        ...     Path(name).parent.mkdir(exist_ok=True)
        ...     Image.new("RGB" if "images" in name else "L", (64, 48)).save(name)
        >>> data = FolderData(".", classes=3)
        >>> data.summary
        '1 training and 1 validation images'
        >>> image, label = data.training_sample(seed=0, index=0, crop=(32, 32))
        >>> image.shape, label.shape
        (torch.Size([3, 32, 32]), torch.Size([32, 32]))
    """

    def __init__(
        self,
        root: str | Path,
        layout: str | None = None,
        classes: int | None = None,
        validation_size: int | None = None,
        split: str = "val",
    ) -> None:
        if split not in SPLITS:
            raise InputError(f"--split must be one of {', '.join(SPLITS)}, got {split}")
        found = find_layout(root, layout, classes)
        self.name: str = found.name
        self.classes: tuple[str, ...] = found.classes
        self.train: list[Sample] = found.train
        self.val: list[Sample] = found.val if split == "val" else found.test
        if not self.val:
            raise InputError(f"data folder {root} ({found.name} layout) has no test images with labels")
        self.epoch: int = len(self.train)
        left_out, kind = found.left_out, SPLITS[split]
        if validation_size is not None and validation_size < len(self.val):
            left_out += (f"{kind} images beyond the number asked for ({len(self.val) - validation_size})",)
            self.val = [self.val[int(i)] for i in np.linspace(0, len(self.val) - 1, validation_size)]
        self.validation_size: int = len(self.val)
        self.summary: str = f"{self.epoch} training and {self.validation_size} {kind} images"
        if left_out:
            self.summary += f"; left out: {', '.join(left_out)}"
        self._folder: str = os.path.commonpath([sample.image.parent for sample in self.val])
        self._order: tuple[Any, Any] = (None, None)

    def training_sample(self, seed: int, index: int, crop: Size) -> tuple[torch.Tensor, torch.Tensor]:
        """Training image number ``index``, augmented."""
        image, label = read_sample(self.train[self.training_number(seed, index)])
        return augment(np.random.default_rng((seed, index, 3)), image, label, crop)

    def training_number(self, seed: int, index: int) -> int:
        """Which of ``train`` is number ``index``: every epoch goes through all, in an order drawn from ``seed``."""
        epoch, place = divmod(index, self.epoch)
        key, order = self._order
        if key != (seed, epoch):
            order = np.random.default_rng((seed, epoch, 2)).permutation(self.epoch)
            self._order = ((seed, epoch), order)
        return int(order[place])

    def validation_name(self, index: int) -> str:
        """Name for files about validation image number ``index``: its path below the folder of all, without ending."""
        return str(self.val[index].image.relative_to(self._folder).with_suffix(""))

    def validation_sample(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Validation image number ``index``, whole: image (3, H, W) in 0 .. 1, label (H, W)."""
        return read_sample(self.val[index])
