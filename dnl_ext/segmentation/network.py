"""The segmentation network: a convolutional encoder of stride 8, a non-local block, a 1x1 classifier."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from typing_extensions import Self

from ..modules import DisentangledNonLocal2d
from ..types import Backend, Variant
from .backbones import PREFIX, SMALL, STRIDE, TimmBackbone, check_backbone

Network = TypeVar("Network", bound=nn.Module)

#: Channels of the features that enter the block; its query, key and value have half as many.
CHANNELS = 256

#: What stands between encoder and classifier: a variant of the block, or "none".
VARIANTS = ("dnl", "dnl_shared_key", "pairwise", "unary", "nl", "none")


def conv_norm(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """3x3 convolution, BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """x + two 3x3 convolutions of x, (B, C, h, w) to the same, then ReLU."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.first: nn.Sequential = conv_norm(channels, channels, dilation=dilation)
        self.second: nn.Sequential = conv_norm(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


def small_encoder(width: int, channels: int) -> nn.Sequential:
    """The light encoder: normalised images (B, 3, H, W) to (B, channels, H / 8, W / 8)."""
    w = width
    return nn.Sequential(
        conv_norm(3, w, 2), nn.ReLU(),
        conv_norm(w, 2 * w, 2), nn.ReLU(),
        conv_norm(2 * w, 4 * w, 2), nn.ReLU(),
        Residual(4 * w, 1), Residual(4 * w, 2),
        conv_norm(4 * w, channels), nn.ReLU(),
    )  # fmt: skip


class SegmentationNetwork(nn.Module):
    """A segmentation network with a non-local block: images (B, 3, H, W) in 0 .. 1 to logits (B, classes, H, W).

    A convolutional encoder of stride 8, the block on its features, a 1x1 classifier, and bilinear upsampling of the
    logits to the image's size. The encoder is a light one, or a network of timm and behind it a 3x3 convolution to
    ``channels``. Images may have any float dtype; they are cast to that of the weights.

    Args:
        classes: number of classes.
        variant: of the block, as :class:`dnl_ext.DisentangledNonLocal2d` names them: "dnl" (disentangled: whitened
            pairwise + unary term), "dnl_shared_key", "pairwise", "unary", "nl" (standard non-local block); or "none".
        backend: "fused" or "reference" (plain PyTorch, which holds maps of N x N for N positions); the parameters and
            results are the same.
        width: channels after the light encoder's first convolution; 24 makes 0.7 M parameters in all.
        temperature: divides the block's logits; None is the variant's own (the paper's 0.05, nl: 1).
        block_gain: initial weight of the BatchNorm behind the block. 0 makes the block start as the identity, as in
            mmsegmentation; a short training then hardly reaches the attention, which gets its gradient through it.
        channels: of the features that enter the block; its query, key and value have half as many.
        backbone: "small", the light encoder, or "timm:NAME", the network of timm with that name.
        pretrained: load timm's own weights of the backbone.
        backbone_weights: file of weights in place of those.
        frozen: the encoder is not trained: its weights get no gradient, its batch norms keep their statistics.

    Attributes:
        encoder: images to features; of a backbone these are not yet those of the block.
        project: features of the encoder to those of the block.
        block: the non-local block, or None.
        classifier: the 1x1 convolution.
        frozen: whether the encoder is not trained.

    Raises:
        ValueError: ``variant`` or ``backend`` is none of these.
        InputError: the backbone or its weights cannot be had, see :class:`~.backbones.TimmBackbone`.

    Example:
        >>> import torch
        >>> from dnl_ext.segmentation import SegmentationNetwork
        >>> network = SegmentationNetwork(classes=5, width=8)
        >>> network(torch.rand(2, 3, 64, 96)).shape
        torch.Size([2, 5, 64, 96])
    """

    def __init__(
        self,
        classes: int,
        variant: Variant | Literal["none"] = "dnl",
        backend: Backend = "fused",
        width: int = 24,
        temperature: float | None = None,
        block_gain: float = 0.0,
        channels: int = CHANNELS,
        backbone: str = SMALL,
        pretrained: bool = False,
        backbone_weights: str | Path | None = None,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.encoder: nn.Module
        self.project: nn.Module = nn.Identity()
        check_backbone(backbone)
        if backbone == SMALL:
            self.encoder = small_encoder(width, channels)
        else:
            self.encoder = TimmBackbone(backbone.removeprefix(PREFIX), pretrained, backbone_weights)
            self.project = nn.Sequential(conv_norm(self.encoder.channels, channels), nn.ReLU())
        self.frozen: bool = frozen
        self.encoder.requires_grad_(not frozen)
        if variant not in VARIANTS:
            raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
        self.block: Any = None
        if variant != "none":
            self.block = DisentangledNonLocal2d(
                channels, channels // 2, variant=variant, temperature=temperature, style="mmseg", backend=backend
            )
            nn.init.constant_(self.block.conv_out.bn.weight, block_gain)
        self.classifier: nn.Conv2d = nn.Conv2d(channels, classes, 1)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all parts but a frozen encoder, which stays in evaluation mode."""
        super().train(mode)
        self.encoder.train(mode and not self.frozen)
        return self

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """The encoder: images (B, 3, H, W) to features (B, C, H / 8, W / 8), sides rounded up."""
        images = images.to(self.classifier.weight.dtype)
        return self.encoder(images if isinstance(self.encoder, TimmBackbone) else (images - 0.5) / 0.25)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) to what enters the block, (B, channels, H / 8, W / 8), sides rounded up."""
        return self.project(self.encode(images))

    def classify(self, features: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """Block, classifier, upsampling: ``features`` (B, channels, h, w) to logits (B, classes, H, W) of ``size``."""
        if self.block is not None:
            features = self.block(features)
        logits = self.classifier(features)
        logits = logits.float() if logits.dtype.itemsize < 4 else logits  # of autocast
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)

    def forward(self, images: torch.Tensor, size: Sequence[int] | None = None) -> torch.Tensor:
        """Images (B, 3, H, W) in 0 .. 1 to logits (B, classes, H, W), or of ``size`` where that is given."""
        return self.classify(self.features(images), images.shape[-2:] if size is None else size)


class FeatureHead(nn.Module):
    """A network without its encoder: features (B, C, h, w) of that encoder to logits (B, classes, H, W) of ``size``."""

    def __init__(self, network: SegmentationNetwork) -> None:
        super().__init__()
        self.network: SegmentationNetwork = network

    def forward(self, features: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        return self.network.classify(self.network.project(features), size)


def tokens(size: Sequence[int]) -> int:
    """Number of positions that the block attends over for an image of ``size`` (height, width) in pixels.

    Example:
        >>> from dnl_ext.segmentation import tokens
        >>> tokens((512, 1024))  # stride 8
        8192
    """
    return -(-size[0] // STRIDE) * -(-size[1] // STRIDE)


def prepare(network: Network, device: torch.device) -> Network:
    """Move to ``device`` in the memory format its convolutions are fastest in."""
    network.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if device.type == "cpu":
        for module in network.modules():
            if isinstance(module, TimmBackbone):  # depthwise convolutions, twice as fast channel-first
                module.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    return network
