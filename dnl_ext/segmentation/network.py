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


class SmallEncoder(nn.Sequential):
    """The light encoder: normalised images (B, 3, H, W) to (B, channels, H / 8, W / 8)."""

    def __init__(self, width: int, channels: int) -> None:
        w = width
        super().__init__(
            conv_norm(3, w, 2), nn.ReLU(),
            conv_norm(w, 2 * w, 2), nn.ReLU(),
            conv_norm(2 * w, 4 * w, 2), nn.ReLU(),
            Residual(4 * w, 1), Residual(4 * w, 2),
            conv_norm(4 * w, channels), nn.ReLU(),
        )  # fmt: skip
        self.earlier_channels: int = 4 * w

    def stages(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, earlier_channels, H / 8, W / 8) before the last convolution, and the last."""
        *layers, conv, relu = self
        for layer in layers:
            images = layer(images)
        return images, relu(conv(images))


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
        auxiliary: have a second classifier on earlier features of the encoder, for a loss of its own in training
            (Zhao et al., *Pyramid scene parsing network*, CVPR 2017): a 3x3 convolution to a quarter of their channels,
            BatchNorm, ReLU and a 1x1 convolution, as mmsegmentation's ``FCNHead``; without its dropout, whose random
            numbers would not be the same in any number of processes.

    Attributes:
        encoder: images to features; of a backbone these are not yet those of the block.
        project: features of the encoder to those of the block.
        block: the non-local block, or None.
        classifier: the 1x1 convolution.
        auxiliary: the second classifier, or None.
        frozen: whether the encoder is not trained.

    Raises:
        ValueError: ``variant`` or ``backend`` is none of these.
        InputError: the backbone or its weights cannot be had: timm is not installed, it has no such network, or none
            with features of stride 8.

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
        auxiliary: bool = False,
    ) -> None:
        super().__init__()
        self.encoder: SmallEncoder | TimmBackbone
        self.project: nn.Module = nn.Identity()
        check_backbone(backbone)
        if backbone == SMALL:
            self.encoder = SmallEncoder(width, channels)
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
        self.auxiliary: nn.Sequential | None = None
        if auxiliary:
            earlier = self.encoder.earlier_channels
            between = max(1, earlier // 4)
            self.auxiliary = nn.Sequential(conv_norm(earlier, between), nn.ReLU(), nn.Conv2d(between, classes, 1))

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all parts but a frozen encoder, which stays in evaluation mode."""
        super().train(mode)
        self.encoder.train(mode and not self.frozen)
        return self

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        """Images as the encoder takes them, in the dtype of the weights."""
        images = images.to(self.classifier.weight.dtype)
        return images if isinstance(self.encoder, TimmBackbone) else (images - 0.5) / 0.25

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """The encoder: images (B, 3, H, W) to features (B, C, H / 8, W / 8), sides rounded up."""
        return self.encoder(self.normalised(images))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) to what enters the block, (B, channels, H / 8, W / 8), sides rounded up."""
        return self.project(self.encode(images))

    def classify(self, features: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """Block, classifier, upsampling: ``features`` (B, channels, h, w) to logits (B, classes, H, W) of ``size``."""
        if self.block is not None:
            features = self.block(features)
        return upsample(self.classifier(features), size)

    def forward(self, images: torch.Tensor, size: Sequence[int] | None = None) -> Any:
        """Images (B, 3, H, W) in 0 .. 1 to logits (B, classes, H, W), or of ``size`` where that is given.

        In training mode, and with an auxiliary classifier, to a pair: these logits and those of that classifier.
        """
        size = images.shape[-2:] if size is None else size
        if self.auxiliary is None or not self.training:
            return self.classify(self.features(images), size)
        earlier, last = self.encoder.stages(self.normalised(images))
        return self.classify(self.project(last), size), upsample(self.auxiliary(earlier), size)


def upsample(logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Logits (B, C, h, w), bilinear, to (B, C, H, W) of ``size``, in float32 where they are of 16 bits."""
    logits = logits.float() if logits.dtype.itemsize < 4 else logits  # of autocast
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


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
