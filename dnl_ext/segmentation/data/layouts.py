"""Which image belongs to which label: the folder layouts of Cityscapes, ADE20K, PASCAL-Context, CamVid, plain folders.

A layout is found by its folder names. Where it has no validation part of its own, every fifth training image in sorted
order is held out.
"""

import glob
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from ..errors import InputError, InputWarning
from ..metrics import IGNORE
from .files import read_label
from .listing import IMAGE_ENDINGS, Entry, images_in, same_names, unused

#: Labels that are read in advance where the number of classes is given, to see whether they are masks of 0 and 255.
LOOKED_AT = 16

CITYSCAPES_CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
#: labelIds that are evaluated, in the order of their train ids 0 .. 18.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)

#: The eleven classes that CamVid (Brostow et al., 2009) is evaluated on, in the order of SegNet's label files.
CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "sidewalk", "tree", "sign symbol", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
#: What SegNet's label files hold where CamVid has none of these classes.
CAMVID_VOID = 11


def table(pairs: Iterable[tuple[int, int]], ignored: Iterable[int]) -> np.ndarray[Any, Any]:
    """Lookup of raw label values: int16 array (256,) of class numbers, IGNORE for ``ignored``, -1 for invalid."""
    lookup = np.full(256, -1, dtype=np.int16)
    lookup[list(ignored)] = IGNORE
    for raw, number in pairs:
        lookup[raw] = number
    return lookup


class Sample(NamedTuple):
    """An image file, its label file, and what the values in the label file mean.

    Attributes:
        image: path of the image.
        label: path of the label.
        lookup: integer array (256,) from a value in the label file to its class number: ``IGNORE`` for pixels that do
            not count, -1 for values that the data set does not have.

    Example:
        >>> import numpy
        >>> from pathlib import Path
        >>> from dnl_ext.segmentation.data import Sample
        >>> Sample(Path("images/a.jpg"), Path("labels/a.png"), numpy.arange(256)).label.name
        'a.png'
    """

    image: Path
    label: Path
    lookup: np.ndarray[Any, Any]


class Layout(NamedTuple):
    """What a data folder holds.

    Attributes:
        name: of its layout, a key of ``LAYOUTS``.
        classes: names of the classes.
        train: training samples, a list of :class:`Sample`.
        val: validation samples.
        test: test samples, none where the folder has no such part.
        left_out: what in the folder is not used, texts such as ``.gif files (3)``.

    Example:
        >>> from dnl_ext.segmentation.data import Layout
        >>> Layout("plain", ("road", "sky"), [], [], [], (".gif files (3)",)).left_out
        ('.gif files (3)',)
    """

    name: str
    classes: tuple[str, ...]
    train: list[Sample]
    val: list[Sample]
    test: list[Sample]
    left_out: tuple[str, ...]


#: What a reader of a layout finds: class names, training, validation and test samples.
Found: TypeAlias = tuple[tuple[str, ...], list[Sample], list[Sample], list[Sample]]
Item = TypeVar("Item")


def samples_of(entries: Iterable[Entry], lookup: np.ndarray[Any, Any]) -> list[Sample]:
    """Samples of (image, label) paths; a label that does not exist raises InputError."""
    for image, label in entries:
        if not label.is_file():
            others = sorted(path.name for path in label.parent.glob(f"{glob.escape(label.stem)}.*"))
            found = f", found {', '.join(others)}" if others else ""
            raise InputError(f"image {image} has no label: expected {label}{found}")
    return [Sample(image, label, lookup) for image, label in entries]


def hold_out(items: list[Item]) -> tuple[list[Item], list[Item]]:
    """Split sorted samples or entries: every fifth, at least one, is for validation."""
    held = range(4, len(items), 5) or range(max(0, len(items) - 1), len(items))
    return [item for place, item in enumerate(items) if place not in held], [items[place] for place in held]


def class_names(count: int) -> tuple[str, ...]:
    return tuple(f"class {number}" for number in range(count))


def cityscapes(root: Path, _classes: int | None) -> Found:
    """leftImg8bit/{train,val}/CITY/*_leftImg8bit.png with gtFine/.../*_gtFine_labelTrainIds.png or _labelIds.png."""
    train_ids = table([(number, number) for number in range(19)], ignored=(255,))
    label_ids = table(zip(CITYSCAPES_IDS, range(19), strict=True), ignored=[*range(34), 255])

    def samples(part):
        found = []
        images = root / "leftImg8bit" / part
        for image in images_in(images):
            if not image.name.endswith("_leftImg8bit.png"):
                continue
            folder = root / "gtFine" / part / image.parent.relative_to(images)
            stem = image.name.removesuffix("leftImg8bit.png")
            by_train_id, by_id = folder / f"{stem}gtFine_labelTrainIds.png", folder / f"{stem}gtFine_labelIds.png"
            has_train_ids = by_train_id.is_file()
            label, lookup = (by_train_id, train_ids) if has_train_ids else (by_id, label_ids)
            found += samples_of([(image, label)], lookup)
        return found

    # The labels of its test part are not public: the files there mark every pixel to be ignored.
    return CITYSCAPES_CLASSES, samples("train"), samples("val"), []


def ade20k(root: Path, classes: int | None) -> Found:
    """images/{training,validation}/*.jpg with annotations/.../*.png: 0 is ignored, label n is class n - 1."""
    count = classes or 150
    lookup = table([(number + 1, number) for number in range(count)], ignored=(0, 255))

    def samples(part):
        return samples_of(same_names(root / "images" / part, root / "annotations" / part), lookup)

    return class_names(count), samples("training"), samples("validation"), []


def pascal_context(root: Path, classes: int | None) -> Found:
    """JPEGImages/*.jpg with SegmentationClassContext/*.png; lists in ImageSets/SegmentationContext/{train,val}.txt.

    60 classes, of which 0 is the background; see :func:`pascal_context_59`.
    """
    count = classes or 60
    lookup = table([(number, number) for number in range(count)], ignored=(255,))
    return class_names(count), *pascal_samples(root, lookup), []


def pascal_context_59(root: Path, classes: int | None) -> Found:
    """The files of :func:`pascal_context` with the background ignored: label n is class n - 1 of 59."""
    count = classes or 59
    lookup = table([(number + 1, number) for number in range(count)], ignored=(0, 255))
    return class_names(count), *pascal_samples(root, lookup), []


def pascal_samples(root: Path, lookup: np.ndarray[Any, Any]) -> tuple[list[Sample], list[Sample]]:
    images, labels = root / "JPEGImages", root / "SegmentationClassContext"
    lists = [root / "ImageSets" / "SegmentationContext" / f"{part}.txt" for part in ("train", "val")]

    def samples(names):
        return samples_of([(images / f"{name}.jpg", labels / f"{name}.png") for name in names], lookup)

    if all(file.is_file() for file in lists):
        train, val = (samples(file.read_text().split()) for file in lists)
        return train, val
    return hold_out(samples([path.stem for path in sorted(labels.glob("[!.]*.png")) if path.is_file()]))


def camvid(root: Path, _classes: int | None) -> Found:
    """The folders of :func:`plain` with CamVid's eleven classes: 255 is ignored, and so is SegNet's 11."""
    lookup = table([(number, number) for number in range(len(CAMVID_CLASSES))], ignored=(CAMVID_VOID, 255))
    train, val, test = (samples_of(entries, lookup) for entries in split_entries(root))
    return CAMVID_CLASSES, train, val, test


def plain(root: Path, classes: int | None) -> Found:
    """images/ with labels/ of the same names (.png), split as :func:`split_entries` says.

    Label values are class numbers, 255 is ignored. Without ``classes`` the labels for training and validation are read
    once to count them.
    """
    labels = root / "labels"
    splits = split_entries(root)
    paths = [label for entries in splits[:2] for _, label in entries]
    if not paths:
        return (), [], [], []
    lookup = table([(number, number) for number in range(classes or 255)], ignored=(255,))
    train, val, test = (samples_of(entries, lookup) for entries in splits)
    read = paths if classes is None else paths[:: -(-len(paths) // LOOKED_AT)]
    greatest, ignored = -1, False
    for raw in map(read_label, read):
        counted = raw[raw != IGNORE]
        greatest, ignored = max(greatest, int(counted.max(initial=-1))), ignored or counted.size < raw.size
    if greatest == 0 and ignored and classes != 1:
        warn_of_masks(labels, len(read), len(paths))
    if classes is None:
        classes = 1 + greatest
        if not 0 < classes <= 255:
            raise InputError(f"{labels}: expected label values 0 .. 254 and 255, got {classes - 1} as the greatest"
                             if classes else f"{labels} holds no labelled pixel")  # fmt: skip
        lookup[classes:IGNORE] = -1
    return class_names(classes), train, val, test


def split_entries(root: Path) -> list[list[Entry]]:
    """Entries of images/ and labels/ for training, validation and test.

    These are the folders train/, val/ and test/ in both. Without val/ a fifth is held out, of train/ where there is a
    test/, of all files otherwise. A test/ without labels is none.
    """
    images, labels = root / "images", root / "labels"
    has_train, has_val, has_test = ((images / split).is_dir() for split in ("train", "val", "test"))
    has_test = has_test and (labels / "test").is_dir()

    def entries(split):
        return same_names(images / split, labels / split)

    if not has_train or not (has_val or has_test):
        return [*hold_out(entries("")), []]
    train, val = (entries("train"), entries("val")) if has_val else hold_out(entries("train"))
    return [train, val, entries("test") if has_test else []]


def warn_of_masks(labels: Path, read: int, count: int) -> None:
    """Warn of labels that hold 0 and 255 alone, as black and white masks do; ``read`` of ``count`` were looked at."""
    which = f"{read} of {count} labels" if read < count else "all labels"
    text = (
        f"{which} in {labels} hold the values 0 and 255 alone, and 255 marks pixels to ignore, so that class 0 is the "
        "only one; if 255 is a class, store 1 instead: Image.fromarray((np.array(mask) == 255).astype(np.uint8))"
    )
    warnings.warn(InputWarning(text), stacklevel=4)


#: Layout name -> the folders it is known by, and its reader (root, classes or None). Of layouts with the same folders
#: the first is found by their names, the others have to be named.
LAYOUTS: dict[str, tuple[tuple[str, str], Callable[[Path, int | None], Found]]] = {
    "cityscapes": (("leftImg8bit", "gtFine"), cityscapes),
    "ade20k": (("images", "annotations"), ade20k),
    "pascal-context": (("JPEGImages", "SegmentationClassContext"), pascal_context),
    "pascal-context-59": (("JPEGImages", "SegmentationClassContext"), pascal_context_59),
    "plain": (("images", "labels"), plain),
    "camvid": (("images", "labels"), camvid),
}


def find_layout(root: str | Path, layout: str | None = None, classes: int | None = None) -> Layout:
    """Read the file lists of a data folder.

    Args:
        root: the folder; one level below it is looked at too (ADEChallengeData2016, VOC2010).
        layout: a key of ``LAYOUTS``; None finds it by the folder names.
        classes: number of classes where the layout leaves it open; None is the layout's own number.

    Returns:
        A :class:`Layout`.

    Raises:
        InputError: the folder is missing, has no known layout, or has images without labels or no images.

    Example:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from dnl_ext.segmentation.data import find_layout
        >>> for name in ("images/a.jpg", "images/b.jpg", "labels/a.png", "labels/b.png"):
        ...     Path(name).parent.mkdir(exist_ok=True)
        ...     Image.new("RGB" if "images" in name else "L", (8, 8)).save(name)
        >>> found = find_layout(".")
        >>> found.name, found.classes, len(found.train), len(found.val)
        ('plain', ('class 0',), 1, 1)
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"data folder {root} does not exist" if not root.exists() else f"{root} is not a folder")
    if layout is not None and layout not in LAYOUTS:
        raise InputError(f"--layout must be one of {', '.join(LAYOUTS)}, got {layout}")
    if classes is not None and not 0 < classes <= 255:
        raise InputError(f"--classes must be 1 .. 255, got {classes}")
    names = [layout] if layout else list(LAYOUTS)
    for base in (root, *sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))):
        for name in names:
            folders, reader = LAYOUTS[name]
            if not all((base / folder).is_dir() for folder in folders):
                continue
            class_names, train, val, test = reader(base, classes)
            left_out = unused(base / folders[0], base / folders[1], {sample.image for sample in (*train, *val, *test)})
            if not train or not val:
                counts = f"{len(train)} training and {len(val)} validation images"
                found = f", left out: {', '.join(left_out)}" if left_out else ""
                wanted = "at least 1 of each is needed, ending in " + ", ".join(IMAGE_ENDINGS)
                raise InputError(f"{base} ({name} layout) has {counts}{found}: {wanted}")
            return Layout(name, class_names, train, val, test, left_out)
    wanted = dict.fromkeys(" and ".join(LAYOUTS[name][0]) for name in names)
    raise InputError(f"data folder {root} has no known layout: expected the folders {', or '.join(wanted)}")
