"""``python -m dnl_ext train``."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..segmentation.errors import InputError
from ..segmentation.training import distributed
from .errors import fail, one_line_errors

if TYPE_CHECKING:
    from ..segmentation.training.config import TrainConfig

RUN, DATA, NETWORK = "Run", "Data", "Network and optimizer"


def parse_size(text: str, name: str = "--crop") -> tuple[int, int]:
    """(512, 1024) from 512x1024, height first; exits with code 2 where it is something else."""
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        fail(f"{name} must be HEIGHTxWIDTH, such as 512x1024, got {text}")
    return height, width


def option(help_text: str, panel: str = NETWORK, *names: str) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=panel)


@one_line_errors
def train(
    out: Annotated[str, option("Folder for the checkpoint and log.csv.", RUN)] = "runs/train",
    resume: Annotated[bool, option("Continue the run in --out, with its settings.", RUN, "--resume")] = False,
    overwrite: Annotated[bool, option("Start anew where --out holds a checkpoint.", RUN, "--overwrite")] = False,
    init: Annotated[str | None, option("Checkpoint whose weights to begin with.", RUN)] = None,
    steps: Annotated[int | None, option("Updates of the weights (400).", RUN)] = None,
    epochs: Annotated[float | None, option("Instead of --steps: passes over the training images.", RUN)] = None,
    val_every: Annotated[int | None, option("Steps between validations, 0: at the end only (100).", RUN)] = None,
    save_every: Annotated[int | None, option("Steps between checkpoints (50).", RUN)] = None,
    seed: Annotated[int | None, option("Seed of weights, data order and augmentation (0).", RUN)] = None,
    threads: Annotated[int | None, option("CPU threads of PyTorch, in each process (its own choice).", RUN)] = None,
    device: Annotated[
        str | None, option("auto, cpu, cuda or cuda:N; under torchrun cuda is one GPU for each process (auto).", RUN)
    ] = None,
    data: Annotated[str | None, option("Folder of images and label PNGs (mosaics of photographs).", DATA)] = None,
    task: Annotated[
        str | None,
        option("Built-in data: mosaic, or context: classes that are shown elsewhere in the image (mosaic).", DATA),
    ] = None,
    layout: Annotated[
        str | None,
        option("cityscapes, ade20k, pascal-context, pascal-context-59, plain or camvid (found by folder names).", DATA),
    ] = None,
    classes: Annotated[int | None, option("Number of classes, where the layout leaves it open.", DATA)] = None,
    crop: Annotated[str | None, option("Height x width of training crops in pixels (512x1024).", DATA)] = None,
    batch_size: Annotated[int | None, option("Crops per step, shared out to all processes (2).", DATA)] = None,
    val_images: Annotated[int | None, option("Validation images to use (8 mosaics; all of a folder).", DATA)] = None,
    workers: Annotated[int | None, option("Threads that prepare images ahead, in each process (1).", DATA)] = None,
    variant: Annotated[
        str | None,
        option(
            "dnl: disentangled, dnl_shared_key: its two terms with the same keys, pairwise or unary: one term alone, "
            "nl: standard non-local, none: encoder and classifier alone (dnl)."
        ),
    ] = None,
    backend: Annotated[
        str | None,
        option("fused: memory linear in the tokens, reference: plain PyTorch with N x N maps (fused)."),
    ] = None,
    amp: Annotated[str | None, option("none, or bf16: autocast to bfloat16 (none).")] = None,
    dtype: Annotated[str | None, option("float32, or float64: slow, to compare runs (float32).")] = None,
    optimizer: Annotated[str | None, option("adamw, or sgd with momentum 0.9 (adamw).")] = None,
    lr: Annotated[float | None, option("Peak learning rate; polynomial decay, power 0.9 (0.002).")] = None,
    encoder_lr: Annotated[float | None, option("Factor on the encoder's learning rate (1).")] = None,
    weight_decay: Annotated[float | None, option("Weight decay (0.01).")] = None,
    class_weights: Annotated[
        str | None,
        option("Of the loss: balanced, median-frequency, or a JSON file of numbers for the classes (none)."),
    ] = None,
    aux_weight: Annotated[
        float | None, option("Weight of the loss of an auxiliary head on earlier features, 0: no such head (0).")
    ] = None,
    block_gain: Annotated[
        float | None, option("Initial weight of the BatchNorm behind the block; 0 starts it as the identity (0).")
    ] = None,
    temperature: Annotated[float | None, option("Divides the attention's logits (0.05, the paper's; nl: 1).")] = None,
    width: Annotated[int | None, option("Channels after the small encoder's first convolution (24).")] = None,
    channels: Annotated[int | None, option("Channels of the features that enter the block (256).")] = None,
    backbone: Annotated[
        str | None,
        option("Encoder: small, or timm:NAME, a pretrained network of timm with features at stride 8 (small)."),
    ] = None,
    backbone_weights: Annotated[str | None, option("File of the backbone's weights (timm's, downloaded).")] = None,
    freeze_backbone: Annotated[
        bool,
        option("Do not train the encoder: features of each image are computed once.", NETWORK, "--freeze-backbone"),
    ] = False,
    feature_cache: Annotated[str | None, option("Folder of these features (features in --out).")] = None,
    label_stride: Annotated[
        int | None, option("Train on every N-th pixel of the labels in each direction (1).", DATA)
    ] = None,
    stop_after: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Train a segmentation network with a non-local block, on built-in photographs or on your own folder.

    Without options it runs on mosaics of the photographs in scikit-image's wheel, 8,192 tokens per crop. Ctrl-C saves;
    --resume continues, on a CPU bit for bit. Numbers in parentheses are the defaults.

    In several processes: torchrun --nproc-per-node 2 -m dnl_ext train ... They share each batch, so the same options
    and seed give the same run, up to rounding, in any number of processes that divides --batch-size.
    """
    distributed.start()
    typed = {
        "steps": steps, "val_every": val_every, "save_every": save_every, "seed": seed, "threads": threads,
        "device": device, "data": data, "task": task, "layout": layout, "classes": classes, "batch_size": batch_size,
        "val_images": val_images, "workers": workers, "variant": variant, "backend": backend, "amp": amp, "lr": lr,
        "dtype": dtype, "optimizer": optimizer,
        "encoder_lr": encoder_lr, "weight_decay": weight_decay, "class_weights": class_weights,
        "aux_weight": aux_weight, "block_gain": block_gain, "temperature": temperature,
        "width": width, "channels": channels, "backbone": backbone, "backbone_weights": backbone_weights,
        "freeze_backbone": freeze_backbone or None, "feature_cache": feature_cache, "label_stride": label_stride,
        "crop": parse_size(crop) if crop else None,
    }  # fmt: skip
    typed = {name: value for name, value in typed.items() if value is not None}
    if resume and init:
        fail("--resume continues a run with its own weights: leave --init out")
    if steps is not None and epochs is not None:
        fail("give --steps or --epochs, not both")
    if epochs is not None and not epochs > 0:
        fail(f"--epochs must be above 0, got {epochs}")
    run(typed, out, resume=resume, overwrite=overwrite, init=init, epochs=epochs, stop_after=stop_after)


def read(
    typed: dict[str, Any], path: Path, resume: bool, overwrite: bool, init: str | None, epochs: float | None
) -> "tuple[TrainConfig, dict[str, Any]]":
    """The settings of a run, and the other arguments of its Trainer; ``path`` is that of its checkpoint.

    Raises:
        InputError: options, files or folders that cannot be used.
    """
    import dataclasses

    from ..segmentation.training import checkpoint
    from ..segmentation.training.config import resolve
    from ..segmentation.training.trainer import open_data

    if path.exists() and not resume and not overwrite:
        raise InputError(f"{path} exists: --resume continues that run, --overwrite starts anew")
    state = checkpoint.load(path) if resume else None
    if state is not None:
        checkpoint.check_parts(state, path)
    config = resolve(typed, state and state["config"], path)
    data = open_data(config)
    if epochs is not None:
        steps = max(1, math.ceil(epochs * data.epoch / config.batch_size))
        if state is not None and steps != config.steps:
            raise InputError(f"checkpoint {path} was made with --steps {config.steps}, --epochs {epochs:g} are {steps}")
        config = dataclasses.replace(config, steps=steps)
    weights = checkpoint.load(init) if init else None
    return config, {"state": state, "state_path": path, "init": weights, "init_path": init, "data": data}


def run(
    typed: dict[str, Any],
    out: str,
    *,
    resume: bool,
    overwrite: bool,
    init: str | None,
    epochs: float | None,
    stop_after: int | None,
) -> None:
    """Open everything, train, say what came out."""
    from pathlib import Path

    from ..segmentation.network import tokens
    from ..segmentation.training.config import show
    from ..segmentation.training.progress import TerminalProgress
    from ..segmentation.training.trainer import CHECKPOINT, Trainer

    path = Path(out) / CHECKPOINT
    config, options = distributed.together(read, typed, path, resume, overwrite, init, epochs)
    trainer = Trainer(config, out, **options)
    if not distributed.is_main():
        trainer.run(stop_after=stop_after)
        return
    config, data = trainer.config, trainer.data
    crops = f"{config.batch_size} crops of {show(config.crop)} ({tokens(config.crop):,} tokens)"
    processes = f"{distributed.world_size()} processes with " if distributed.is_distributed() else ""
    typer.echo(
        f"{config.variant} ({config.backend}) on {data.name}: {len(data.classes)} classes, {crops}, "
        f"{trainer.device}, {processes}{config.threads} threads"
    )
    typer.echo(data.summary)
    if trainer.class_weights is not None:
        weights = zip(data.classes, trainer.class_weights.tolist(), strict=True)
        typer.echo(f"class weights: {', '.join(f'{name} {weight:.3g}' for name, weight in weights)}")
    if trainer.step:
        typer.echo(f"resuming {path} after step {trainer.step}")
    with TerminalProgress(config.variant, trainer.step, config.steps) as progress:
        trainer.run(progress, stop_after)
    miou = "none" if trainer.miou is None else f"{100 * trainer.miou:.1f} %"
    if trainer.step < config.steps:
        typer.echo(f"stopped after step {trainer.step} of {config.steps}; {path}")
    else:
        typer.echo(f"held-out mIoU {miou} after {trainer.step} steps; {path}, {Path(out) / 'log.csv'}")
