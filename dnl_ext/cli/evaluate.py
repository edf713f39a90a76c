"""``python -m dnl_ext evaluate``."""

from typing import Annotated

import typer

from .errors import fail, one_line_errors

SCALES_HELP = "Factors on the image's sides, whose probabilities are averaged, such as 0.5,0.75,1,1.25,1.5,1.75."
FLIP_HELP = "Average over the mirrored image too."


def parse_scales(text: str) -> list[float]:
    """[0.5, 1.0] from 0.5,1; exits with code 2 where it is something else."""
    from ..segmentation.training.prediction import check_scales

    try:
        scales = [float(part) for part in text.split(",")]
    except ValueError:
        fail(f"--scales: expected numbers such as 0.75,1,1.25, got {text}")
    check_scales(scales)
    return scales


def percent(value: float | None) -> str:
    """0.123 as 12.3, None as -."""
    return "-" if value is None else f"{100 * value:.1f}"


@one_line_errors
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint of dnl-ext train.", show_default=False)],
    split: Annotated[str, typer.Option(help="Part of the folder to measure: val, or test where it has one.")] = "val",
    data: Annotated[str | None, typer.Option(help="Folder of images and labels (what it was trained on).")] = None,
    layout: Annotated[str | None, typer.Option(help="Layout of the folder, as in dnl-ext train.")] = None,
    classes: Annotated[int | None, typer.Option(help="Number of classes, where the layout leaves it open.")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Images to use, spread evenly (all).")] = None,
    scales: Annotated[str, typer.Option(help=SCALES_HELP)] = "1",
    flip: Annotated[bool, typer.Option("--flip", help=FLIP_HELP)] = False,
    predictions: Annotated[
        str | None, typer.Option(help="Folder for PNG files of predicted class numbers, in the classes' colours.")
    ] = None,
    overlays: Annotated[
        str | None, typer.Option(help="Folder for the images under the predicted colours, with a legend.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of PyTorch; 0 is its own choice.")] = 0,
    json: Annotated[str | None, typer.Option(help="File to write all figures to.")] = None,
) -> None:
    """Measure a trained network on the validation or the test images of a folder: IoU and accuracy of every class."""
    from json import dumps

    import torch
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from ..segmentation.data import FolderData
    from ..segmentation.looking.predictions import PredictionWriter
    from ..segmentation.training.evaluation import evaluate as measure
    from ..segmentation.training.evaluation import evaluation_data
    from ..segmentation.training.trained import check_classes, restore

    if threads:
        torch.set_num_threads(threads)
    factors = parse_scales(scales)
    trained = restore(checkpoint, with_block=False)
    found = evaluation_data(trained.config, data, layout, classes, images, split)
    check_classes(trained, found, checkpoint)
    if json is not None:
        write(json, "", "a")  # an evaluation can take long: what cannot be written is said before it
    typer.echo(found.summary)
    samples = [*found.train, *found.val] if isinstance(found, FolderData) else []
    kept = [path for sample in samples for path in (sample.image, sample.label)]
    writer = PredictionWriter(found.classes, found.name, predictions, overlays, kept)
    console = Console()
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(split, total=found.validation_size)

        def each(number: int, image: torch.Tensor, prediction: torch.Tensor) -> None:
            writer.write(found.validation_name(number), image, prediction)
            progress.advance(task)

        confusion = measure(trained, found, device, factors, flip, each)
    iou, accuracy = confusion.iou(), confusion.accuracy()
    present = confusion.counts.sum(1)
    shares = (present / present.sum().clamp(min=1)).tolist()
    table = Table("class", "IoU, %", "accuracy, %", "of the pixels, %")
    for name, *values in zip(found.classes, iou, accuracy, shares, strict=True):
        table.add_row(name, *map(percent, values))
    console.print(table)
    means = {"mIoU": confusion.miou(), "mAcc": confusion.mean_accuracy(), "aAcc": confusion.pixel_accuracy()}
    typer.echo("  ".join(f"{name} {percent(value)} %" for name, value in means.items()))
    if json is not None:
        content = {
            "checkpoint": checkpoint, "data": found.name, "split": split, "images": found.validation_size,
            "scales": factors, "flip": flip, **means,
            "classes": {
                name: {"iou": i, "accuracy": a, "pixels": int(p)}
                for name, i, a, p in zip(found.classes, iou, accuracy, present, strict=True)
            },
        }  # fmt: skip
        write(json, dumps(content, indent=1) + "\n")


def write(path: str, text: str, mode: str = "w") -> None:
    """Write a file, or append to it with the mode "a". Raises InputError."""
    from ..segmentation.errors import InputError

    try:
        with open(path, mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InputError(f"--json: cannot write {path}: {error.strerror}") from None
