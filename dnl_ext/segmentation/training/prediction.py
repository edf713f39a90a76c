"""Predicting an image with a network: what training validates with, and what measures a trained network."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

__all__ = ["predict"]


def autocast(amp: str, device: torch.device) -> AbstractContextManager[Any]:
    """Context of a forward pass: autocast to bfloat16 where ``amp`` is "bf16"."""
    return contextlib.nullcontext() if amp == "none" else torch.autocast(device.type, dtype=torch.bfloat16)


@torch.inference_mode()
def predict(network: nn.Module, image: torch.Tensor, device: torch.device, amp: str = "none") -> torch.Tensor:
    """Predict the class of every pixel of an image.

    Args:
        network: in evaluation mode, from images (B, 3, H, W) in 0 .. 1 to logits (B, classes, H, W).
        image: float tensor (3, H, W) in 0 .. 1.
        device: where the network is.
        amp: "none", or "bf16" for autocast to bfloat16.

    Returns:
        int64 tensor (H, W), on the CPU.

    Example:
        >>> import torch
        >>> from dnl_ext.segmentation import SegmentationNetwork
        >>> from dnl_ext.segmentation.training import predict
        >>> predict(SegmentationNetwork(2, width=4).eval(), torch.rand(3, 32, 48), torch.device("cpu")).shape
        torch.Size([32, 48])
    """
    with autocast(amp, device):
        return network(image[None].to(device)).argmax(1)[0].cpu()
