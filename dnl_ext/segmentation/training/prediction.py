"""Predicting an image with a network: what training validates with, and what measures a trained network."""

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError

__all__ = ["predict"]

#: Each image at its own size alone.
SINGLE_SCALE = (1.0,)
#: Largest factor on an image's sides.
MAX_SCALE = 100


def autocast(amp: str, device: torch.device) -> AbstractContextManager[Any]:
    """Context of a forward pass: autocast to bfloat16 where ``amp`` is "bf16"."""
    return contextlib.nullcontext() if amp == "none" else torch.autocast(device.type, dtype=torch.bfloat16)


def check_scales(scales: Sequence[float]) -> None:
    """Raise InputError unless there are some scales, all above 0 and at most MAX_SCALE."""
    given = ", ".join(f"{scale:g}" for scale in scales) or "none"
    if not scales or not all(0 < scale < float("inf") for scale in scales):
        raise InputError(f"--scales must be numbers above 0, got {given}")
    if max(scales) > MAX_SCALE:
        raise InputError(f"--scales must be at most {MAX_SCALE}, got {given}")


@torch.inference_mode()
def predict(
    network: nn.Module,
    image: torch.Tensor,
    device: torch.device,
    amp: str = "none",
    scales: Sequence[float] = SINGLE_SCALE,
    flip: bool = False,
) -> torch.Tensor:
    """Predict the class of every pixel of an image, at one scale or at several (test-time augmentation).

    Of several views of the image the probabilities (softmax of the logits at the image's own size) are averaged, with
    equal weights, and the class of the highest mean is taken, as mmsegmentation's ``SegTTAModel`` does it.

    Args:
        network: in evaluation mode, from images (B, 3, H, W) in 0 .. 1 to logits (B, classes, H, W).
        image: float tensor (3, H, W) in 0 .. 1.
        device: where the network is.
        amp: "none", or "bf16" for autocast to bfloat16.
        scales: factors on the image's sides; each makes a view.
        flip: mirror each view too, left to right.

    Returns:
        int64 tensor (H, W), on the CPU.

    Raises:
        InputError: a scale is not above 0, or beyond 100.

    Example:
        >>> import torch
        >>> from dnl_ext.segmentation import SegmentationNetwork
        >>> from dnl_ext.segmentation.training import predict
        >>> network, image = SegmentationNetwork(2, width=4).eval(), torch.rand(3, 32, 48)
        >>> predict(network, image, torch.device("cpu"), scales=(0.5, 1, 1.5), flip=True).shape  # six views
        torch.Size([32, 48])
    """
    check_scales(scales)
    size, image = image.shape[1:], image[None].to(device)

    def logits(view):
        with autocast(amp, device):
            return network(view)

    if tuple(scales) == SINGLE_SCALE and not flip:
        return logits(image).argmax(1)[0].cpu()
    total: Any = 0
    for scale in scales:
        scaled = [max(1, round(side * scale)) for side in size]
        view = image if scaled == list(size) else resize(image, scaled, antialias=scale < 1).clamp(0, 1)
        for mirrored in (False, True) if flip else (False,):
            scores = logits(view.flip(3)).flip(3) if mirrored else logits(view)
            total = total + resize(scores.float(), size).softmax(1)
    return total.argmax(1)[0].cpu()


def resize(images: torch.Tensor, size: Sequence[int], antialias: bool = False) -> torch.Tensor:
    """Bilinear resizing of (B, C, H, W) to ``size``."""
    return F.interpolate(images, size=tuple(size), mode="bilinear", align_corners=False, antialias=antialias)
