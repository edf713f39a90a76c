"""Settings of the ablation: the built-in one, the published ones of three data sets, and two for CamVid on a CPU."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

#: The terms and how they are joined, in the order of the talk's table.
VARIANTS = ("nl", "pairwise", "unary", "dnl_shared_key", "dnl")
VARIANT_NAMES = {
    "nl": "standard non-local (product)",
    "pairwise": "pairwise alone",
    "unary": "unary alone",
    "dnl_shared_key": "sum, shared keys",
    "dnl": "DNL (sum, own keys)",
    "none": "no block",
}

#: (variant, temperature): the unary term alone has no pairwise logits, no block has none at all.
Row: TypeAlias = tuple[str, float | None]


def rows(variants: Sequence[str], temperatures: Sequence[float]) -> tuple[Row, ...]:
    """Every variant at every temperature; those without pairwise logits once.

    Example:
        >>> from dnl_ext.segmentation.experiments.recipes import rows
        >>> rows(["nl", "unary"], [1.0, 0.05])
        (('nl', 1.0), ('nl', 0.05), ('unary', None))
    """
    return tuple(
        (variant, temperature)
        for variant in variants
        for temperature in ((None,) if variant in ("unary", "none") else temperatures)
    )


class Recipe(NamedTuple):
    """What an ablation trains.

    Attributes:
        temperatures: of the logits.
        settings: of :class:`~dnl_ext.segmentation.training.TrainConfig`.
        pretext: steps of the encoder on :class:`~dnl_ext.segmentation.data.PretextData` before all variants of a seed;
            0 is from scratch.
        layout: of the data folder; None for built-in data.
        images: validation images that the attention is measured on.
        source: where the settings are from.
        rows: (variant, temperature) of what is trained; empty is every variant at each temperature.
        split: part of the data that is measured on.

    Example:
        >>> from dnl_ext.segmentation.experiments import RECIPES
        >>> RECIPES["cityscapes"].settings["crop"], RECIPES["cityscapes"].temperatures
        ((512, 1024), (1.0, 0.05))
    """

    temperatures: tuple[float, ...]
    settings: dict[str, Any]
    pretext: int
    layout: str | None
    images: int
    source: str
    rows: tuple[Row, ...] = ()
    split: str = "val"

    def choose(self, variants: Sequence[str] | None, temperatures: Sequence[float] | None) -> tuple[Row, ...]:
        """The rows of these variants and temperatures, None being the recipe's own."""
        own = self.rows or rows(VARIANTS, self.temperatures)
        if temperatures is None:
            kept = tuple(row for row in own if variants is None or row[0] in variants)
            others = [variant for variant in variants or () if variant not in {row[0] for row in own}]
            return kept + rows(others, self.temperatures)
        return rows(variants or tuple(dict.fromkeys(row[0] for row in own)), temperatures)


#: SGD, momentum 0.9, polynomial decay of power 0.9, as configs/_base_/schedules of mmsegmentation.
_SGD = {"optimizer": "sgd", "weight_decay": 5e-4, "val_every": 0, "save_every": 500, "block_gain": 0.0}

#: Trained on CamVid with the weights of a network that was pretrained on ImageNet.
_CAMVID = {
    "backbone": "timm:tf_efficientnet_lite0", "channels": 128, "block_gain": 1.0, "batch_size": 4, "lr": 1e-3,
    "label_stride": 4, "val_every": 0,
}  # fmt: skip

RECIPES = {
    "context": Recipe(
        (1.0, 0.05),
        {
            "task": "context", "steps": 400, "crop": (128, 256), "batch_size": 4, "lr": 1e-3, "block_gain": 1.0,
            "width": 16, "val_every": 0, "val_images": 48, "save_every": 100,
        },
        1200,
        None,
        24,
        "The built-in task (segmentation.data.context); two temperatures: none, and the paper's for Cityscapes.",
    ),
    "cityscapes": Recipe(
        (1.0, 0.05),
        {**_SGD, "crop": (512, 1024), "batch_size": 8, "lr": 0.01, "steps": 40_000, "width": 64},
        0,
        "cityscapes",
        100,
        "Temperature 0.05: the paper's code (NLin). Crop 512 x 1024, 4 x 2 images, SGD 0.01, 40,000 steps: "
        "mmsegmentation configs/dnlnet/dnl_r50-d8_4xb2-40k_cityscapes-512x1024.py and its schedule_40k.py.",
    ),
    "ade20k": Recipe(
        (1.0, 0.1),
        {**_SGD, "crop": (512, 512), "batch_size": 16, "lr": 0.01, "steps": 80_000, "width": 64},
        0,
        "ade20k",
        100,
        "Temperature 0.1: the paper's code. Crop 512 x 512, 4 x 4 images, SGD 0.01, 80,000 steps: mmsegmentation "
        "configs/dnlnet/dnl_r50-d8_4xb4-80k_ade20k-512x512.py and its schedule_80k.py.",
    ),
    "pascal_context": Recipe(
        (1.0, 0.1),
        {
            **_SGD, "crop": (480, 480), "batch_size": 16, "lr": 0.004, "weight_decay": 1e-4, "steps": 40_000,
            "width": 64,
        },
        0,
        "pascal-context",
        100,
        "Temperature 0.1: the paper's code. Crop 480 x 480, 4 x 4 images, SGD 0.004, weight decay 0.0001, 40,000 "
        "steps: mmsegmentation configs/_base_/datasets/pascal_context.py and "
        "configs/fcn/fcn_r50-d8_4xb4-40k_pascal-context-480x480.py (it has no DNL configuration for this data set).",
    ),
    "camvid": Recipe(
        (1.0, 0.05),
        {**_CAMVID, "freeze_backbone": True, "crop": (256, 352), "steps": 551, "save_every": 200},
        0,
        "camvid",
        48,
        "Features of EfficientNet-Lite0, pretrained on ImageNet and frozen. Crops of 256 x 352 pixels, mirrored, 4 at "
        "a time, AdamW at 0.001, 6 epochs.",
        rows((*VARIANTS, "none"), (1.0, 0.05)),
        "test",
    ),
    "camvid_trained": Recipe(
        (1.0, 0.05),
        {**_CAMVID, "encoder_lr": 0.1, "crop": (176, 240), "steps": 367, "save_every": 50},
        0,
        "camvid",
        48,
        "EfficientNet-Lite0, pretrained on ImageNet and trained at a tenth of the rate. Crops of 176 x 240 pixels, "
        "scaled by 0.5 to 2, mirrored, 4 at a time, AdamW at 0.001, 4 epochs.",
        (("none", None), ("nl", 1.0), ("nl", 0.05), ("pairwise", 0.05), ("dnl", 0.05)),
        "test",
    ),
}  # fmt: skip
