"""``python -m dnl_ext diagnose``: checkpoints of ``dnl-ext train``, or with ``--model`` any network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import fail, one_line_errors
from .train import parse_size

#: Validation images of a checkpoint, or images of a folder, where no number is given.
IMAGES = 8
TRAINED, NETWORK = "With checkpoints of dnl-ext train", "With any network"


@one_line_errors
def diagnose(
    checkpoint: Annotated[
        list[str] | None, typer.Argument(help="Checkpoints of dnl-ext train.", show_default=False)
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Folder of images and labels (what it was trained on).", rich_help_panel=TRAINED),
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="Layout of the folder, as in dnl-ext train.", rich_help_panel=TRAINED)
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(help="Number of classes, where the layout leaves it open.", rich_help_panel=TRAINED),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="package.module:factory of a network, such as timm:create_model.", rich_help_panel=NETWORK),
    ] = None,
    model_arg: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE of an argument of the factory; give several.", rich_help_panel=NETWORK),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="State dict of torch.save or safetensors (what the factory sets).", rich_help_panel=NETWORK),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Height x width to which images are scaled and cropped (224x224).", rich_help_panel=NETWORK),
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="R,G,B to subtract (ImageNet's 0.485,0.456,0.406).", rich_help_panel=NETWORK)
    ] = None,
    std: Annotated[
        str | None, typer.Option(help="R,G,B to divide by (ImageNet's 0.229,0.224,0.225).", rich_help_panel=NETWORK)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help=f"Most images of the folder ({IMAGES}).", rich_help_panel=NETWORK)
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            help=f"Checkpoints: number of validation images ({IMAGES}). Any network: folder of images, or one image "
            "(photographs of scikit-image)."
        ),
    ] = None,
    queries: Annotated[int, typer.Option(min=2, help="Random queries per image, of each head.")] = 256,
    pictures: Annotated[int, typer.Option(min=0, help="Images to draw.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the queries.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of PyTorch; 0 is its own choice.")] = 0,
    out: Annotated[str, typer.Option(help="Folder for report.md, report.json and report.html.")] = "runs/diagnose",
) -> None:
    """Measure the attention of trained networks: degeneration, decomposition, entropy, coupling, consistency.

    With --model: of every attention head of any network, as a page that ranks heads by how far they ignore the query.
    """
    import torch

    trained = {"CHECKPOINT": checkpoint, "--data": data, "--layout": layout, "--classes": classes}
    network = {
        "--model-arg": model_arg, "--weights": weights, "--size": size, "--mean": mean, "--std": std, "--limit": limit,
    }  # fmt: skip
    if model is None and not checkpoint:
        fail("expected CHECKPOINT, of dnl-ext train, or --model package.module:factory, got neither")
    refuse(trained if model else network, "CHECKPOINT" if model else "--model")
    if threads:
        torch.set_num_threads(threads)
    common: dict[str, Any] = {"queries": queries, "pictures": pictures, "seed": seed}
    if model:
        inputs = {"size": parse_size(size or "224x224", "--size"), "limit": limit or IMAGES}
        inputs |= {name: parse_color(text, name) for name, text in (("mean", mean), ("std", std)) if text is not None}
        of_network(model, model_arg or [], weights, images, inputs, out, common)
        return
    try:
        count = int(images or IMAGES)
    except ValueError:
        fail(f"--images: expected a number of validation images with CHECKPOINT, got {images}")
    if count < 1:
        fail(f"--images: expected at least 1, got {count}")
    of_checkpoints(checkpoint or [], {"data": data, "layout": layout, "classes": classes, "images": count}, out, common)


def refuse(given: Mapping[str, object], other: str) -> None:
    """Exit with code 2 where an option is given that does not go with the others."""
    wrong = [name for name, value in given.items() if value is not None and value != []]
    if wrong:
        fail(f"{wrong[0]} does not go with {'--model' if other == 'CHECKPOINT' else 'CHECKPOINT'}, but with {other}")


def parse_color(text: str, name: str) -> tuple[float, ...]:
    """(0.5, 0.4, 0.3) from 0.5,0.4,0.3; exits with code 2 where it is something else."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        fail(f"--{name}: expected R,G,B, such as 0.5,0.5,0.5, got {text}")


def of_checkpoints(paths: Sequence[str], chosen: dict[str, Any], out: str, common: dict[str, Any]) -> None:
    """Measure checkpoints of ``dnl-ext train``."""
    from ..segmentation.looking.diagnosis import DiagnoseSettings, diagnosis_data
    from ..segmentation.looking.diagnosis import diagnose as run
    from ..segmentation.looking.maps import row_titles
    from ..segmentation.training.trained import restore

    networks = [restore(path) for path in paths]
    titles = row_titles(paths, [network.config.variant for network in networks])
    if len(set(titles)) < len(titles):
        fail("CHECKPOINT: expected each once, in a folder of its own")
    settings = DiagnoseSettings(**chosen, **common)
    data_set = diagnosis_data(networks[0].config, settings)
    typer.echo(data_set.summary)
    console = wide_console(60 + 24 * len(networks))
    show(console, run(dict(zip(titles, networks, strict=True)), settings, out, console.is_terminal, data_set))
    typer.echo(f"{out}/report.md, {out}/report.json, {out}/report.html")


def of_network(
    factory: str,
    arguments: Sequence[str],
    weights: str | None,
    folder: str | None,
    inputs: dict[str, Any],
    out: str,
    common: dict[str, Any],
) -> None:
    """Measure a network that a factory makes."""
    from ..analysis.head_tables import head_sections
    from ..diagnosis import ImageInputs, build_model, diagnose_model

    images = ImageInputs.of_folder(folder, **inputs)
    network = build_model(factory, arguments, weights)
    console = wide_console(240)
    report = diagnose_model(network, images, out, title=factory, progress=console.is_terminal, **common)
    show(console, head_sections(report, 16))
    typer.echo(f"{Path(out, 'report.html')} ranks all {len(report.heads())} heads; report.md, report.json beside it")


def wide_console(columns: int) -> Any:
    """A rich console, of so many columns where it is no terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = columns
    return console


def show(console: Any, sections: Sequence[Any]) -> None:
    """Print :class:`dnl_ext.analysis.tables.Section` as tables."""
    from rich.table import Table

    for section in sections:
        table = Table(*section.head, title=section.title, title_justify="left")
        for line in section.rows:
            table.add_row(*line)
        console.print(table)
