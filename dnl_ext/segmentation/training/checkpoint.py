"""Checkpoints: written whole or not at all, read without running code from the file."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError, described

__all__ = ["load", "load_weights", "save"]

FORMAT = 1


def save(state: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint, so that a crash leaves the old file or the new one, and never a part of one.

    Args:
        state: what :meth:`dnl_ext.segmentation.training.Trainer.state` returns.
        path: the file. It is written beside that first, then moved there in one step.

    Raises:
        InputError: the file cannot be written.

    Example:
        >>> from dnl_ext.segmentation.training import TrainConfig, Trainer, checkpoint
        >>> trainer = Trainer(TrainConfig(crop=(32, 32), width=4, val_images=1))
        >>> checkpoint.save(trainer.state(), "start.pt")
        >>> checkpoint.load("start.pt")["step"]
        0
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write checkpoint {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of :func:`save`, with its tensors on the CPU. No code in the file is run.

    Raises:
        InputError: the file is missing, damaged or something else.

    Example:
        >>> from dnl_ext.segmentation.training import checkpoint
        >>> checkpoint.load("nowhere.pt")
        Traceback (most recent call last):
        dnl_ext.segmentation.errors.InputError: checkpoint nowhere.pt does not exist
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle raise many kinds for a damaged file
        raise InputError(f"cannot read checkpoint {path}: {described(error)}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path} is not a checkpoint of dnl_ext train (format {FORMAT})")
    return state


def check_parts(state: dict[str, Any], path: str | Path | None) -> None:
    """InputError for a state without what a network is made from.

    Example:
        >>> from dnl_ext.segmentation.training import checkpoint
        >>> checkpoint.check_parts({"config": {}, "network": {}}, "half.pt")
        Traceback (most recent call last):
        dnl_ext.segmentation.errors.InputError: checkpoint half.pt lacks classes
    """
    for name, kind in (("config", dict), ("network", dict), ("classes", (list, tuple))):
        if not isinstance(state.get(name), kind):
            raise InputError(f"checkpoint {path} lacks {name}")


def load_weights(network: nn.Module, state: dict[str, Any], path: str | Path | None, partial: bool = False) -> None:
    """Copy a checkpoint's weights into ``network``.

    Args:
        network: the module to fill.
        state: a checkpoint from :func:`load`; ``path`` names it in messages.
        partial: allow one of the two to have no block, or no auxiliary head, whose weights then keep their initial
            values.

    Raises:
        InputError: the checkpoint is of another variant, or a weight has another shape.

    Example:
        >>> from dnl_ext.segmentation import SegmentationNetwork
        >>> from dnl_ext.segmentation.training import checkpoint
        >>> encoder, network = SegmentationNetwork(2, "none", width=4), SegmentationNetwork(2, "dnl", width=4)
        >>> checkpoint.load_weights(network, {"network": encoder.state_dict()}, "encoder.pt", partial=True)
        >>> bool((network.classifier.weight == encoder.classifier.weight).all())
        True
    """
    saved, own = dict(state["network"]), network.state_dict()
    for part in ("block.", "auxiliary.") if partial else ():
        theirs, ours = ({name for name in weights if name.startswith(part)} for weights in (saved, own))
        if not (theirs and ours):
            saved = {name: weight for name, weight in saved.items() if name not in theirs}
            saved |= {name: own[name] for name in ours}
    difference = sorted(saved.keys() ^ own.keys())
    if difference:
        side = "has" if difference[0] in saved else "lacks"
        raise InputError(f"checkpoint {path} is of another network: it {side} {difference[0]}")
    for name, weight in own.items():
        if saved[name].shape != weight.shape:
            shapes = f"{tuple(saved[name].shape)}, here {tuple(weight.shape)}"
            raise InputError(f"checkpoint {path} is of another shape: {name} is {shapes}")
    network.load_state_dict(saved)
