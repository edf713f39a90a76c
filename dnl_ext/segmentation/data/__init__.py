"""Images and labels: the built-in ones, and those of folders.

A data set has ``training_sample(seed, index, crop)`` and ``validation_sample(index)``, which give an image and its
label; :class:`MosaicData` says what else. Nothing is downloaded.
"""

from .colors import palette
from .context import ContextData, Mosaic, PretextData
from .files import read_image, read_label
from .folders import FolderData, read_sample
from .layouts import LAYOUTS, Layout, Sample, find_layout
from .mosaic import PHOTOGRAPHS, MosaicData, Photograph

__all__ = [
    "LAYOUTS",
    "PHOTOGRAPHS",
    "ContextData",
    "FolderData",
    "Layout",
    "Mosaic",
    "MosaicData",
    "Photograph",
    "PretextData",
    "Sample",
    "find_layout",
    "palette",
    "read_image",
    "read_label",
    "read_sample",
]
