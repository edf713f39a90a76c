"""Features of a frozen encoder, computed once for each image and its mirror image, and kept on disk.

A file holds one image's features in float16. It is named by the image's path, size and time of change, in a folder
named by the encoder's weights, so that no file is ever taken for another: runs with the same encoder share them, and an
encoder or image that changes has files of its own.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..data.files import read_image
from ..data.folders import FolderData, read_classes
from ..data.layouts import Sample
from ..data.mosaic import Size
from ..errors import InputError
from ..metrics import IGNORE
from ..network import STRIDE, SegmentationNetwork
from . import distributed

#: Characters of a hash in a name.
DIGITS = 16


def fingerprint(encoder: torch.nn.Module) -> str:
    """Hash of an encoder's weights."""
    found = hashlib.sha256()
    for name, value in encoder.state_dict().items():
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:DIGITS]


class FeatureCache:
    """The images of a folder as features of a network's encoder, which must not change, computed once and kept.

    ``training_sample`` and ``validation_sample`` are those of the data, with features
    (C, H / 8, W / 8) in place of images.

    Args:
        network: whose encoder is taken, on its device.
        data: the images and labels.
        folder: where the files are, in a folder of their own for each encoder.

    Attributes:
        folder: that of this encoder.

    Raises:
        InputError: data without files, a file that cannot be read or written, or features beyond float16.

    Example:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from dnl_ext.segmentation import SegmentationNetwork
        >>> from dnl_ext.segmentation.data import FolderData
        >>> from dnl_ext.segmentation.training import FeatureCache
        >>> for name in ("images/a.jpg", "images/b.jpg", "labels/a.png", "labels/b.png"):
        ...     Path(name).parent.mkdir(exist_ok=True)
        ...     Image.new("RGB" if "images" in name else "L", (64, 48)).save(name)
        >>> network = SegmentationNetwork(3, width=4, channels=16, frozen=True)
        >>> cache = FeatureCache(network, FolderData(".", classes=3), "features")
        >>> features, label = cache.training_sample(seed=0, index=0, crop=(32, 40))
        >>> features.shape, label.shape
        (torch.Size([16, 4, 5]), torch.Size([32, 40]))
    """

    def __init__(self, network: SegmentationNetwork, data: Any, folder: str | Path) -> None:
        if not isinstance(data, FolderData):
            raise InputError("--freeze-backbone keeps the features of each image, and so needs --data DIR")
        self.network: SegmentationNetwork = network
        self.data: FolderData = data
        self.folder: Path = Path(folder) / fingerprint(network.encoder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write to {self.folder}: {error.strerror}") from None

    def path(self, sample: Sample, mirrored: bool) -> Path:
        """File of an image's features, or of its mirror image's."""
        try:
            found = sample.image.stat()
        except OSError as error:
            raise InputError(f"cannot read image {sample.image}: {error.strerror}") from None
        key = f"{sample.image.resolve()} {found.st_size} {found.st_mtime_ns}"
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:DIGITS]}{'-mirrored' * mirrored}.npy"

    def features(self, sample: Sample, mirrored: bool = False) -> torch.Tensor:
        """Features (C, h, w) float32 of an image, or of its mirror image; from the file where there is one."""
        path = self.path(sample, mirrored)
        if not path.is_file():
            self.compute(sample, mirrored, path)
        try:
            return torch.from_numpy(np.load(path)).float()
        except (OSError, ValueError):
            raise InputError(f"{path} is damaged: remove it to compute it again") from None

    @torch.inference_mode()
    def compute(self, sample: Sample, mirrored: bool, path: Path) -> None:
        """Encode an image and write its file, whole or not at all."""
        image = read_image(sample.image)
        device = self.network.classifier.weight.device
        training = self.network.training
        features = self.network.eval().encode((image.flip(2) if mirrored else image)[None].to(device))[0]
        self.network.train(training)
        values = features.cpu().contiguous().half()
        if not values.isfinite().all():
            raise InputError(f"the features of {sample.image} do not fit float16: train without --freeze-backbone")
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                np.save(file, values.numpy())
            temporary.replace(path)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from None
        finally:
            temporary.unlink(missing_ok=True)

    def fill(self, progress: Callable[[int, int], object], stopped: Callable[[], object]) -> None:
        """Compute what is missing, each process its share, until ``stopped()``; calls ``progress(done, total)``."""
        wanted = [(sample, mirrored) for sample in self.data.train for mirrored in (False, True)]
        wanted += [(sample, False) for sample in self.data.val]
        missing = [(sample, mirrored) for sample, mirrored in wanted if not self.path(sample, mirrored).is_file()]
        share = missing[distributed.rank() :: distributed.world_size()]
        # Another run may fill the same folder: each begins elsewhere, or both would compute every file in step.
        first = os.getpid() * 7919 % max(1, len(share))
        for done, (sample, mirrored) in enumerate(share[first:] + share[:first], 1):
            if stopped():
                return
            path = self.path(sample, mirrored)
            if not path.is_file():
                self.compute(sample, mirrored, path)
            progress(min(done * distributed.world_size(), len(missing)), len(missing))

    def load(self, sample: Sample, mirrored: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (C, h, w) and label (H, W) of an image, or of its mirror image."""
        features, label = self.features(sample, mirrored), read_classes(sample)
        if any(-(-side // STRIDE) != have for side, have in zip(label.shape, features.shape[1:], strict=True)):
            raise InputError(f"label {sample.label} is {label.shape[0]}x{label.shape[1]}, another size than its image")
        return features, label.flip(1) if mirrored else label

    def training_sample(self, seed: int, index: int, crop: Size) -> tuple[torch.Tensor, torch.Tensor]:
        """Training image number ``index``, mirrored and cropped at random: features (C, h, w), label (8 h, 8 w)."""
        sample = self.data.train[self.data.training_number(seed, index)]
        rng = np.random.default_rng((seed, index, 3))
        mirrored = bool(rng.integers(2))
        features, label = self.load(sample, mirrored)
        return crop_features(rng, features, label, crop)

    def validation_sample(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Validation image number ``index``, whole: features (C, h, w), label (H, W)."""
        return self.load(self.data.val[index])


def crop_features(
    rng: np.random.Generator, features: torch.Tensor, label: torch.Tensor, crop: Size
) -> tuple[torch.Tensor, torch.Tensor]:
    """A random part of ``crop`` pixels, whole tokens: features (C, h, w), label (H, W) to (C, *crop / 8), crop.

    Where the image is smaller than the crop, zeros and IGNORE fill it up.
    """
    for axis, side in enumerate(crop):
        have, want = features.shape[1 + axis], side // STRIDE
        start = int(rng.integers(0, max(0, have - want) + 1))
        taken = min(have, want)
        features = features.narrow(1 + axis, start, taken)
        pixels = min(STRIDE * taken, label.shape[axis] - STRIDE * start)
        label = label.narrow(axis, STRIDE * start, pixels)
    rows, columns = (side // STRIDE for side in crop)
    features = F.pad(features, (0, columns - features.shape[2], 0, rows - features.shape[1]))
    return features, F.pad(label, (0, crop[1] - label.shape[1], 0, crop[0] - label.shape[0]), value=IGNORE)
