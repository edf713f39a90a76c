"""A trained network back from its checkpoint, for looking at."""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError, InputWarning
from ..network import SegmentationNetwork
from . import checkpoint
from .config import TrainConfig


class Trained(NamedTuple):
    """A trained network and the run it is from.

    Attributes:
        network: in evaluation mode, on the CPU.
        config: settings of its run.
        classes: names of the classes.
        step: finished steps of the run.
        miou: mean intersection over union at its last validation, 0 .. 1; None before the first.
        data: name of the data set it was trained on.

    Example:
        >>> from dnl_ext.segmentation import SegmentationNetwork
        >>> from dnl_ext.segmentation.training import TrainConfig, Trained
        >>> trained = Trained(SegmentationNetwork(2, width=4).eval(), TrainConfig(width=4), ("road", "sky"), 400, 0.7)
        >>> trained.config.variant, trained.classes
        ('dnl', ('road', 'sky'))
    """

    network: SegmentationNetwork
    config: TrainConfig
    classes: tuple[str, ...]
    step: int
    miou: float | None
    data: str = ""


def build(config: TrainConfig, classes: int, fresh: bool) -> SegmentationNetwork:
    """The network of a run; ``fresh``: with the pretrained weights of its backbone, which a checkpoint has itself."""
    return SegmentationNetwork(
        classes,
        config.variant,
        config.backend,
        config.width,
        config.temperature,
        config.block_gain,
        config.channels,
        config.backbone,
        pretrained=fresh,
        backbone_weights=config.backbone_weights if fresh else None,
        frozen=config.freeze_backbone,
        auxiliary=config.aux_weight > 0,
    )


def check_classes(trained: Trained, data: Any, title: str | Path) -> None:
    """Raise InputError unless the classes of a data set are those of the network called ``title``."""
    if tuple(trained.classes) != tuple(data.classes):
        raise InputError(f"{title} has {len(trained.classes)} classes, the data {data.name} {len(data.classes)} or "
                         "others: give --data or --layout")  # fmt: skip


def restore(path: str | Path, with_block: bool = True) -> Trained:
    """Open a checkpoint of ``dnl-ext train``.

    Args:
        path: the file.
        with_block: refuse a network without a block.

    Returns:
        A :class:`Trained`.

    Raises:
        InputError: the file is missing, damaged, something else, or of a network without a block.

    Warns:
        InputWarning: its weights are not all finite, as after a training that diverged.

    Example:
        >>> from dnl_ext.segmentation.training import TrainConfig, Trainer, restore
        >>> trainer = Trainer(TrainConfig(steps=1, crop=(32, 32), batch_size=1, width=4, val_images=1), "run")
        >>> trainer.run()
        >>> trained = restore("run/checkpoint.pt")
        >>> trained.step, trained.classes[:2]
        (1, ('brick', 'grass'))
    """
    state = checkpoint.load(path)
    checkpoint.check_parts(state, path)
    if "step" not in state:
        raise InputError(f"checkpoint {path} lacks step")
    try:
        config = TrainConfig(**state["config"])
    except TypeError as error:  # a setting that this version does not have
        raise InputError(f"checkpoint {path} is of another version: {error}") from None
    if with_block and config.variant == "none":
        raise InputError(f"checkpoint {path} is of a network without a block (--variant none)")
    classes = tuple(state["classes"])
    network = build(config, len(classes), fresh=False)
    checkpoint.load_weights(network, state, path)
    broken = [name for name, tensor in network.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        text = f"checkpoint {path}: {broken[0]} has values that are not finite"
        others = f", as have {len(broken) - 1} more of its tensors" if broken[1:] else ""
        warnings.warn(InputWarning(text + others), stacklevel=2)
    return Trained(network.eval(), config, classes, state["step"], state.get("miou"), state.get("data", ""))
