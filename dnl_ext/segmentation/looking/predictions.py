"""Predictions as files: class numbers in the classes' colours, and colours over the photograph with a legend."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from ..data.colors import colorize, palette
from ..errors import InputError
from .overlay import class_handles, tinted

#: Opacity of the colours over a photograph, as mmsegmentation's.
OPACITY = 0.5
#: Dots per inch of an overlay, whose photograph keeps its pixels.
DPI = 100


class PredictionWriter:
    """Writes what a network predicts: label files in the classes' colours, and overlays for looking at.

    Args:
        classes: names of the classes, at most 255.
        data: name of the data set whose colours they have, as in :func:`~dnl_ext.segmentation.data.palette`.
        predictions: folder for PNG files that hold class numbers, with the colours as their palette: labels of the
            ``plain`` layout. None writes none.
        overlays: folder for PNG files of the photograph in grey under the colours, with a legend of the classes that
            are predicted in it. None writes none.
        kept: files that are not to be written over, such as the photographs.

    Raises:
        InputError: a folder cannot be made, or both are one.

    Example:
        >>> import torch
        >>> from dnl_ext.segmentation.data import read_label
        >>> from dnl_ext.segmentation.looking import PredictionWriter
        >>> writer = PredictionWriter(("road", "sky"), "", predictions="predicted")
        >>> writer.write("a/photograph", torch.rand(3, 1, 2), torch.tensor([[1, 0]]))
        >>> read_label("predicted/a/photograph.png").tolist()
        [[1, 0]]
    """

    def __init__(
        self,
        classes: Sequence[str],
        data: str = "",
        predictions: str | Path | None = None,
        overlays: str | Path | None = None,
        kept: Iterable[Path] = (),
    ) -> None:
        self.classes: Sequence[str] = classes
        self.colors: np.ndarray[Any, Any] = palette(data, len(classes))
        self.predictions: Path | None = None if predictions is None else Path(predictions)
        self.overlays: Path | None = None if overlays is None else Path(overlays)
        self.kept: set[Path] = {path.resolve() for path in kept}
        for folder in (self.predictions, self.overlays):
            if folder is not None:
                make_folder(folder)
        if self.predictions and self.overlays and self.predictions.samefile(self.overlays):
            raise InputError(f"--overlays: expected another folder than that of the predictions, got {overlays} twice")

    def write(self, name: str, image: torch.Tensor, prediction: torch.Tensor) -> None:
        """Write the files of an image.

        Args:
            name: of the files, without ending; folders in it are made.
            image: float tensor (3, H, W) in 0 .. 1.
            prediction: predicted classes, int64 tensor (H, W).

        Raises:
            InputError: a file cannot be written, or is one to be kept.
        """
        for folder, save in ((self.predictions, self._save_numbers), (self.overlays, self._save_overlay)):
            if folder is None:
                continue
            path = folder / f"{name}.png"
            if path.resolve() in self.kept:
                raise InputError(f"{path} would be written over: expected another folder than {folder}")
            make_folder(path.parent)
            try:
                save(path, image, prediction)
            except OSError as error:
                raise InputError(f"cannot write {path}: {error.strerror or error}") from None

    def _save_numbers(self, path: Path, _image: torch.Tensor, prediction: torch.Tensor) -> None:
        picture = Image.fromarray(prediction.numpy().astype(np.uint8))
        picture.putpalette(colorize(np.arange(256), self.colors).tobytes())
        picture.save(path)

    def _save_overlay(self, path: Path, image: torch.Tensor, prediction: torch.Tensor) -> None:
        handles = class_handles([prediction], self.classes, self.colors)
        height, width = prediction.shape
        size = max(8.0, width / 100)  # of the font, in points
        longest = max(len(str(handle.get_label())) for handle in handles)
        columns = max(1, min(len(handles), int(width / (size * DPI / 72 * (0.6 * longest + 3)))))
        legend = round(size * DPI / 72 * (1.6 * -(-len(handles) // columns) + 1))
        figure = plt.figure(figsize=(width / DPI, (height + legend) / DPI), dpi=DPI)
        axis = figure.add_axes((0, legend / (height + legend), 1, height / (height + legend)))
        axis.imshow(tinted(image, prediction, self.colors, OPACITY), interpolation="nearest", aspect="auto")
        axis.axis("off")
        figure.legend(
            handles=handles, loc="lower center", ncols=columns, fontsize=size, frameon=False, handlelength=1,
            handletextpad=0.4, columnspacing=1, borderpad=0.2, borderaxespad=0.2,
        )  # fmt: skip
        try:
            figure.savefig(path)
        finally:
            plt.close(figure)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it. Raises InputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from None
