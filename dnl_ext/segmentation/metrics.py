"""Intersection over union and accuracy from a confusion matrix."""

from collections.abc import Iterable

import torch

from ..analysis.consistency import IGNORE  # the label of pixels that count neither in the loss nor in the metric


class Confusion:
    """The confusion matrix of a segmentation: counts of (true class, predicted class) over any number of images.

    Args:
        classes: number of classes.

    Attributes:
        counts: int64 tensor (classes, classes); row: the true class, column: the predicted one.

    Example:
        >>> import torch
        >>> from dnl_ext.segmentation import IGNORE, Confusion
        >>> confusion = Confusion(2)
        >>> confusion.add(torch.tensor([[0, 0, 1, IGNORE]]), torch.tensor([[0, 1, 1, 0]]))
        >>> confusion.iou(), confusion.miou()
        ([0.5, 0.5], 0.5)
        >>> confusion.accuracy(), round(confusion.pixel_accuracy(), 3)
        ([0.5, 1.0], 0.667)
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.counts: torch.Tensor = torch.zeros(classes, classes, dtype=torch.int64)

    def add(self, label: torch.Tensor, prediction: torch.Tensor) -> None:
        """Count the pixels of one image or batch: two int64 tensors of one shape; label ``IGNORE`` is left out."""
        keep = label != IGNORE
        pairs = label[keep] * self.classes + prediction[keep]
        self.counts += torch.bincount(pairs, minlength=self.classes**2).view(self.classes, self.classes).cpu()

    def iou(self) -> list[float | None]:
        """Intersection over union of each class: list of floats, None for a class neither present nor predicted."""
        hit = self.counts.diagonal()
        union = self.counts.sum(0) + self.counts.sum(1) - hit
        return [float(h) / float(u) if u else None for h, u in zip(hit, union, strict=True)]

    def miou(self) -> float | None:
        """Mean of the classes' IoU, 0 .. 1; None where nothing was counted."""
        return mean(self.iou())

    def accuracy(self) -> list[float | None]:
        """Share of each class's pixels that are predicted right: list of floats, None for a class not present."""
        present = self.counts.sum(1)
        return [float(h) / float(p) if p else None for h, p in zip(self.counts.diagonal(), present, strict=True)]

    def mean_accuracy(self) -> float | None:
        """Mean of the classes' accuracy (mAcc), 0 .. 1; None where nothing was counted."""
        return mean(self.accuracy())

    def pixel_accuracy(self) -> float | None:
        """Share of all pixels that are predicted right (aAcc), 0 .. 1; None where nothing was counted."""
        total = int(self.counts.sum())
        return float(self.counts.diagonal().sum()) / total if total else None


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are there; None where none is."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None
