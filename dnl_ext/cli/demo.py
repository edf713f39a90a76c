"""``python -m dnl_ext demo``."""

from typing import Annotated

import typer

from .errors import one_line_errors


@one_line_errors
def demo(
    out: Annotated[str, typer.Option(help="Folder for metrics.json, attention.png and report.md.")] = "runs/demo",
    seed: Annotated[int, typer.Option(help="Seed of weights and training images.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads of PyTorch; 0 is its own choice.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Measure peak memory too.")] = True,
    data: Annotated[str | None, typer.Option(help="Folder of images and labels, in place of the photographs.")] = None,
    layout: Annotated[str | None, typer.Option(help="Layout of the folder, as in dnl-ext train.")] = None,
    backbone: Annotated[
        str, typer.Option(help="small, which is trained here, or timm:NAME, pretrained and frozen; with --data.")
    ] = "small",
    backbone_weights: Annotated[str | None, typer.Option(help="File of the backbone's weights (timm's).")] = None,
    small: Annotated[bool, typer.Option(hidden=True, help="A few tiny steps, for tests.")] = False,
):
    """Train a standard and a disentangled non-local block briefly on photographs; write a picture and a report.

    Takes a few minutes on two CPU cores. With --data DIR it is on the images of a folder.
    """
    from ..segmentation.experiments.demo import DemoSettings, run_demo

    sizes = {"encoder_steps": 2, "steps": 2, "crop": (64, 128), "full": (128, 256), "val_images": 1, "picture": 0,
             "batch_size": 2, "width": 8} if small else {}  # fmt: skip
    folder = {"data": data, "layout": layout, "backbone": backbone, "backbone_weights": backbone_weights}
    metrics = run_demo(out, DemoSettings(seed=seed, threads=threads, device=device, memory=memory, **folder, **sizes))
    for variant, entry in metrics["variants"].items():
        peaks = {name: f"{value / 1e6:,.0f} MB" for name, value in entry.get("peak_step_bytes", {}).items() if value}
        typer.echo(
            f"{variant}: held-out mIoU {100 * entry['miou']:.1f} %, attention on the own class "
            f"{100 * entry['attention']['same_class']:.0f} %"
            + "".join(f", {name} step {value}" for name, value in peaks.items())
        )
    typer.echo(f"{metrics['phases_seconds']['total']:.0f} s; {out}/report.md, {out}/attention.png, {out}/metrics.json")
