"""The demonstration's report: every number in it comes from ``metrics.json``."""

from pathlib import Path
from typing import Any

from ...analysis.tables import markdown_lines


def percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


def peak(step: dict[str, Any]) -> str:
    """Peak memory of a measured step, or why there is none."""
    return megabytes(step["peak_bytes"]) if "peak_bytes" in step else f"did not run ({step['error']})"


def shape(entry: dict[str, Any]) -> str:
    """Image size and tokens."""
    height, width = entry["crop"]
    return f"{height} x {width} pixels, {entry['tokens']:,} tokens"


def text(paragraph: str) -> str:
    """A paragraph on one line, as Markdown wants it."""
    return " ".join(paragraph.split())


def kind_of(metrics: dict[str, Any]) -> str:
    """What an image of the data is called."""
    return "mosaic" if metrics["data"]["builtin"] else "image"


def picture_section(metrics: dict[str, Any]) -> list[str]:
    picture, lines = metrics["picture"], []
    for query in picture["queries"]:
        kind, area = query["class"], percent(query["class_area"], 0)
        shares = ", ".join(f"`{variant}` {percent(share, 0)}" for variant, share in query["same_class"].items())
        lines.append(f"- {query['name']} lies on {kind}, {area} of the image. Its attention on {kind}: {shares}.")
    return [
        "![Where two pixels look, with either block](attention.png)",
        "",
        text("""Heat is attention. The top row is the input, its true classes and the prediction with `dnl`. Below, each
            row is one block: where it looks from pixel A, where from pixel B, and its unary map, which all pixels
            share."""),
        "",
        *lines,
        "",
        text(f"""The picture is held-out {kind_of(metrics)} {picture["validation_image"]}. A and B are the middles of
            the largest cells of two classes that occur in several cells; they are chosen from the true classes
            alone."""),
        "",
    ]


def training_section(metrics: dict[str, Any]) -> list[str]:
    def row(name, entry):
        focus = entry.get("attention")
        shares = (percent(focus["same_class"]), f"{focus['variety']:.2f}") if focus else ("", "")
        return (name, percent(entry["miou"]), seconds(entry["seconds_per_step"]), *shares)

    variants = metrics["variants"]
    uniform = percent(variants["dnl"]["attention"]["uniform"])
    rows = [
        row("encoder at the start", metrics["encoder_start"]),
        row("encoder, trained on alone", metrics["encoder_alone"]),
        *(row(f"encoder + `{variant}`, trained on", entry) for variant, entry in variants.items()),
    ]
    head = ("network", "held-out mIoU", "time per step", "attention on own class", "difference between maps")
    return [
        "## Training",
        "",
        *markdown_lines(head, rows),
        "",
        text(f"""mIoU is over {metrics["data"]["validation_images"]} held-out {kind_of(metrics)}s, attention over the
            first {metrics["variants"]["dnl"]["attention"]["images"]} of them. Attention spread evenly would have
            {uniform} on the query's own class. The difference between maps is the mean total variation distance of the
            queries' maps from the image's mean map: 0 if all pixels look at the same places, 1 if each looks elsewhere.
            Both are measures of this library, not of the paper, whose definition is not public."""),
        "",
    ]


def memory_section(metrics: dict[str, Any]) -> list[str]:
    """Empty where memory was not measured."""
    variants, alone = metrics["variants"], metrics["encoder_alone"].get("full_step")
    if alone is None:
        return []
    rows = [("encoder alone", peak(alone), "", seconds(alone.get("seconds")), "")]
    for variant, entry in variants.items():
        fused, plain = entry["full_step"]["fused"], entry["full_step"]["reference"]
        times = (seconds(fused.get("seconds")), seconds(plain.get("seconds")))
        rows.append((f"encoder + `{variant}`", peak(fused), peak(plain), *times))
    full = metrics["shapes"]["full"]
    lines = [
        "## Memory of one training step",
        "",
        *markdown_lines(("network", "fused", "plain PyTorch", "fused, time", "plain PyTorch, time"), rows),
        "",
        text(f"""One image of {shape(full)}, fp32. Peak above what the process held before the step, each in a fresh
            process; the encoder's activations are in every figure. Plain PyTorch is `--backend reference`. Times are of
            one step, and vary with what else the machine does."""),
    ]
    steps = (variants["dnl"]["full_step"]["fused"], variants["dnl"]["full_step"]["reference"], alone)
    if all("peak_bytes" in step for step in steps):
        fused, plain, base = (step["peak_bytes"] for step in steps)
        lines += [
            "",
            text(f"""The `dnl` block adds {megabytes(fused - base)} to the encoder's step if fused,
                {megabytes(plain - base)} in plain PyTorch. The first grows with the number of tokens, the second with
                its square: one map of {full["tokens"]:,} x {full["tokens"]:,} floats takes
                {megabytes(4 * full["tokens"] ** 2)}, and several are alive at once."""),
        ]
    return [*lines, ""]


def limits_section(metrics: dict[str, Any]) -> list[str]:
    training, data = metrics["training"], metrics["data"]
    classes = len(data["classes"])
    mosaics = f"Held-out mosaics show other parts of the same {classes} photographs that were trained on."
    encoder = "a small encoder" if data["backbone"] == "small" else f"the frozen backbone {data['backbone']}"
    return [
        "## What this can show, and what it cannot",
        "",
        text("""It can show that both blocks train with the fused operators, what a step takes in memory and time at
            full size, and what kind of map each block forms early."""),
        "",
        text(f"""It cannot show which block segments better. That takes a pretrained backbone, tens of thousands of
            steps, real scenes and several seeds, as in the paper. Here there is one seed, {training["encoder_steps"]} +
            {training["steps"]} steps, {encoder} and {data["validation_images"]} held-out images: a few points of
            mIoU mean nothing, in either direction. {mosaics if data["builtin"] else ""} The maps of one picture are an
            example, not a statistic."""),
        "",
    ]


def settings_section(metrics: dict[str, Any]) -> list[str]:
    training, shapes, versions = metrics["training"], metrics["shapes"], metrics["versions"]
    train, full = shapes["training"], shapes["full"]
    seen = f"Validation, picture and memory: {shape(full)}."
    if not metrics["data"]["builtin"]:
        seen = "Validation and picture: whole images."
    phases = ", ".join(f"{name} {value:g}" for name, value in metrics["phases_seconds"].items())
    items = (
        f"""Encoder: {training["encoder_steps"]} steps without a block, peak learning rate {training["encoder_lr"]:g}.
            Then {training["steps"]} more at {training["lr"]:g}, three times from that state: alone, with `nl`, with
            `dnl`. AdamW, polynomial decay.""",
        f"""Training: {train["batch"]} crops per step, {shape(train)} each. {seen}""",
        f"""The BatchNorm behind each block starts at {training["block_gain"]:g}. Shipped configurations start it at 0,
            which makes the block the identity at first; the attention gets its gradient through this factor, which
            stays near 0 in so few steps, so that the maps would hardly learn.""",
        """`dnl` has the paper's temperature, 0.05; `nl` has none. Both are what is usual.""",
        f"""{metrics["device"]}, {metrics["threads"]} threads; dnl_ext {versions["dnl_ext"]}, torch {versions["torch"]},
            Python {versions["python"]}; seed {metrics["seed"]}.""",
        f"Seconds: {phases}.",
    )
    return ["## How it was run", "", *(f"- {text(item)}" for item in items), ""]


def report(metrics: dict[str, Any]) -> str:
    """The report as Markdown text, from the content of ``metrics.json``."""
    data = metrics["data"]
    classes = f"{len(data['classes'])} {'photographs' if data['builtin'] else 'classes'}"
    names = ", ".join(data["classes"])
    what = f"mosaics of {classes} ({names})" if data["builtin"] else f"the data {data['name']}: {classes} ({names})"
    return "\n".join([
        "# A standard and a disentangled non-local block, trained briefly",
        "",
        text(f"""A segmentation network for {what}, once with a
            standard non-local block (`nl`), once with a disentangled one (`dnl`)."""),
        "",
        *picture_section(metrics),
        *training_section(metrics),
        *memory_section(metrics),
        *limits_section(metrics),
        *settings_section(metrics),
        "Again with `python -m dnl_ext demo`; longer and at full size with `python -m dnl_ext train`.",
        "",
    ])  # fmt: skip


def write_report(path: Path, metrics: dict[str, Any]) -> None:
    """Write the report to ``path``."""
    path.write_text(report(metrics), encoding="utf-8")
