"""Files of a data folder: which images there are, which label belongs to each by its name, and what is not used."""

import os
from collections import Counter, deque
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple, TypeAlias

from ..errors import InputError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")

#: An image and its label.
Entry: TypeAlias = tuple[Path, Path]


class Files(NamedTuple):
    """Files below a folder, and how many of what else there is that is not looked into."""

    paths: list[Path]
    left_out: Counter[str]


def files_below(folder: str | Path) -> Files:
    """Sorted files below a folder as :class:`Files`, hidden ones left out.

    Symbolic links are followed, and each folder is read once, by its own path where it has one below ``folder``: images
    that were found twice could end up in training and in validation.
    """
    folder = Path(folder)
    paths: list[Path] = []
    left_out: Counter[str] = Counter()
    read, waiting = set(folder.resolve().parents), deque([folder] if folder.is_dir() else [])
    while waiting:
        current = waiting.popleft()
        if current.resolve() in read:
            left_out["links to folders read elsewhere"] += 1
            continue
        read.add(current.resolve())
        try:
            entries = list(os.scandir(current))
        except OSError as error:
            raise InputError(f"cannot read folder {current}: {error.strerror}") from None
        for entry in entries:
            if entry.is_dir() and entry.name.startswith("."):
                left_out["hidden folders"] += 1
            elif entry.is_dir():
                # Links come after all folders that are no links.
                (waiting.append if entry.is_symlink() else waiting.appendleft)(current / entry.name)
            elif entry.name.startswith("."):
                continue
            elif entry.is_file():
                paths.append(current / entry.name)
            else:
                left_out["broken links" if entry.is_symlink() else "special files"] += 1
    return Files(sorted(paths), left_out)


def images_in(folder: str | Path) -> list[Path]:
    """Sorted image files below a folder; see :func:`files_below`."""
    return [path for path in files_below(folder).paths if is_image(path)]


def is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_ENDINGS


def same_names(images: Path, labels: Path) -> list[Entry]:
    """(image, label) paths: for every image below one folder, the PNG of that name below the other.

    Raises:
        InputError: two images, such as a.jpg and a.png, have one label.
    """

    def label(path):
        lower, upper = (path.with_suffix(ending) for ending in (".png", ".PNG"))
        return upper if upper.is_file() and not lower.is_file() else lower

    found: dict[Path, Path] = {}
    for path in images_in(images):
        wanted = label(labels / path.relative_to(images))
        if wanted in found:
            raise InputError(f"images {found[wanted]} and {path} have the same label {wanted}: rename or remove one")
        found[wanted] = path
    return [(image, wanted) for wanted, image in found.items()]


def unused(images: Path, labels: Path, used: Container[Path]) -> tuple[str, ...]:
    """What two folders hold besides the images ``used``: texts such as ``labels without image (2)``."""
    (image_files, left_out), (label_files, of_labels) = files_below(images), files_below(labels)
    left_out.update(of_labels)

    def key(path, folder):
        # Cityscapes names a file by its place and what it shows, for which there are several labels.
        name = str(path.relative_to(folder).with_suffix(""))
        return name.split("_leftImg8bit")[0].split("_gtFine_")[0]

    shown, labelled = ({key(path, folder) for path in paths if is_image(path)}
                       for paths, folder in ((image_files, images), (label_files, labels)))  # fmt: skip
    for path in image_files:
        if not is_image(path):
            left_out[kind_of(path)] += 1
        elif path not in used:
            left_out["images in no split" if key(path, images) in labelled else "images without label"] += 1
    for path in label_files:
        if key(path, labels) not in shown:
            left_out["labels without image" if is_image(path) else kind_of(path)] += 1
    return tuple(f"{what} ({count})" for what, count in sorted(left_out.items()))


def kind_of(path: Path) -> str:
    return f"{path.suffix} files" if path.suffix else "files without ending"
