"""The report of a network's attention heads: tables, pictures, and numbers for a program."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from .._version import __version__
from ..analysis import ModelReport, measure_model
from ..analysis.head_tables import head_sections
from ..analysis.pages import Page
from ..integrations import convert
from ..segmentation.errors import InputError, described
from .images import ImageInputs
from .pictures import draw_heads, draw_maps

#: Heads in the table of a page; report.json has all.
HEADS = 40

NO_ATTENTION = (
    "makes no call of F.scaled_dot_product_attention or nn.MultiheadAttention, and has no non-local block that is "
    "known; attention by matrix products of its own is not seen (in timm set TIMM_FUSED_ATTN=2, in transformers "
    "attn_implementation='sdpa')"
)


def diagnose_model(
    model: nn.Module,
    images: ImageInputs,
    out: str | Path,
    *,
    title: str | None = None,
    queries: int = 256,
    pictures: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> ModelReport:
    """Measure every attention head of a network over images, and write a report that ranks them.

    What is measured says :func:`dnl_ext.analysis.measure_model`, which also takes networks of other inputs. Blocks that
    :func:`dnl_ext.integrations.convert` knows are replaced in the model, which leaves its results as they are. The
    files in ``out`` are ``report.md``, ``report.html``, ``report.json``, ``heads.png``, ``maps-0.png``, ``maps-1.png``,
    ...

    Args:
        model: an nn.Module that is called with images (1, 3, H, W).
        images: an :class:`ImageInputs`.
        out: folder, made where it does not exist.
        title: name of the network; None is that of its class.
        queries: random queries of each head and image.
        pictures: images to draw maps of.
        seed: of the random queries.
        progress: show a progress bar.

    Returns:
        The :class:`dnl_ext.analysis.ModelReport`.

    Raises:
        InputError: the network does not take the images or has no attention, or the folder cannot be written.

    Example:
        >>> import os, torch
        >>> from PIL import Image
        >>> from dnl_ext.diagnosis import ImageInputs, diagnose_model
        >>> class Patches(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.patches = torch.nn.Conv2d(3, 16, 8, 8)
        ...         self.layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        ...     def forward(self, images):
        ...         return self.layer(self.patches(images).flatten(2).transpose(1, 2))
        >>> Image.effect_noise((64, 64), 60).convert("RGB").save("a.png")
        >>> report = diagnose_model(Patches(), ImageInputs(["a.png"], (64, 64)), "diagnosis")
        >>> list(report.layers), sorted(os.listdir("diagnosis"))[0]
        (['layer.self_attn'], 'heads.png')
    """
    out, title = Path(out), type(model).__name__ if title is None else title
    model = convert(model).model.eval()
    try_model(model, images)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}") from None
    report = measure_model(model, images, queries=queries, seed=seed, progress=progress)
    if not report.layers:
        left_out = "; ".join(f"{name or '(the model)'}: {reason}" for name, reason in report.skipped.items())
        raise InputError(f"{title} " + (f"has no attention to measure: {left_out}" if left_out else NO_ATTENTION))
    if not any(summary for _, _, summary in report.heads()):
        raise InputError(f"{title}: its attention is not finite in any head: look at its weights, --mean and --std")
    drawn = {"heads.png": "Heads by layer"}
    draw_heads(out / "heads.png", report, title)
    for number in range(min(pictures, len(images))):
        if draw_maps(out / f"maps-{number}.png", model, images, number, report):
            drawn[f"maps-{number}.png"] = f"Where heads look, image {number}"
    facts = {
        "dnl_ext": __version__, "torch": torch.__version__, "model": title, "size": list(images.size),
        "images": [path.name for path in images.paths], "queries_per_image": queries, "seed": seed,
    }  # fmt: skip
    (out / "report.json").write_text(json.dumps({**facts, **report.to_dict()}, indent=1) + "\n", encoding="utf-8")
    tables = head_sections(report, HEADS)
    Page(f"Attention heads of {title}", intro(report, images, queries, seed), tables, "Pictures", drawn).write(out)
    return report


@torch.no_grad()
def try_model(model: nn.Module, images: ImageInputs) -> None:
    """One forward as it is, so that what fails there is the network's own. Raises InputError."""
    device = next((x.device for x in model.parameters()), torch.device("cpu"))
    image = next(iter(images)).to(device)
    try:
        model(image)
    except MemoryError:
        raise
    except Exception as error:  # a network's forward is any code
        size = "x".join(map(str, images.size))
        raise InputError(f"the model fails on an image of --size {size}: {described(error)}") from error


def intro(report: ModelReport, images: ImageInputs, queries: int, seed: int) -> Sequence[str]:
    """What was measured, in sentences."""
    count = len(report.heads())
    height, width = images.size
    measured = [image for layer in report.layers.values() for head in layer.heads for image in head.images]
    most = max(image.sampled for image in measured)
    lines = [
        f"{count} heads in {len(report.layers)} layers; {len(images)} images, scaled and cropped to {height} x {width} "
        f"pixels; up to {most} random queries of each head and image (seed {seed}). ± is the standard error over "
        "images.",
        "docs/analysis.md says what each figure is. The table ranks heads by the Jensen-Shannon divergence of the maps "
        "of two queries: at 0 a head looks at the same places whatever it is asked.",
    ]
    return lines
