"""``python -m dnl_ext predict``."""

from pathlib import Path
from typing import Annotated

import typer

from ..segmentation.errors import InputError
from .errors import one_line_errors
from .evaluate import FLIP_HELP, SCALES_HELP, parse_scales


def find_images(paths: list[str]) -> dict[str, Path]:
    """Image files by the name of what is predicted for them: paths without ending, from the folder that was given.

    Raises:
        InputError: a path does not exist, a folder holds no image, or two images have one name.
    """
    from ..segmentation.data.listing import images_in

    found: dict[str, Path] = {}
    for given in map(Path, paths):
        if not given.exists():
            raise InputError(f"IMAGE: {given} does not exist")
        below = images_in(given) if given.is_dir() else [given]
        if not below:
            raise InputError(f"IMAGE: folder {given} holds no images")
        for path in below:
            name = str((path.relative_to(given) if given.is_dir() else Path(path.name)).with_suffix(""))
            if name in found:
                raise InputError(f"IMAGE: {found[name]} and {path} would both be written as {name}.png")
            found[name] = path
    return found


@one_line_errors
def predict(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint of dnl-ext train.", show_default=False)],
    image: Annotated[list[str], typer.Argument(help="Photographs, or folders of them.", show_default=False)],
    out: Annotated[
        str, typer.Option(help="Folder for PNG files of class numbers, in the classes' colours.")
    ] = "runs/predict",
    overlays: Annotated[
        str | None, typer.Option(help="Folder for the photographs under the colours, with a legend.")
    ] = None,
    scales: Annotated[str, typer.Option(help=SCALES_HELP)] = "1",
    flip: Annotated[bool, typer.Option("--flip", help=FLIP_HELP)] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of PyTorch; 0 is its own choice.")] = 0,
) -> None:
    """Predict the classes of photographs, and write them as label files and as colours over the photograph."""
    import torch
    from rich.console import Console
    from rich.progress import track

    from ..segmentation.data.files import read_image
    from ..segmentation.looking.predictions import PredictionWriter
    from ..segmentation.network import prepare
    from ..segmentation.training.prediction import predict as predict_image
    from ..segmentation.training.trained import restore
    from ..segmentation.training.trainer import pick_device

    if threads:
        torch.set_num_threads(threads)
    factors = parse_scales(scales)
    images = find_images(image)
    trained = restore(checkpoint, with_block=False)
    place = pick_device(device)
    network = prepare(trained.network, place)
    writer = PredictionWriter(trained.classes, trained.data, out, overlays, images.values())
    console = Console()
    for name, path in track(images.items(), "predict", console=console, disable=not console.is_terminal):
        pixels = read_image(path)
        predicted = predict_image(network, pixels, place, trained.config.amp, factors, flip)
        writer.write(name, pixels, predicted)
    also = "" if overlays is None else f", overlays in {overlays}"
    typer.echo(f"{len(images)} images, {len(trained.classes)} classes: predictions in {out}{also}")
