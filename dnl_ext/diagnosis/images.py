"""Photographs as a network of images expects them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from ..segmentation.data import read_image
from ..segmentation.data.listing import IMAGE_ENDINGS, images_in
from ..segmentation.data.mosaic import photograph_folder
from ..segmentation.errors import InputError

#: Mean and deviation of ImageNet's colours, which most networks of images are trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Largest side of an image.
LARGEST = 8192
#: Photographs of scikit-image's wheel.
BUILT_IN = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")


class ImageInputs:
    """Images as batches of one, scaled to cover a size, cropped in the middle to it, and normalised.

    Args:
        paths: the image files.
        size: (height, width) in pixels.
        mean: of each colour, in 0 .. 1, which is subtracted.
        std: of each colour, by which the rest is divided.

    Raises:
        InputError: there are no images, or a number does not fit. A file that cannot be read raises it when it is read.

    Example:
        >>> from PIL import Image
        >>> from dnl_ext.diagnosis import ImageInputs
        >>> Image.new("RGB", (40, 20)).save("a.png")
        >>> images = ImageInputs.of_folder(".", size=(16, 16))
        >>> len(images), next(iter(images)).shape
        (1, torch.Size([1, 3, 16, 16]))
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        size: tuple[int, int] = (224, 224),
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        if not paths:
            raise InputError("--images: expected at least one image, got none")
        if not 1 <= min(size) <= max(size) <= LARGEST:
            raise InputError(f"--size: expected sides of 1 to {LARGEST} pixels, got {size[0]}x{size[1]}")
        for name, values in (("--mean", mean), ("--std", std)):
            if len(values) != 3:
                raise InputError(f"{name}: expected three numbers, of red, green and blue, got {len(values)}")
        if not min(std) > 0:
            raise InputError(f"--std: expected numbers above 0, got {','.join(f'{x:g}' for x in std)}")
        self.paths: list[Path] = [Path(path) for path in paths]
        self.size: tuple[int, int] = size
        self.mean: torch.Tensor = torch.tensor(mean).view(3, 1, 1)
        self.std: torch.Tensor = torch.tensor(std).view(3, 1, 1)

    @classmethod
    def of_folder(
        cls,
        folder: str | Path | None,
        limit: int = 8,
        size: tuple[int, int] = (224, 224),
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> "ImageInputs":
        """The first ``limit`` images below a folder by name, or one image file; None: photographs of scikit-image's.

        Raises:
            InputError: as the class, and where the folder does not exist.
        """
        if folder is None:
            paths = [Path(photograph_folder(), name) for name in BUILT_IN]
        elif Path(folder).is_dir():
            paths = images_in(folder)
            if not paths:
                raise InputError(f"--images: folder {folder} has no image ({', '.join(IMAGE_ENDINGS)})")
        elif Path(folder).is_file():
            paths = [Path(folder)]
        else:
            raise InputError(f"--images: {folder} does not exist")
        return cls(paths[:limit], size, mean, std)

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Tensors (1, 3, height, width)."""
        for number in range(len(self)):
            yield ((self.picture(number) - self.mean) / self.std)[None]

    def picture(self, number: int) -> torch.Tensor:
        """The image with this number as the network sees it but for the colours, tensor (3, height, width), 0 .. 1."""
        image = read_image(self.paths[number])[None]
        height, width = self.size
        factor = max(height / image.shape[2], width / image.shape[3])
        scaled = [max(side, round(factor * old)) for side, old in zip(self.size, image.shape[2:], strict=True)]
        image = F.interpolate(image, size=scaled, mode="bilinear", antialias=True)[0].clamp(0, 1)
        top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
        return image[:, top : top + height, left : left + width]
