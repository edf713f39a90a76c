"""The loss of a segmentation: cross-entropy over the pixels that count, classes weighted or not."""

import torch
import torch.nn.functional as F

from ..metrics import IGNORE


def segmentation_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    counted: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean cross-entropy over the pixels that count, those whose label is not ``IGNORE``; 0 where none does.

    With weights it is the weighted mean, sum_i w_i loss_i / sum_i w_i with the weight w_i of pixel i's class, as
    ``torch.nn.CrossEntropyLoss(weight)`` has it.

    Args:
        logits: float tensor (B, C, H, W).
        labels: int64 tensor (B, H, W).
        counted: what to divide by, a tensor; None is the number of these pixels, or the sum of their weights.
        weights: of the classes, float tensor (C,); None is 1 for each.

    Returns:
        A tensor without dimensions, of the dtype of ``logits``.

    Example:
        >>> import torch
        >>> from dnl_ext.segmentation import IGNORE
        >>> from dnl_ext.segmentation.training import segmentation_loss
        >>> labels = torch.tensor([[[0, IGNORE]]])
        >>> segmentation_loss(torch.zeros(1, 2, 1, 2), labels)  # log 2 for each of the pixels that count
        tensor(0.6931)
    """
    weights = None if weights is None else weights.to(logits.dtype)
    total = F.cross_entropy(logits, labels, weights, ignore_index=IGNORE, reduction="sum")
    counted = pixel_weight(labels, weights) if counted is None else counted
    return total / torch.where(counted > 0, counted, 1)


def pixel_weight(labels: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of the class weights (C,) over the pixels that count: a tensor without dimensions; without, their number."""
    kept = labels != IGNORE
    return kept.sum() if weights is None else weights[labels[kept]].sum()
