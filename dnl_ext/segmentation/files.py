"""Reading one image or one label file, with errors of one line."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import InputError


def read_image(path: str | Path) -> torch.Tensor:
    """An image as float32 tensor (3, H, W) in 0 .. 1. Raises InputError where it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"), dtype=np.uint8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read image {path}: {error_line(error)}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def read_label(path: str | Path) -> np.ndarray[Any, Any]:
    """Raw label values: integer array (H, W). Raises InputError where it cannot be read or has several channels."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode, pixels = image.mode, np.array(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read label {path}: {error_line(error)}") from None
    if pixels.ndim != 2 or mode not in ("L", "P", "I", "I;16"):
        raise InputError(f"label {path} is of kind {mode}: expected one channel of class numbers, grey or palette")
    return pixels.astype(np.int64)


def error_line(error: BaseException) -> str:
    """An exception's message on one line, the file name left out where pillow repeats it."""
    return (" ".join(str(error).split()).split(" '/")[0] or type(error).__name__) if error.args else "unreadable"
