"""Settings of the ablation: the built-in one, and the published ones of three data sets."""

from typing import Any, NamedTuple

#: The terms and how they are joined, in the order of the talk's table.
VARIANTS = ("nl", "pairwise", "unary", "dnl_shared_key", "dnl")
VARIANT_NAMES = {
    "nl": "standard non-local (product)",
    "pairwise": "pairwise alone",
    "unary": "unary alone",
    "dnl_shared_key": "sum, shared keys",
    "dnl": "DNL (sum, own keys)",
}


class Recipe(NamedTuple):
    """What an ablation trains.

    Attributes:
        temperatures: of the logits; each variant is trained with each.
        settings: of :class:`~dnl_ext.segmentation.training.TrainConfig`.
        pretext: steps of the encoder on :class:`~dnl_ext.segmentation.data.PretextData` before all variants of a seed;
            0 is from scratch.
        layout: of the data folder; None for built-in data.
        images: validation images that the attention is measured on.
        source: where the settings are from.

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


#: SGD, momentum 0.9, polynomial decay of power 0.9, as configs/_base_/schedules of mmsegmentation.
_SGD = {"optimizer": "sgd", "weight_decay": 5e-4, "val_every": 0, "save_every": 500, "block_gain": 0.0}

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
}  # fmt: skip
