"""``python -m dnl_ext diagnose``."""

from typing import Annotated

import typer

from .errors import fail, one_line_errors


@one_line_errors
def diagnose(
    checkpoint: Annotated[list[str], typer.Argument(help="Checkpoints of dnl-ext train.", show_default=False)],
    data: Annotated[str | None, typer.Option(help="Folder of images and labels (what it was trained on).")] = None,
    layout: Annotated[str | None, typer.Option(help="Layout of the folder, as in dnl-ext train.")] = None,
    classes: Annotated[int | None, typer.Option(help="Number of classes, where the layout leaves it open.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Validation images to measure.")] = 8,
    queries: Annotated[int, typer.Option(min=2, help="Random queries per image.")] = 256,
    pictures: Annotated[int, typer.Option(min=0, help="Images to draw.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the queries.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of PyTorch; 0 is its own choice.")] = 0,
    out: Annotated[str, typer.Option(help="Folder for report.md, report.json and report.html.")] = "runs/diagnose",
):
    """Measure the attention of trained networks: degeneration, decomposition, entropy, coupling, consistency."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from ..segmentation.looking.diagnosis import DiagnoseSettings, diagnosis_data
    from ..segmentation.looking.diagnosis import diagnose as run
    from ..segmentation.looking.maps import row_titles
    from ..segmentation.training.trained import restore

    if threads:
        torch.set_num_threads(threads)
    networks = [restore(path) for path in checkpoint]
    titles = row_titles(checkpoint, [network.config.variant for network in networks])
    if len(set(titles)) < len(titles):
        fail("CHECKPOINT: expected each once, in a folder of its own")
    settings = DiagnoseSettings(data, layout, classes, images, queries, pictures, seed)
    data_set = diagnosis_data(networks[0].config, settings)
    typer.echo(data_set.summary)
    console = Console()
    if not console.is_terminal:
        console.width = 60 + 24 * len(networks)
    tables = run(dict(zip(titles, networks, strict=True)), settings, out, console.is_terminal, data_set)
    for section in tables:
        table = Table(*section.head, title=section.title, title_justify="left")
        for line in section.rows:
            table.add_row(*line)
        console.print(table)
    typer.echo(f"{out}/report.md, {out}/report.json, {out}/report.html")
