"""`python -m dnl_ext doctor`: what was built, what runs here and why, and whether it computes the right thing."""

from typing import Annotated

import typer

from .errors import fail
from .health import DTYPE, HELP, SHAPE, report


def doctor(
    shape: Annotated[str, typer.Option(help=HELP["shape"])] = SHAPE,
    dtype: Annotated[str, typer.Option(help=HELP["dtype"])] = DTYPE,
    device: Annotated[str, typer.Option(help=HELP["device"])] = "",
    json: Annotated[bool, typer.Option("--json", help=HELP["json"])] = False,
) -> None:
    """Show versions, builds and paths, then check forward and backward against plain PyTorch. Exits 1 if broken."""
    try:
        healthy = report(shape, dtype, device, json)
    except ValueError as error:
        fail(error)
    if not healthy:
        raise typer.Exit(1)
