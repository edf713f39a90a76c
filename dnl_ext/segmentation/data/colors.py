"""Colours of classes in pictures: a data set's own, or colours that can be told apart."""

import functools
from typing import Any

import numpy as np

#: Colours of the data sets that have their own and use each once, in the order of their classes. (The usual palette of
#: ADE20K, that of its challenge's code, is not here: it paints road and skyscraper in one grey.)
PALETTES: dict[str, tuple[tuple[int, int, int], ...]] = {
    # The labels' definitions in cityscapesScripts (Cordts et al., 2016).
    "cityscapes": (
        (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30),
        (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142),
        (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
    ),
    # label_colors.txt of CamVid (Brostow et al., 2009).
    "camvid": (
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (0, 0, 192), (128, 128, 0), (192, 128, 128),
        (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
    ),
}  # fmt: skip

#: Colour of pixels to be ignored, and of what is not labelled, in every palette.
IGNORED = (0, 0, 0)
#: The first colours of data sets that have none of their own.
FIRST = (
    (209, 73, 91), (60, 141, 64), (237, 174, 73), (46, 111, 158), (141, 106, 159), (102, 195, 192), (127, 85, 57),
    (244, 165, 174),
)  # fmt: skip


def palette(data: str, classes: int) -> np.ndarray[Any, Any]:
    """The colours of classes in pictures.

    Data sets with colours of their own, Cityscapes and CamVid, have these. Others have colours of which any two can be
    told apart: among the first 150, and black, which marks pixels to be ignored, the least CIELAB distance (1976) is
    15.6 and the least CIEDE2000 7.9, where a difference of about 2.3 is just seen (Mahy et al., 1994).

    Args:
        data: name of the data set, as :class:`Layout` and :class:`MosaicData` have it.
        classes: number of classes, at most 255.

    Returns:
        uint8 array (classes, 3) of red, green and blue.

    Example:
        >>> from dnl_ext.segmentation.data import palette
        >>> palette("camvid", 11)[3].tolist()  # road
        [128, 64, 128]
        >>> palette("plain", 150).shape
        (150, 3)
    """
    own = PALETTES.get(data, ())
    colors = np.array(own if len(own) == classes else distinct_colors(classes), dtype=np.uint8)
    return colors.reshape(classes, 3)


@functools.cache
def distinct_colors(count: int) -> tuple[tuple[int, int, int], ...]:
    """Colours far from each other and from ``IGNORED``; fewer are the beginning of more.

    After ``FIRST`` each is, of a grid of 16 levels a channel, the one farthest from those before it (greedy, Gonzalez
    1985). The distance is the lesser of the CIELAB distance and twice CIEDE2000: the first alone takes saturated blues
    for different that look alike, the second alone takes colours that are close in CIELAB.
    """
    from skimage.color import deltaE_ciede2000, rgb2lab

    levels = np.arange(0, 256, 17)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    lab = rgb2lab(grid[None] / 255)[0]

    def distance(color):
        return np.minimum(np.linalg.norm(lab - color, axis=1), 2 * deltaE_ciede2000(lab, color[None]))

    known = rgb2lab(np.array([IGNORED, *FIRST])[None] / 255)[0]
    nearest = np.min([distance(color) for color in known], axis=0)
    colors = list(FIRST[:count])
    while len(colors) < count:
        farthest = int(nearest.argmax())
        red, green, blue = grid[farthest].tolist()
        colors.append((red, green, blue))
        nearest = np.minimum(nearest, distance(lab[farthest]))
    return tuple(colors)


def colorize(label: np.ndarray[Any, Any], colors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Class numbers (H, W) as colours: uint8 array (H, W, 3); what is no class of ``colors`` (C, 3) is black."""
    table = np.full((256, 3), IGNORED, dtype=np.uint8)
    table[: len(colors)] = colors
    return table[label]
