"""The demonstration: train both blocks briefly, measure them, draw where they look, write it down.

An encoder is trained alone first, then each block is added to a copy of it and all is trained on, so that the short
time goes where the two differ; a third copy goes on alone, for comparison. Training uses small crops; memory,
validation and the picture use full ones.
"""

import dataclasses
import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..._version import __version__
from ...analysis import attention_rows
from ..backbones import SMALL
from ..data.mosaic import MosaicData
from ..errors import InputError
from ..looking.class_focus import focus, token_labels
from ..looking.figure import Rows, choose_queries, class_share, draw
from ..network import tokens
from ..training.config import TrainConfig
from ..training.progress import TerminalProgress
from ..training.trainer import FEATURES, Trainer, open_data
from .demo_report import write_report
from .memory import measure_step

VARIANTS = ("nl", "dnl")
TITLES = {"none": "encoder, on alone", "nl": "encoder + nl", "dnl": "encoder + dnl"}


@dataclasses.dataclass
class DemoSettings:
    """Settings of the demonstration. Sizes are (height, width) in pixels.

    Attributes:
        encoder_steps: updates of the encoder's weights alone, before the blocks are added.
        steps: updates of each network after that.
        crop: size of the training images.
        batch_size: training images per step.
        full: size of the images for validation, memory and picture.
        val_images: number of validation images.
        encoder_peak_lr: learning rate of the encoder alone, at its peak.
        lr: learning rate after that.
        block_gain: initial weight of the BatchNorm behind the block.
        width: channels after the encoder's first convolution.
        seed: of weights and training images.
        threads: of PyTorch on the CPU; 0 is its own choice.
        device: "auto", "cpu", "cuda" or "cuda:N".
        picture: number of the held-out image that is drawn.
        memory: whether peak memory is measured, of a step on ``full`` images of the built-in data; it takes some
            processes of their own.
        data: folder of images and labels; None is the built-in photographs.
        layout: of the folder; None is found by its names.
        backbone: "small", the encoder that is trained here, or "timm:NAME", a pretrained one, which is frozen. With
            ``data`` alone.
        backbone_weights: file of its weights; None is timm's own.

    Example:
        >>> from dnl_ext.segmentation.experiments import DemoSettings
        >>> DemoSettings(steps=1000, memory=False).full
        (512, 1024)
    """

    encoder_steps: int = 300
    steps: int = 70
    crop: tuple[int, ...] = (256, 512)
    batch_size: int = 4
    full: tuple[int, ...] = (512, 1024)
    val_images: int = 12
    encoder_peak_lr: float = 3e-3
    lr: float = 5e-4
    block_gain: float = 1.0
    width: int = 24
    seed: int = 0
    threads: int = 0
    device: str = "auto"
    picture: int = 4
    memory: bool = True
    data: str | None = None
    layout: str | None = None
    backbone: str = SMALL
    backbone_weights: str | None = None


def run_demo(out: str | Path, settings: DemoSettings | None = None) -> dict[str, Any]:
    """Train a standard and a disentangled block briefly, and write what came of it.

    The files in ``out`` are ``metrics.json``, ``attention.png`` and ``report.md``.

    Args:
        out: folder, made where it does not exist.
        settings: a :class:`DemoSettings`.

    Returns:
        The content of ``metrics.json`` as a dict.

    Raises:
        InputError: the folder cannot be written, or a setting cannot be used.
        Interrupted: Ctrl-C or SIGTERM.

    Example:
        >>> from dnl_ext.segmentation.experiments import DemoSettings, run_demo
        >>> tiny = DemoSettings(encoder_steps=2, steps=1, crop=(64, 64), batch_size=1, full=(64, 128), val_images=1,
        ...                     width=4, picture=0, memory=False)
        >>> metrics = run_demo("demo", tiny)  # doctest: +ELLIPSIS
        encoder: step 1/2 ...
        >>> sorted(metrics["variants"])
        ['dnl', 'nl']
    """
    settings = settings or DemoSettings()
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}") from None
    clock = Clock()
    base = TrainConfig(
        steps=settings.encoder_steps, crop=settings.crop, batch_size=settings.batch_size, lr=settings.encoder_peak_lr,
        width=settings.width, seed=settings.seed, threads=settings.threads, device=settings.device, val_every=0,
        variant="none", workers=1,
    )  # fmt: skip
    trained = dataclasses.replace(base, **on_folder(settings, out))
    data = MosaicData(settings.full, settings.val_images) if settings.data is None else open_data(trained)
    encoder = Trainer(trained, data=data)
    train(encoder, "encoder")
    start = encoder.state()
    clock.lap("encoder")

    trainers = {}
    for variant in ("none", *VARIANTS):
        config = dataclasses.replace(
            trained, variant=variant, steps=settings.steps, lr=settings.lr, block_gain=settings.block_gain
        )
        trainers[variant] = Trainer(config, data=data, init=start, init_path="encoder")
        train(trainers[variant], TITLES[variant])
        clock.lap(variant)

    metrics = describe(settings, encoder)
    metrics["encoder_start"] = results(encoder)
    metrics["encoder_alone"] = results(trainers.pop("none"))
    metrics["variants"] = {variant: results(trainer) for variant, trainer in trainers.items()}
    for variant, trainer in trainers.items():
        metrics["variants"][variant]["attention"] = focus(trainer)._asdict()
    clock.lap("attention statistics")
    metrics["picture"] = draw_attention(out / "attention.png", settings, trainers)
    clock.lap("picture")
    if settings.memory:
        add_memory(metrics, dataclasses.replace(base, crop=settings.full, batch_size=1))
        clock.lap("memory")
    metrics["phases_seconds"] = clock.laps | {"total": round(sum(clock.laps.values()), 1)}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    write_report(out / "report.md", metrics)
    return metrics


def on_folder(settings: DemoSettings, out: Path) -> dict[str, Any]:
    """What the settings of the trainings have besides, where the data is a folder. Raises InputError."""
    if settings.data is None:
        if settings.layout is not None or settings.backbone != SMALL or settings.backbone_weights is not None:
            raise InputError("--layout, --backbone and --backbone-weights belong to --data DIR")
        return {}
    found: dict[str, Any] = {
        "data": settings.data, "layout": settings.layout, "val_images": settings.val_images,
        "backbone": settings.backbone, "backbone_weights": settings.backbone_weights,
    }  # fmt: skip
    if settings.backbone != SMALL:
        found |= {"freeze_backbone": True, "feature_cache": str(out / FEATURES), "channels": 128, "label_stride": 4}
    return found


class Clock:
    """Wall seconds of the phases, in ``laps``."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last: float = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = round(now - self.last, 1), now


def train(trainer: Trainer, title: str) -> None:
    with TerminalProgress(title, 0, trainer.config.steps, lines=5) as progress:
        trainer.run(progress)


def results(trainer: Trainer) -> dict[str, Any]:
    """What a training came to; ``iou`` per class, None where a class was neither present nor predicted."""
    assert trainer.confusion is not None  # a finished run has been validated
    iou = dict(zip(trainer.data.classes, trainer.confusion.iou(), strict=True))
    return {
        "miou": trainer.miou,
        "iou": iou,
        "seconds_per_step": trainer.seconds_per_step(),
        "parameters": sum(parameter.numel() for parameter in trainer.network.parameters()),
    }


def describe(settings: DemoSettings, trainer: Trainer) -> dict[str, Any]:
    """Versions, machine, shapes and seeds."""
    cuda = trainer.device.type == "cuda"
    return {
        "versions": {
            "dnl_ext": __version__, "torch": torch.__version__, "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name(trainer.device) if cuda else f"cpu ({platform.machine()})",
        "cpu_count": os.cpu_count(),
        "threads": trainer.config.threads,
        "seed": settings.seed,
        "shapes": {
            "training": {"batch": settings.batch_size, "crop": list(settings.crop), "tokens": tokens(settings.crop)},
            "full": {"batch": 1, "crop": list(settings.full), "tokens": tokens(settings.full)},
        },
        "training": {
            "encoder_steps": settings.encoder_steps, "encoder_lr": settings.encoder_peak_lr,
            "steps": settings.steps, "lr": settings.lr, "block_gain": settings.block_gain,
        },
        "data": {
            "name": trainer.data.name, "classes": list(trainer.data.classes),
            "validation_images": trainer.data.validation_size, "builtin": settings.data is None,
            "backbone": settings.backbone,
        },
    }  # fmt: skip


def add_memory(metrics: dict[str, Any], config: TrainConfig) -> None:
    """Measure a full-size step of the encoder alone, and of each variant with each backend."""
    plain = measure_step(dataclasses.replace(config, variant="none"))
    metrics["encoder_alone"]["full_step"] = plain
    for variant, entry in metrics["variants"].items():
        steps = {
            backend: measure_step(dataclasses.replace(config, variant=variant, backend=backend))
            for backend in ("fused", "reference")
        }
        entry["full_step"] = steps
        entry["peak_step_bytes"] = {backend: step.get("peak_bytes") for backend, step in steps.items()}


def draw_attention(path: Path, settings: DemoSettings, trainers: Mapping[str, Trainer]) -> dict[str, Any]:
    """Draw the picture and return what it shows in numbers."""
    any_trainer = trainers["dnl"]
    number = min(settings.picture, any_trainer.data.validation_size - 1)
    image, label = any_trainer.data.validation_sample(number)
    labels, queries = token_labels(label), choose_queries(label)
    classes, rows = any_trainer.data.classes, []
    for variant, trainer in trainers.items():
        trainer.network.eval()
        with torch.no_grad():
            features = trainer.network.features(image[None].to(trainer.device))
        maps = attention_rows(trainer.network.block, features, [(query.row, query.column) for query in queries])
        assert maps.own is not None  # a block without a learned gain
        shares = [class_share(m, labels, query.kind) for m, query in zip(maps.own, queries, strict=True)]
        rows.append(Rows(variant, maps, shares))
    shown = "Held-out mosaic of photographs" if settings.data is None else f"Validation image {number}"
    draw(path, image, label, any_trainer.predict(image), classes, queries, rows, shown, any_trainer.data.name)
    return {
        "validation_image": number,
        "queries": [
            {
                "name": "AB"[number],
                "token": [query.row, query.column],
                "class": classes[query.kind],
                "class_area": float((labels == query.kind).float().mean()),
                "same_class": {row.variant: row.shares[number] for row in rows},
            }
            for number, query in enumerate(queries)
        ],
    }
