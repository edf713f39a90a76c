"""A trained network back from its checkpoint, for looking at."""

from pathlib import Path
from typing import NamedTuple

from ..errors import InputError
from ..network import SegmentationNetwork
from . import checkpoint
from .config import TrainConfig


class Trained(NamedTuple):
    """network: in evaluation mode, on the CPU. config: its run's. classes: names. step, miou: where the run stood."""

    network: SegmentationNetwork
    config: TrainConfig
    classes: tuple[str, ...]
    step: int
    miou: float | None


def restore(path: str | Path, with_block: bool = True) -> Trained:
    """Open a checkpoint of ``dnl-ext train``.

    Args:
        path: the file.
        with_block: refuse a network without a block.

    Returns:
        A :class:`Trained`.

    Raises:
        InputError: the file is missing, damaged, of something else, or of a network without a block.
    """
    state = checkpoint.load(path)
    missing = [key for key in ("config", "classes", "network", "step") if key not in state]
    if missing:
        raise InputError(f"checkpoint {path} lacks {missing[0]}")
    try:
        config = TrainConfig(**state["config"])
    except TypeError as error:  # a setting that this version does not have
        raise InputError(f"checkpoint {path} is of another version: {error}") from None
    if with_block and config.variant == "none":
        raise InputError(f"checkpoint {path} is of a network without a block (--variant none)")
    classes = tuple(state["classes"])
    network = SegmentationNetwork(
        len(classes), config.variant, config.backend, config.width, config.temperature, config.block_gain
    )
    checkpoint.load_weights(network, state, path)
    return Trained(network.eval(), config, classes, state["step"], state.get("miou"))
