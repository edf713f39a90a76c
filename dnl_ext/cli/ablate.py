"""``python -m dnl_ext ablate``."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from .errors import fail, one_line_errors
from .train import parse_size

if TYPE_CHECKING:
    from ..segmentation.experiments.ablation import Run

Value = TypeVar("Value")


def parse_list(name: str, text: str | None, kind: Callable[[str], Value]) -> tuple[Value, ...] | None:
    """(1.0, 0.05) from 1,0.05; exits with code 2 where it is something else. None stays None."""
    if text is None:
        return None
    try:
        values = tuple(kind(part.strip()) for part in text.split(","))
    except ValueError:
        fail(f"{name}: expected values with ',' between them, got {text!r}")
    if len(set(values)) < len(values):
        fail(f"{name}: expected each value once, got {text!r}")
    return values


@one_line_errors
def ablate(
    out: Annotated[str, typer.Option(help="Folder of all runs; what is done there is not done again.")] = "runs/ablate",
    recipe: Annotated[
        str,
        typer.Option(
            help="context (built-in data); cityscapes, ade20k, pascal_context: published settings; "
            "camvid, camvid_trained: a pretrained backbone, frozen and trained."
        ),
    ] = "context",
    data: Annotated[str | None, typer.Option(help="Folder of the recipe's data set.")] = None,
    variants: Annotated[
        str | None, typer.Option(help="Some of nl,pairwise,unary,dnl_shared_key,dnl,none (the recipe's).")
    ] = None,
    temperatures: Annotated[str | None, typer.Option(help="Temperatures of the logits (the recipe's).")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, each a run of its own.")] = "0,1,2",
    steps: Annotated[int | None, typer.Option(help="Updates of the weights per run (the recipe's).")] = None,
    crop: Annotated[str | None, typer.Option(help="Height x width of the crops (the recipe's).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Crops per step (the recipe's).")] = None,
    width: Annotated[int | None, typer.Option(help="Channels after the first convolution (the recipe's).")] = None,
    pretext: Annotated[int | None, typer.Option(help="Steps of the encoder alone, before (the recipe's).")] = None,
    val_images: Annotated[int | None, typer.Option(help="Validation images for the mIoU (the recipe's).")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Images to measure attention on (the recipe's).")] = None,
    backbone_weights: Annotated[str | None, typer.Option(help="File of the backbone's weights (timm's).")] = None,
    feature_cache: Annotated[str | None, typer.Option(help="Folder of a frozen backbone's features.")] = None,
    photographs: Annotated[
        bool, typer.Option(help="Draw maps over photographs, or over outlines of predictions.")
    ] = True,
    threads: Annotated[int | None, typer.Option(help="CPU threads of PyTorch (its own choice).")] = None,
    workers: Annotated[int | None, typer.Option(help="Threads that prepare images ahead (1).")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N (auto).")] = None,
) -> None:
    """Train every variant of the block at two temperatures and several seeds; write the table of the paper's talk.

    The default takes about an hour on two CPU cores. Ctrl-C saves; the same command goes on. Defaults are in
    parentheses.
    """
    from ..segmentation.errors import InputError, Interrupted
    from ..segmentation.experiments.ablation import Ablation
    from ..segmentation.experiments.ablation_pictures import draw_pictures
    from ..segmentation.experiments.ablation_report import write_report
    from ..segmentation.training.progress import TerminalProgress

    overrides = {
        "data": data, "steps": steps, "crop": parse_size(crop) if crop else None, "batch_size": batch_size,
        "width": width, "val_images": val_images, "threads": threads, "workers": workers, "device": device,
        "backbone_weights": backbone_weights, "feature_cache": feature_cache,
    }  # fmt: skip
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if pretext is not None and pretext < 0:
        raise InputError(f"--pretext must not be negative, got {pretext}")
    ablation = Ablation(
        out, recipe, overrides, parse_list("--variants", variants, str),
        parse_list("--temperatures", temperatures, float), parse_list("--seeds", seeds, int) or (), pretext, images,
    )  # fmt: skip

    def listener(title: str, first: int, total: int) -> Any:
        return TerminalProgress(title, first, total, lines=4)

    def on_result(run: "Run", result: dict[str, Any]) -> None:
        figures = result["attention"]
        own = figures.get("pairwise.own_class.mass")
        share = "" if own is None else f", pairwise on the own class {100 * own:.0f} %"
        divergence = f", JSD {figures['total.jsd']:.3f}" if "total.jsd" in figures else ""
        typer.echo(f"{run.name}: mIoU {100 * (result['miou'] or 0):.1f} %{share}{divergence}")
        write_report(ablation)

    typer.echo(f"{len(ablation.runs)} runs in {out}: {ablation.recipe.source}")
    typer.echo(ablation.data.summary)
    try:
        ablation.run(listener, on_result)
    except Interrupted as stop:
        typer.echo("stopped; all is saved, the same command goes on", err=True)
        raise typer.Exit(128 + stop.signum) from None
    pictures = draw_pictures(ablation, photographs=photographs)
    typer.echo(", ".join([f"{out}/table.md", f"{out}/results.json", f"{out}/ablation.png", *map(str, pictures)]))
