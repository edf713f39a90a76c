"""How well a trained block's maps keep to the query's class; the maps themselves are :mod:`dnl_ext.analysis`'s."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...analysis import attention_rows
from ..metrics import IGNORE
from ..network import STRIDE

if TYPE_CHECKING:
    from ..training.trainer import Trainer


def token_labels(label: torch.Tensor) -> torch.Tensor:
    """Class of the pixel in the middle of each token, a token being 8 x 8 pixels: what the block's positions show.

    Args:
        label: int64 tensor (H, W).

    Returns:
        int64 tensor (H / 8, W / 8), sides rounded up.

    Example:
        >>> import torch
        >>> from dnl_ext.segmentation.looking import token_labels
        >>> token_labels(torch.arange(24).expand(16, 24))
        tensor([[ 4, 12, 20],
                [ 4, 12, 20]])
    """
    rows, columns = (
        (torch.arange(-(-side // STRIDE)) * STRIDE + STRIDE // 2).clamp(max=side - 1) for side in label.shape
    )
    return label[rows[:, None], columns[None]]


class Focus(NamedTuple):
    """How a block's attention keeps to the classes: means over the queries of several images.

    Attributes:
        same_class: share of a query's attention that lies on tokens of its own class, 0 .. 1.
        uniform: the same for attention spread evenly, which is the class's share of the image.
        variety: total variation distance between a query's map and the mean map of its image, 0 .. 1; 0 means that all
            queries of an image look at the same places.
        images: how many images were looked at.

    Example:
        >>> from dnl_ext.segmentation.looking import Focus
        >>> found = Focus(same_class=0.62, uniform=0.21, variety=0.4, images=4)
        >>> round(found.same_class / found.uniform, 1)  # times uniform attention
        3.0
    """

    same_class: float
    uniform: float
    variety: float
    images: int


def focus(trainer: "Trainer", queries: int = 128, images: int = 4) -> Focus:
    """Measure how a trained block's attention relates to the classes, over the first validation images.

    The maps are those that distinguish the block, :attr:`dnl_ext.analysis.AttentionMaps.own`. The measure is this
    library's; the paper's definition of its own is not public.

    Args:
        trainer: a :class:`~dnl_ext.segmentation.training.Trainer` whose network has a block.
        queries: random queries per image.
        images: how many images, at most; each costs a forward pass at full size.

    Returns:
        A :class:`Focus`, of the images that have a label somewhere; NaN where none has.

    Example:
        >>> from dnl_ext.segmentation.looking import focus
        >>> from dnl_ext.segmentation.training import TrainConfig, Trainer
        >>> trainer = Trainer(TrainConfig(crop=(64, 128), width=4, val_images=2))
        >>> found = focus(trainer, queries=16)
        >>> found.images, 0 < found.uniform < 1
        (2, True)
    """
    network: Any = trainer.network.eval()
    totals, count = torch.zeros(3, dtype=torch.float64), 0
    for index in range(min(images, trainer.data.validation_size)):
        image, label = trainer.data.validation_sample(index)
        labels = token_labels(label)
        generator = torch.Generator().manual_seed(index)
        places = (labels != IGNORE).nonzero()
        if not len(places):
            continue
        places = places[torch.randint(len(places), (queries,), generator=generator)].tolist()
        with torch.no_grad():
            features = network.features(image[None].to(trainer.device))
        own_maps = attention_rows(network.block, features, places).own
        assert own_maps is not None  # a block without a learned gain
        maps = own_maps.flatten(1)
        own = torch.tensor([labels[row, column] for row, column in places])
        same = (own[:, None] == labels.flatten()[None]).float()
        variety = (maps - maps.mean(0)).abs().sum(1).mean() / 2
        totals += torch.stack([(maps * same).sum(1).mean(), same.mean(), variety]).double()
        count += 1
    return Focus(*(totals / count).tolist(), images=count)
