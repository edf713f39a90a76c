"""What a block's unary map attends to, and what its gradient asks for: near boundaries, and class by class.

The figures of :mod:`dnl_ext.analysis.consistency` call a token a boundary if a direct neighbour has another class. A
map may keep to a wider band, or to one side of it, or to classes; and a map that finds no boundaries may do so because
nothing draws it there. So here are, each beside the value of uniform attention:

    band 1, 2        mass on tokens at most 1 or 2 tokens away from a boundary
    class c          mass on tokens of the class over the class's share, 1 for uniform attention
    gradient         share of sum_j |dL/dm_j| on boundaries, m being the unary logits and L the loss of the training
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ...analysis import block_inputs, boundaries, labels_on_grid
from ...analysis.terms import split_images
from ..metrics import IGNORE
from ..training.prediction import autocast
from ..training.trainer import Trainer, segmentation_loss
from .samples import ValidationSamples

#: Widths of the band around boundaries, in tokens.
BANDS = (1, 2)


class UnaryMap(NamedTuple):
    """The unary map of one image (h, w), |dL/d its logits| (h, w) or None, and the labels of its tokens (h, w)."""

    weights: torch.Tensor
    gradient: torch.Tensor | None
    label: torch.Tensor


def unary_maps(trainer: Trainer, count: int) -> Iterator[UnaryMap]:
    """The unary maps of a trainer's network over ``count`` validation images."""
    block: Any = trainer.network.block
    kept: dict[str, torch.Tensor] = {}

    def keep_input(_module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        kept["input"] = arguments[0].detach()

    def keep_logits(_module: Any, _arguments: Any, output: torch.Tensor) -> None:
        if output.requires_grad:  # the analysis calls the layer too
            output.retain_grad()
            kept["logits"] = output

    hooks = [block.register_forward_pre_hook(keep_input)]
    if getattr(block, "conv_mask", None) is not None:
        hooks.append(block.conv_mask.register_forward_hook(keep_logits))
    trainer.network.eval()
    try:
        for samples, labels in ValidationSamples(trainer, count):
            with torch.set_grad_enabled(len(hooks) > 1), autocast(trainer.config.amp, trainer.device):
                loss = segmentation_loss(trainer.head(samples.to(trainer.device), labels.shape[-2:]), labels)
            gradient = None
            if len(hooks) > 1:
                loss.backward()
                gradient = kept["logits"].grad
                assert gradient is not None
                gradient = gradient[0, 0].abs()
            with torch.no_grad():
                inputs = block_inputs(block, kept["input"])
                (terms,) = split_images(inputs)
            if terms.unary is None:
                return
            shape = tuple(inputs.key_shape)
            yield UnaryMap(terms.unary.view(shape), gradient, labels_on_grid(labels[0], shape))
    finally:
        for hook in hooks:
            hook.remove()
        trainer.network.zero_grad(set_to_none=True)


def unary_detail(trainer: Trainer, count: int) -> dict[str, float]:
    """Figures of the unary map, means over images: {"unary.band1.mass": ...}; empty for a block without one.

    Args:
        trainer: a :class:`~dnl_ext.segmentation.training.Trainer` whose network has a block.
        count: validation images, evenly spread.

    Returns:
        "unary.bandN.mass" and ".uniform"; "unary.class.C.lift" for each class number C; "unary.gradient.mass", to be
        compared with the uniform value of the boundaries, where the block has logits of its own for the unary term.

    Example:
        >>> from dnl_ext.segmentation.experiments.unary_detail import unary_detail
        >>> from dnl_ext.segmentation.training import TrainConfig, Trainer
        >>> trainer = Trainer(TrainConfig(crop=(64, 64), width=4, val_images=1, block_gain=1.0))
        >>> figures = unary_detail(trainer, 1)
        >>> sorted(figures)[0], 0 < figures["unary.band1.mass"] <= figures["unary.band2.mass"] <= 1
        ('unary.band1.mass', True)
    """
    found: defaultdict[str, list[float]] = defaultdict(list)
    for weights, gradient, label in unary_maps(trainer, count):
        valid = label != IGNORE
        edge = boundaries(label)
        weights = weights * valid / (weights * valid).sum()
        for band in BANDS:
            near = F.max_pool2d(edge[None].float(), 2 * band + 1, 1, band)[0].bool() & valid
            found[f"unary.band{band}.mass"].append(float(weights[near].sum()))
            found[f"unary.band{band}.uniform"].append(float(near.sum() / valid.sum()))
        for number in label[valid].unique().tolist():
            inside = label == number
            found[f"unary.class.{number}.lift"].append(float(weights[inside].sum() / (inside.sum() / valid.sum())))
        if gradient is not None:
            gradient = gradient * valid
            found["unary.gradient.mass"].append(float(gradient[edge].sum() / gradient.sum()))
    return {name: sum(values) / len(values) for name, values in found.items()}
