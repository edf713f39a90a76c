"""``dnl-ext diagnose``: measure the attention of trained networks over a data set, and write tables and pictures."""

import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..._version import __version__
from ...analysis import AttentionProbe, Estimate, remarks_on
from ...analysis.pages import Page
from ...analysis.tables import Section, sections
from ..errors import InputError, InputWarning
from ..training.config import TrainConfig
from ..training.evaluation import evaluation_data
from ..training.trained import Trained, check_classes
from ..training.trainer import Data
from .figure import choose_queries, place_of
from .maps import draw_maps, look
from .overlay import outlines


@dataclasses.dataclass
class DiagnoseSettings:
    """What :func:`diagnose` measures.

    Attributes:
        data: folder of images and labels; None is what the first checkpoint was trained on.
        layout: of the folder; None is found by its names.
        classes: number of classes; None is found from the folder.
        images: validation images to measure.
        queries: random queries per image.
        pictures: images to draw.
        seed: of the random queries.

    Example:
        >>> from dnl_ext.segmentation.looking import DiagnoseSettings
        >>> DiagnoseSettings(images=100).queries
        256
    """

    data: str | None = None
    layout: str | None = None
    classes: int | None = None
    images: int = 8
    queries: int = 256
    pictures: int = 2
    seed: int = 0


def diagnosis_data(config: TrainConfig, settings: DiagnoseSettings) -> Data:
    """The data set to measure on. Raises InputError."""
    return evaluation_data(config, settings.data, settings.layout, settings.classes, settings.images)


def diagnose(
    networks: Mapping[str, Trained],
    settings: DiagnoseSettings,
    out: str | Path,
    progress: bool = True,
    data: Data | None = None,
) -> list[Section]:
    """Measure the attention of trained networks over a data set, and write a report with pictures.

    docs/analysis.md says what is measured. The files in ``out`` are ``report.md``, ``report.json``, ``report.html`` and
    ``maps-0.png``, ``maps-1.png``, ...

    Args:
        networks: dict of :class:`~dnl_ext.segmentation.training.Trained` by title, all of the same classes.
        settings: a :class:`DiagnoseSettings`.
        out: folder, made where it does not exist.
        progress: show progress bars.
        data: the data set; None opens the one that the settings name.

    Returns:
        The report's tables, a list of :class:`dnl_ext.analysis.tables.Section`.

    Raises:
        InputError: the data does not fit the networks, or the folder cannot be written.

    Example:
        >>> from dnl_ext.segmentation.looking import DiagnoseSettings, diagnose
        >>> from dnl_ext.segmentation.training import TrainConfig, Trainer, restore
        >>> Trainer(TrainConfig(steps=1, crop=(64, 64), batch_size=1, width=4, val_images=1), "run").run()
        >>> settings = DiagnoseSettings(images=1, queries=16, pictures=0)
        >>> tables = diagnose({"mine": restore("run/checkpoint.pt")}, settings, "diagnosis", progress=False)
        >>> tables[0].title, tables[0].head
        ('Degeneration', ['figure', 'mine', 'compare with'])
    """
    out = Path(out)
    first = next(iter(networks.values()))
    data = diagnosis_data(first.config, settings) if data is None else data
    for title, trained in networks.items():
        check_classes(trained, data, title)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}") from None
    count = min(settings.images, data.validation_size)
    probes = {title: measure(trained, data, count, settings, progress) for title, trained in networks.items()}
    tables = sections({title: probe.blocks["block"].summary() for title, probe in probes.items()})
    for title, probe in probes.items():
        for remark in remarks_on(probe.blocks["block"].summary()):
            warnings.warn(InputWarning(f"{title} is {remark}"), stacklevel=2)
    pictures = [draw(out, networks, data, number) for number in range(min(settings.pictures, count))]
    facts = {
        "dnl_ext": __version__, "torch": torch.__version__, "data": data.name, "images": count,
        "queries_per_image": settings.queries, "seed": settings.seed,
    }  # fmt: skip
    entries = {
        title: {
            "variant": trained.config.variant, "temperature": trained.network.block.temperature,
            "step": trained.step, "miou": trained.miou, **probes[title].blocks["block"].to_dict(),
        }
        for title, trained in networks.items()
    }  # fmt: skip
    (out / "report.json").write_text(json.dumps({**facts, "networks": entries}, indent=1) + "\n")
    captioned = {name: f"Validation image {number}" for number, name in enumerate(pictures)}
    page = Page("Attention of trained networks", intro(facts, entries), tables, "Where queries look", captioned)
    page.write(out)
    return tables


def measure(trained: Trained, data: Data, count: int, settings: DiagnoseSettings, progress: bool) -> AttentionProbe:
    """The :class:`AttentionProbe` of one network after ``count`` validation images."""
    with AttentionProbe(trained.network, settings.queries, settings.seed) as probe:
        probe.run(Samples(data, count), progress=progress)
    if not probe.blocks:
        raise InputError(f"the block cannot be analysed: {probe.skipped['block']}")
    return probe


class Samples:
    """The first validation images of a data set as batches of one: images (1, 3, H, W), labels (1, H, W)."""

    def __init__(self, data: Data, count: int) -> None:
        self.data: Data = data
        self.count: int = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for number in range(self.count):
            image, label = self.data.validation_sample(number)
            yield image[None], label[None]


def draw(
    out: Path,
    networks: Mapping[str, Trained],
    data: Data,
    number: int,
    name: str | None = None,
    photograph: bool = True,
) -> str:
    """Draw a validation image with all networks; returns the file's name.

    Without the photograph the maps lie over the outlines of what the first network predicts.
    """
    image, label = data.validation_sample(number)
    queries = [tuple(int(x) for x in place_of(query)) for query in choose_queries(label)]
    height, width = label.shape
    queries = [(min(x, width - 1), min(y, height - 1)) for x, y in queries]
    rows = [look(trained, title, image, queries) for title, trained in networks.items()]
    name = name or f"maps-{number}.png"
    shown = image if photograph else outlines(rows[0].prediction)
    draw_maps(out / name, shown, queries, rows, data.classes, data.name)
    return name


def intro(facts: dict[str, Any], entries: dict[str, dict[str, Any]]) -> list[str]:
    """What was measured, in sentences."""
    lines = [
        f"{facts['images']} validation images of {facts['data']}, {facts['queries_per_image']} random queries each "
        f"(seed {facts['seed']}). ± is the standard error over images. docs/analysis.md says what each figure is."
    ]
    for title, entry in entries.items():
        miou = "" if entry["miou"] is None else f", mIoU {100 * entry['miou']:.1f} %"
        lines.append(f"{title}: {entry['variant']}, temperature {entry['temperature']:g}, step {entry['step']}{miou}.")
        summary = {name: Estimate(**figure) for name, figure in entry["summary"].items()}
        lines += [f"{title} is {remark}." for remark in remarks_on(summary)]
    return lines
