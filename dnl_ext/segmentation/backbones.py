"""Encoders with pretrained weights: the networks of timm, as features of stride 8."""

import difflib
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from .errors import InputError, described

#: What stands in front of the name of a network of timm.
PREFIX = "timm:"
#: The encoder that is built in.
SMALL = "small"
#: Pixels per token along each side.
STRIDE = 8


def check_backbone(name: str) -> None:
    """Raise InputError unless ``name`` is "small" or "timm:NAME"."""
    if name != SMALL and not (name.startswith(PREFIX) and len(name) > len(PREFIX)):
        raise InputError(f"--backbone must be {SMALL} or {PREFIX}NAME, such as {PREFIX}resnet18, got {name}")


def import_timm() -> Any:
    """The module timm; InputError says how to get it."""
    try:
        return importlib.import_module("timm")
    except ImportError:
        raise InputError(f"--backbone {PREFIX}NAME needs timm: pip install dnl_ext[timm]") from None


class TimmBackbone(nn.Module):
    """The convolutional part of a network of timm: images (B, 3, H, W) in 0 .. 1 to features of stride 8.

    Strides beyond 8 are replaced by dilation, and the features are those of the last stage. The input is normalised by
    mean and deviation of the network's own pretraining, which are buffers and so a part of the state dict. Batch norms
    keep the statistics of the pretraining, in training too: those of a few crops would be worse.

    Args:
        name: of the network, as ``timm.create_model`` knows it.
        pretrained: load timm's own weights, which it downloads where it has not done so before.
        weights: file of weights in place of those: a state dict under timm's names, of torch or of safetensors; what
            belongs to a classifier is left out.

    Attributes:
        channels: of the features.
        earlier_channels: of those of the stage before, where there is one.

    Raises:
        InputError: timm is not installed, it has no such network, none with features of stride 8, or the weights cannot
            be had.

    Example:
        >>> import importlib.util, torch
        >>> from dnl_ext.segmentation.backbones import TimmBackbone
        >>> if importlib.util.find_spec("timm"):
        ...     backbone = TimmBackbone("resnet18").eval()
        ...     assert backbone(torch.rand(1, 3, 64, 96)).shape == (1, backbone.channels, 8, 12)
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, name: str, pretrained: bool = False, weights: str | Path | None = None) -> None:
        super().__init__()
        timm = import_timm()
        self.body: Any = create(timm, name)
        if weights is not None:
            load_file(timm, self.body, weights, name)
        elif pretrained:
            self.body = create(timm, name, pretrained=True)
        sizes = self.body.feature_info.channels()
        self.channels: int = sizes[-1]
        self.earlier_channels: int = sizes[-2:][0]
        settings = timm.models.get_pretrained_cfg(name)
        mean, std = (
            (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
            if settings is None
            else (settings.mean, settings.std)
        )
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever ``mode`` is."""
        return super().train(False)

    def stages(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of the stage before the last, and of the last."""
        if images.device.type == "cpu":
            images = images.contiguous()  # see network.prepare
        features = self.body((images.to(self.mean.dtype) - self.mean) / self.std)
        return features[-2:][0], features[-1]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.stages(images)[1]


def create(timm: Any, name: str, pretrained: bool = False) -> nn.Module:
    """A network of timm that gives the features of its stages, the last at stride 8. Raises InputError."""
    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        raise InputError(
            f"--backbone {PREFIX}{name}: timm has no such network" + (f", but {', '.join(near)}" if near else "")
        )
    try:
        body = timm.create_model(name, features_only=True, output_stride=STRIDE, pretrained=pretrained)
    except Exception as error:  # timm's networks raise many kinds for options that they do not have
        if pretrained:
            raise InputError(
                f"--backbone {PREFIX}{name}: timm cannot load its weights ({described(error)}); "
                "give them with --backbone-weights FILE"
            ) from None
        raise InputError(f"--backbone {PREFIX}{name}: no features of stride {STRIDE} ({described(error)})") from None
    found = body.feature_info.reduction()[-1]
    if found != STRIDE:
        raise InputError(f"--backbone {PREFIX}{name}: expected features of stride {STRIDE}, its last have {found}")
    return body


def load_file(timm: Any, body: nn.Module, path: str | Path, name: str) -> None:
    """Copy the weights of a file into ``body``, which must all be there. Raises InputError."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"--backbone-weights {path} does not exist")
    try:
        found = timm.models.load_state_dict(str(path))
    except Exception as error:  # torch, pickle and safetensors raise many kinds for a damaged file
        raise InputError(f"--backbone-weights: cannot read {path}: {described(error)}") from None
    own = body.state_dict()
    for key in sorted(own.keys() & found.keys()):
        if found[key].shape != own[key].shape:
            shapes = f"{tuple(found[key].shape)}, in {name} {tuple(own[key].shape)}"
            raise InputError(f"--backbone-weights {path} are not of {name}: {key} is {shapes}")
    missing = body.load_state_dict({key: found[key] for key in own if key in found}, strict=False).missing_keys
    if missing:
        raise InputError(f"--backbone-weights {path} are not of {name}: they lack {missing[0]}")
