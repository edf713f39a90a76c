"""Measuring a trained network on a part of a data set: the confusion matrix over its images."""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from ..errors import InputError
from ..metrics import Confusion
from ..network import prepare
from .config import TrainConfig
from .prediction import SINGLE_SCALE, check_scales, predict
from .trained import Trained, check_classes
from .trainer import Data, open_data, pick_device

__all__ = ["evaluate", "evaluation_data"]


def evaluation_data(
    config: TrainConfig,
    data: str | None = None,
    layout: str | None = None,
    classes: int | None = None,
    images: int | None = None,
    split: str = "val",
) -> Data:
    """The data set to measure a trained network on.

    Args:
        config: settings of its training.
        data: folder of images and labels; None is what it was trained on.
        layout: of the folder; None is the one that the training named, or is found by the folder's names.
        classes: number of classes; None is found from the folder.
        images: how many images to use, spread evenly over the part; None is all.
        split: "val", or "test" where the folder has such a part.

    Returns:
        A data set whose validation images are those of ``split``.

    Raises:
        InputError: the folder cannot be used, or what belongs to a folder is given without one.

    Example:
        >>> from dnl_ext.segmentation.training import TrainConfig, evaluation_data
        >>> evaluation_data(TrainConfig(crop=(64, 128)), images=2).validation_size
        2
    """
    given = {}
    if data is not None:
        given = {"data": data, "layout": layout or config.layout, "classes": classes}
    elif layout is not None or classes is not None:
        raise InputError("--layout and --classes belong to --data DIR")
    return open_data(dataclasses.replace(config, val_images=images, **given), split)


def evaluate(
    trained: Trained,
    data: Data,
    device: str = "auto",
    scales: Sequence[float] = SINGLE_SCALE,
    flip: bool = False,
    listener: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
) -> Confusion:
    """Predict the validation images of a data set, and count what is right.

    Args:
        trained: the network, of :func:`restore`. It is moved to the device.
        data: a data set of the same classes, such as :func:`evaluation_data` opens.
        device: "auto", "cpu", "cuda" or "cuda:N".
        scales, flip: views of each image whose probabilities are averaged, as :func:`predict` takes them.
        listener: called after each image with its number, the image (3, H, W) and the predicted classes (H, W).

    Returns:
        The :class:`~dnl_ext.segmentation.Confusion` over all images.

    Raises:
        InputError: the data has other classes, an image cannot be read, a scale is not above 0, or there is no such
            device.

    Example:
        >>> from dnl_ext.segmentation.training import TrainConfig, Trainer, evaluate, evaluation_data, restore
        >>> trainer = Trainer(TrainConfig(steps=1, crop=(64, 64), batch_size=1, width=4, val_images=2), "run")
        >>> trainer.run()
        >>> trained = restore("run/checkpoint.pt")
        >>> confusion = evaluate(trained, evaluation_data(trained.config, images=2))
        >>> confusion.miou() == trained.miou  # as training has measured it
        True
    """
    check_classes(trained, data, "the network")
    check_scales(scales)
    place = pick_device(device)
    network = prepare(trained.network, place).eval()
    confusion = Confusion(len(data.classes))
    for number in range(data.validation_size):
        image, label = data.validation_sample(number)
        prediction = predict(network, image, place, trained.config.amp, scales, flip)
        confusion.add(label, prediction)
        if listener is not None:
            listener(number, image, prediction)
    return confusion
