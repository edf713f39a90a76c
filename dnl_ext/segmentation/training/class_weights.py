"""Weights of the classes in the loss: from how often they are labelled, or from a file."""

import json
import math
from pathlib import Path
from typing import Any

import torch

from ..data.folders import FolderData, read_classes
from ..errors import InputError
from ..metrics import IGNORE

#: Weights that are computed from the training labels.
BALANCED, MEDIAN_FREQUENCY = BALANCINGS = ("balanced", "median-frequency")


def class_weights(kind: str, data: Any) -> torch.Tensor:
    """The weights of classes in the loss.

    With n_c labelled pixels of class c in the training images, N in all, and K classes that occur,

    - "balanced" is N / (K n_c), by which every class has the same share of the loss (scikit-learn's name);
    - "median-frequency" is median(f) / f_c, where f_c is n_c over the labelled pixels of the images in which c occurs
      (Eigen and Fergus, *Predicting depth, surface normals and semantic labels*, ICCV 2015).

    A class that does not occur has weight 0.

    Args:
        kind: "balanced", "median-frequency", or a file: a JSON array of one number per class, in their order, or a
            JSON object of numbers by the classes' names.
        data: the data set; the first two need a folder, a :class:`~dnl_ext.segmentation.data.FolderData`.

    Returns:
        float32 tensor (classes,) on the CPU.

    Raises:
        InputError: built-in data, labels or a file that cannot be used.

    Example:
        >>> import json
        >>> from pathlib import Path
        >>> from dnl_ext.segmentation.data import MosaicData
        >>> from dnl_ext.segmentation.training import class_weights
        >>> _ = Path("weights.json").write_text(json.dumps([1, 1, 1, 1, 1, 1, 1, 4]))
        >>> class_weights("weights.json", MosaicData((64, 64), 1))
        tensor([1., 1., 1., 1., 1., 1., 1., 4.])
    """
    if kind not in BALANCINGS:
        return weights_of_file(kind, data.classes)
    if not isinstance(data, FolderData):
        raise InputError(f"--class-weights {kind} counts the labels of a folder, and so needs --data DIR")
    return balanced(kind, count_pixels(data))


def count_pixels(data: FolderData) -> torch.Tensor:
    """Labelled pixels of each class in each training image: int64 tensor (images, classes)."""
    counts = torch.zeros(len(data.train), len(data.classes), dtype=torch.int64)
    for row, sample in zip(counts, data.train, strict=True):
        label = read_classes(sample)
        row += torch.bincount(label[label != IGNORE], minlength=len(data.classes))
    return counts


def balanced(kind: str, counts: torch.Tensor) -> torch.Tensor:
    """Weights (classes,) float32 from the pixels of each class in each image, (images, classes)."""
    pixels = counts.sum(0).double()
    occurs = pixels > 0
    if not occurs.any():
        raise InputError(f"--class-weights {kind}: the training images have no labelled pixel")
    if kind == BALANCED:
        weights = pixels.sum() / (occurs.sum() * pixels)
    else:
        around = (counts.sum(1, keepdim=True) * (counts > 0)).sum(0)  # pixels of the images in which the class occurs
        frequency = pixels / around
        weights = frequency[occurs].quantile(0.5) / frequency
    return torch.where(occurs, weights, 0).float()


def weights_of_file(path: str, classes: tuple[str, ...]) -> torch.Tensor:
    """Weights (classes,) float32 from a JSON file. Raises InputError."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        wanted = f"expected {', '.join(BALANCINGS)} or a JSON file"
        raise InputError(f"--class-weights: {wanted}, cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # of JSON or of UTF-8
        raise InputError(f"--class-weights: {path} is no JSON file: {error}") from None
    if isinstance(found, dict):
        if found.keys() != set(classes):
            odd = sorted(found.keys() ^ set(classes))[0]
            raise InputError(f"--class-weights: {path} {'has' if odd in found else 'lacks'} the class {odd!r}")
        found = [found[name] for name in classes]
    if not isinstance(found, list) or len(found) != len(classes):
        have = len(found) if isinstance(found, list) else type(found).__name__
        raise InputError(f"--class-weights: expected {len(classes)} numbers in {path}, got {have}")
    for value in found:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (value >= 0 and math.isfinite(value)):
            raise InputError(f"--class-weights: expected numbers of at least 0 in {path}, got {value!r}")
    if not any(found):
        raise InputError(f"--class-weights: expected a number above 0 in {path}, got 0 for every class")
    return torch.tensor(found, dtype=torch.float32)
