"""``python -m dnl_ext maps``."""

from typing import Annotated

import typer

from .errors import fail, one_line_errors


def parse_query(text: str) -> tuple[int, int]:
    """(12, 34) from 12,34; exits with code 2 where it is something else."""
    try:
        x, y = (int(part) for part in text.split(","))
    except ValueError:
        fail(f"--query: expected X,Y in pixels, such as 120,64, got {text}")
    return x, y


@one_line_errors
def maps(
    image: Annotated[str, typer.Argument(help="Photograph to look at.", show_default=False)],
    checkpoint: Annotated[
        list[str] | None, typer.Option(help="Checkpoint of dnl-ext train; give several to compare.")
    ] = None,
    query: Annotated[
        list[str] | None,
        typer.Option(help="Pixel X,Y to look from, up to 6 of them (a quarter in from each side)."),
    ] = None,
    photograph: Annotated[
        bool, typer.Option(help="Draw over the photograph, or over outlines of the first network's classes.")
    ] = True,
    out: Annotated[str, typer.Option(help="Picture to write: png, pdf or svg.")] = "maps.png",
) -> None:
    """Draw where query pixels look: pairwise, unary and total attention of trained networks, side by side."""
    from pathlib import Path

    from ..segmentation.data.files import read_image
    from ..segmentation.errors import InputError
    from ..segmentation.looking.maps import LARGEST, check_queries, draw_maps, look, row_titles
    from ..segmentation.looking.overlay import outlines
    from ..segmentation.training.trained import restore

    if not checkpoint:
        fail("--checkpoint: give at least one, as written by dnl-ext train")
    if not Path(image).is_file():
        raise InputError(f"image {image} does not exist")
    if Path(out).suffix.lower() not in (".png", ".pdf", ".svg"):
        fail(f"--out: expected a file ending in .png, .pdf or .svg, got {out}")
    pixels = read_image(image)
    height, width = pixels.shape[1:]
    if max(height, width) > LARGEST:
        raise InputError(f"image {image} is {width} x {height}: expected sides of at most {LARGEST} pixels")
    queries = [
        parse_query(text) for text in query or (f"{width // 4},{height // 2}", f"{3 * width // 4},{height // 2}")
    ]
    check_queries(queries, (height, width), image)
    networks = [restore(path) for path in checkpoint]
    if len({network.classes for network in networks}) > 1:
        fail(f"--checkpoint: expected networks of the same classes, {checkpoint[0]} and another differ")
    titles = row_titles(checkpoint, [network.config.variant for network in networks])
    rows = [look(network, title, pixels, queries) for network, title in zip(networks, titles, strict=True)]
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {Path(out).parent}: {error.strerror}") from None
    shown = pixels if photograph else outlines(rows[0].prediction)
    draw_maps(out, shown, queries, rows, networks[0].classes, networks[0].data)
    typer.echo(f"{out}: {len(rows)} networks, {len(queries)} queries, {width} x {height} pixels")
