"""What defines a training run, and how a resumed run finds its settings again."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from ...types import Backend, Variant
from ..backbones import SMALL, check_backbone
from ..data.layouts import LAYOUTS
from ..errors import InputError
from ..network import CHANNELS, STRIDE, VARIANTS

AMP = ("none", "bf16")
DTYPES = ("float32", "float64")
BACKENDS = ("fused", "reference")
#: The built-in data sets: see `mosaic` and `context` in :mod:`dnl_ext.segmentation.data`.
TASKS = ("mosaic", "context")
OPTIMIZERS = ("adamw", "sgd")

#: Settings that a resumed run may change: they name machines and places, not the run.
FREE = ("backbone_weights", "backend", "data", "device", "feature_cache", "save_every", "threads", "workers")


@dataclasses.dataclass
class TrainConfig:
    """Settings of a training run, which are also the options of ``dnl-ext train``.

    Attributes:
        variant: of the block; this and the next are arguments of :class:`~dnl_ext.segmentation.SegmentationNetwork`.
        backend: "fused" or "reference".
        amp: "none", or "bf16" for autocast to bfloat16.
        dtype: of weights and images, "float32" or "float64".
        data: folder of images and labels; None is the built-in data set ``task``.
        task: "mosaic" or "context", the built-in data sets.
        layout: of the folder; None is found by its names.
        classes: number of classes; None is found from the folder.
        steps: updates of the weights.
        crop: (height, width) of the training images in pixels.
        batch_size: crops per step, over all processes. All other numbers are those of each process.
        optimizer: "adamw", or "sgd" with momentum 0.9.
        lr: learning rate at its peak; see :func:`learning_rate`.
        encoder_lr: factor on the encoder's learning rate.
        weight_decay: of the optimizer.
        class_weights: of the loss: "balanced", "median-frequency" or a file, see :func:`class_weights`; None is none.
        aux_weight: of the loss of an auxiliary head on earlier features of the encoder, beside 1 of the network's own;
            0 is without such a head. mmsegmentation's is 0.4.
        block_gain: initial weight of the BatchNorm behind the block; an argument of the network, as the next two.
        temperature: divides the block's logits; None is the variant's own.
        width: channels after the light encoder's first convolution.
        channels: of the features that enter the block.
        backbone: "small", the light encoder, or "timm:NAME".
        backbone_weights: file of the backbone's weights; None is timm's own, which are downloaded.
        freeze_backbone: leave the encoder as it is, and compute the features of each image once.
        feature_cache: folder of these features; None is ``features`` in the folder of the run.
        label_stride: train on every label_stride-th pixel of the labels in each direction.
        val_every: steps between validations; 0 validates at the end only.
        val_images: validation images to use; None is all, which are 8 of the built-in data.
        save_every: steps between checkpoints.
        seed: of weights, order of the images and augmentation.
        threads: of PyTorch on the CPU; 0 is its own choice.
        workers: threads that prepare images ahead.
        device: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        InputError: a setting is out of range.

    Example:
        >>> from dnl_ext.segmentation.training import TrainConfig
        >>> TrainConfig(variant="nl", steps=2000).crop
        (512, 1024)
        >>> TrainConfig(steps=0)
        Traceback (most recent call last):
        dnl_ext.segmentation.errors.InputError: --steps must be at least 1, got 0
    """

    variant: Variant | Literal["none"] = "dnl"
    backend: Backend = "fused"
    amp: str = "none"
    dtype: str = "float32"
    data: str | None = None
    task: str = "mosaic"
    layout: str | None = None
    classes: int | None = None
    steps: int = 400
    crop: tuple[int, ...] = (512, 1024)
    batch_size: int = 2
    optimizer: str = "adamw"
    lr: float = 2e-3
    encoder_lr: float = 1.0
    weight_decay: float = 0.01
    class_weights: str | None = None
    aux_weight: float = 0.0
    block_gain: float = 0.0
    temperature: float | None = None
    width: int = 24
    channels: int = CHANNELS
    backbone: str = SMALL
    backbone_weights: str | None = None
    freeze_backbone: bool = False
    feature_cache: str | None = None
    label_stride: int = 1
    val_every: int = 100
    val_images: int | None = None
    save_every: int = 50
    seed: int = 0
    threads: int = 0
    workers: int = 1
    device: str = "auto"

    def __post_init__(self) -> None:
        self.crop = tuple(self.crop)
        for name, choices in (
            ("variant", VARIANTS), ("backend", BACKENDS), ("amp", AMP), ("dtype", DTYPES), ("task", TASKS),
            ("optimizer", OPTIMIZERS), ("layout", LAYOUTS),
        ):  # fmt: skip
            if getattr(self, name) not in choices and not (name == "layout" and self.layout is None):
                raise InputError(f"{option(name)} must be one of {', '.join(choices)}, got {getattr(self, name)}")
        for name in ("steps", "batch_size", "width", "label_stride", "save_every", "workers"):
            if getattr(self, name) < 1:
                raise InputError(f"{option(name)} must be at least 1, got {getattr(self, name)}")
        for name in ("val_every", "threads", "seed", "encoder_lr", "weight_decay", "aux_weight"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{option(name)} must not be negative, got {getattr(self, name)}")
        for name in ("lr", "temperature", "val_images"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise InputError(f"{option(name)} must be above 0, got {getattr(self, name)}")
        for name in ("lr", "temperature", "weight_decay", "aux_weight"):
            if getattr(self, name) is not None and not getattr(self, name) < math.inf:
                raise InputError(f"{option(name)} must be finite, got {getattr(self, name)}")
        for name, most in (("seed", 2**63), ("threads", 2**31), ("channels", 2**31), ("width", 2**31)):
            if getattr(self, name) >= most:
                raise InputError(f"{option(name)} must be below {most}, got {getattr(self, name)}")
        check_backbone(self.backbone)
        if self.channels < 2:
            raise InputError(f"--channels must be at least 2, got {self.channels}")
        if self.backbone_weights is not None and self.backbone == SMALL:
            raise InputError("--backbone-weights FILE belongs to --backbone timm:NAME")
        if len(self.crop) != 2 or min(self.crop) < 4 * STRIDE:
            raise InputError(f"--crop must be HEIGHTxWIDTH, each at least {4 * STRIDE}, got {show(self.crop)}")
        if self.label_stride > min(self.crop):
            raise InputError(f"--label-stride must be at most the crop's sides, got {self.label_stride}")
        if self.freeze_backbone and any(side % STRIDE for side in self.crop):
            raise InputError(f"--freeze-backbone needs a --crop in multiples of {STRIDE}, got {show(self.crop)}")
        if self.freeze_backbone and self.aux_weight:
            raise InputError(
                f"--aux-weight {self.aux_weight:g} trains the encoder, which --freeze-backbone leaves as it is"
            )
        if self.amp != "none" and self.dtype != "float32":
            raise InputError(f"--amp {self.amp} needs --dtype float32, got {self.dtype}")


def option(name: str) -> str:
    """The command line's name of a setting."""
    return "--" + name.replace("_", "-")


def show(value: object) -> str:
    """A setting as one would type it."""
    return "x".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def resolve(given: dict[str, Any], saved: dict[str, Any] | None = None, path: str | Path | None = None) -> TrainConfig:
    """The settings of a run.

    Args:
        given: settings that the user typed.
        saved: settings of the checkpoint to resume, which stand where nothing was typed; ``path`` names it.

    Returns:
        A :class:`TrainConfig`.

    Raises:
        InputError: a setting out of range, or one that contradicts the checkpoint.
    """
    typed = TrainConfig(**given)
    if saved is None:
        return typed
    before = TrainConfig(**saved)
    for name in given:
        want, have = getattr(typed, name), getattr(before, name)
        if name not in FREE and want != have:
            raise InputError(
                f"checkpoint {path} was made with {option(name)} {show(have)}, this run asks for {show(want)}"
            )
    return dataclasses.replace(before, **given)
