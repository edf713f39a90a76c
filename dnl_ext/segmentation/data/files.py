"""Reading one image or one label file: every kind that Pillow opens, with errors and warnings of one line."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..errors import InputError, InputWarning

if TYPE_CHECKING:
    from PIL.Image import Image

#: Values of one step where Pillow stretches few bits to 0 .. 255, by its name of the stored form.
STRETCHED = {"L;2": 85, "L;4": 17}

#: EXIF orientation -> name of the Pillow transposition that turns the image upright.
UPRIGHT = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
    8: "ROTATE_90",
}  # fmt: skip

TIFF_PHOTOMETRIC, TIFF_SAMPLES_PER_PIXEL, EXIF_ORIENTATION = 262, 277, 274


class Stored(NamedTuple):
    """How a file holds its pixels, which Pillow's mode does not tell.

    Attributes:
        raw_mode: Pillow's name of the stored form: ``L;4`` is grey of four bits, ``RGB;16B`` colour of 16.
        channels: values per pixel; Pillow leaves out those that its mode has no place for.
        white_is_zero: the TIFF counts from white to black. Pillow turns that round in up to 8 bits only.
        frames: pictures in the file, of which the first is read.
        format: Pillow's name of the file format.
    """

    raw_mode: str
    channels: int
    white_is_zero: bool
    frames: int
    format: str


def open_file(path: str | Path, kind: str) -> tuple[Image, Stored]:
    """The decoded Pillow image, turned upright as its EXIF orientation says, and how it was :class:`Stored`.

    Raises:
        InputError: the file cannot be read. ``kind``, image or label, is what the message calls it.
    """
    from PIL import Image as pillow

    try:
        # From a path Pillow maps uncompressed TIFFs into memory, and those with an orientation of 5 to 8 wrongly.
        with open(path, "rb") as file, pillow.open(file) as image:
            arguments = image.tile[0][3] if image.tile else ""  # empty once the pixels are loaded
            raw_mode = arguments if isinstance(arguments, str) else next(iter(arguments or ()), "")
            tags = getattr(image, "tag_v2", {})
            channels = tags.get(TIFF_SAMPLES_PER_PIXEL, len(image.getbands()))
            # An MPO is a camera's JPEG with a preview.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            stored = Stored(str(raw_mode), channels, tags.get(TIFF_PHOTOMETRIC) == 0, frames, image.format)
            image.load()
            # ImageOps.exif_transpose also writes the other tags anew, and fails where one of them is broken.
            turn = UPRIGHT.get(image.getexif().get(EXIF_ORIENTATION))
            if turn:
                image = image.transpose(pillow.Transpose[turn])
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders let any exception of their libraries through.
        raise InputError(f"cannot read {kind} {path}: {error_line(error)}") from None
    if stored.frames > 1:
        warn(path, kind, f"the first of its {stored.frames} frames is read", "frames")
    return image, stored


def exif_turn(path: str | Path) -> int | None:
    """The EXIF orientation, 2 .. 8, by which :func:`open_file` turns an image file, or None where it does not."""
    from PIL import Image as pillow

    with pillow.open(path) as image:
        orientation = image.getexif().get(EXIF_ORIENTATION)
    return orientation if orientation in UPRIGHT else None


def read_image(path: str | Path) -> torch.Tensor:
    """An image as float32 tensor (3, H, W) in 0 .. 1, upright.

    Grey of more than 8 bits keeps its levels: of 16 bits it is divided by the greatest value of its type, of 32 bits
    scaled from its own least and greatest value to 0 .. 1, as floats outside 0 .. 1 are. A warning says so, and where
    bits, channels, frames or transparency are left out.

    Raises:
        InputError: the file cannot be read, has more than four channels, or values that are not finite.

    Example:
        >>> from PIL import Image
        >>> from dnl_ext.segmentation.data import read_image
        >>> Image.new("RGB", (4, 2), (255, 0, 51)).save("red.png")
        >>> image = read_image("red.png")
        >>> image.shape, image[:, 0, 0]
        (torch.Size([3, 2, 4]), tensor([1.0000, 0.0000, 0.2000]))
    """
    image, stored = open_file(path, "image")
    if stored.channels > 4:
        raise InputError(f"image {path} has {stored.channels} channels: expected 1 to 4, grey or colour")
    if image.mode[0] in "IF":
        grey = torch.from_numpy(unit_range(path, image, stored))
        return grey.expand(3, -1, -1).contiguous()
    if ";16" in stored.raw_mode:
        warn(path, "image", "the upper 8 of its 16 bits per channel are read", "16-bit colour")
    if image.mode == "La":  # Pillow converts it to nothing else.
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            warn(path, "image", "its transparency is left out, the colours under it are read", "transparency")
    elif stored.channels > len(image.getbands()):
        warn(path, "image", f"the last of its {stored.channels} channels is left out", "channels")
    pixels = np.array(image.convert("RGB"), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def unit_range(path: str | Path, image: Image, stored: Stored) -> np.ndarray[Any, Any]:
    """Grey values of a Pillow image of integers above 8 bits or floats: float32 array (H, W) in 0 .. 1."""
    values = numbers(image, stored).astype(np.float64)
    if not np.isfinite(values).all():
        raise InputError(f"image {path} holds values that are not finite")
    low, high = values.min(), values.max()
    # Pillow before 11 opens PNG of 16 bits as 32.
    if image.mode.startswith("I;16") or stored.format in ("PNG", "PPM"):
        low, high = 0, 4095 if stored.raw_mode == "I;12" else 65535
        warn(path, "image", f"its grey values 0 .. {high} are scaled to 0 .. 1", f"grey to {high}")
    elif image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0, 1
    else:
        name = "float" if image.mode == "F" else "integer"
        warn(path, "image", f"its {name} values, {low:g} .. {high:g}, are scaled to 0 .. 1 by their own range", name)
    scaled = (values - low) / max(high - low, np.finfo(np.float64).tiny)
    return (1 - scaled if stored.white_is_zero else scaled).astype(np.float32)


def read_label(path: str | Path) -> np.ndarray[Any, Any]:
    """The values of a label file as it stores them in 1 to 32 bits: int64 array (H, W), upright.

    Raises:
        InputError: the file cannot be read, or holds something else than one channel of integers.

    Example:
        >>> import numpy
        >>> from PIL import Image
        >>> from dnl_ext.segmentation.data import read_label
        >>> Image.fromarray(numpy.array([[0, 7], [255, 7]], dtype=numpy.uint8)).save("label.png")
        >>> read_label("label.png").tolist()
        [[0, 7], [255, 7]]
    """
    image, stored = open_file(path, "label")
    if stored.channels != 1 or image.mode == "F":
        raise InputError(
            f"label {path} is of kind {image.mode}: expected one channel of class numbers, grey or palette"
        )
    values = numbers(image, stored)
    if image.mode == "L" and stored.white_is_zero:  # Pillow turned them round: ``L;I``, ``L;2I``, ``L;4I``.
        values = 255 - values
    elif image.mode == "1" and stored.white_is_zero:
        values = 1 - values
    return values // next((step for name, step in STRETCHED.items() if stored.raw_mode.startswith(name)), 1)


def numbers(image: Image, stored: Stored) -> np.ndarray[Any, Any]:
    """Values of a Pillow image of one channel: array (H, W), int64, or float32 where the image is."""
    values = np.asarray(image)
    if stored.raw_mode == "I;32N":  # Pillow holds unsigned integers of 32 bits as signed ones.
        values = values.astype(np.int64) & 0xFFFFFFFF
    return values if image.mode == "F" else values.astype(np.int64)


def warn(path: str | Path, kind: str, text: str, what: str) -> None:
    """Warn of how a file is read; ``what`` is the same for all files to which that happens."""
    warnings.warn(InputWarning(f"{kind} {path}: {text}", what), stacklevel=3)


def error_line(error: BaseException) -> str:
    """An exception's message on one line, the file name left out where Pillow repeats it."""
    text = re.sub(r"(image file) '.*'$", r"\1", " ".join(str(error).split()))
    return text or type(error).__name__
