"""The ablation's table and figure, from its results alone."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from ...analysis.results import to_dict
from ...analysis.tables import markdown_lines
from ..errors import InputError
from .ablation import Ablation, write_json
from .comparison import Spread, difference, figures_of, over_seeds
from .recipes import VARIANT_NAMES, Row
from .runs import Run

#: Columns of the talk's table: key of a figure, head, factor, and the figure of uniform attention.
COLUMNS = (
    ("miou", "mIoU, %", 100, None),
    ("pairwise.own_class.mass", "pairwise on own class, %", 100, "pairwise.own_class.uniform"),
    ("pairwise.own_class.correlation", "pairwise with regions, r", 100, None),
    ("unary.boundaries.mass", "unary on boundaries, %", 100, "unary.boundaries.uniform"),
    ("unary.boundaries.correlation", "unary with boundaries, r", 100, None),
    ("pairwise.jsd", "JSD of rows, pairwise", 1, None),
    ("total.jsd", "JSD of rows, total", 1, None),
    ("pairwise.entropy_share", "entropy of pairwise rows", 1, None),
    ("decomposition.unary_of_map", "unary share of logits", 1, None),
)
#: Those of them that the figure shows.
SHOWN = ("miou", "pairwise.own_class.mass", "unary.boundaries.mass", "total.jsd")
#: Those whose differences between rows are tested.
TESTED = ("miou", "pairwise.own_class.mass", "unary.boundaries.mass", "pairwise.jsd", "total.jsd")
COLORS = ("#2e6f9e", "#d1495b", "#3c8d40", "#8d6a9f")


def cell(value: Spread | None, factor: int) -> str:
    """Mean ± deviation."""
    if value is None or math.isnan(value[0]):
        return "-"
    mean, deviation, _ = value
    digits = 1 if factor == 100 else 3
    text = f"{factor * mean:.{digits}f}"
    return text if math.isnan(deviation) else f"{text} ± {factor * deviation:.{digits}f}"


def ordered(groups: Mapping[Row, dict[str, Spread]]) -> list[Row]:
    """(variant, temperature) in the order of the table."""
    names = list(VARIANT_NAMES)
    return sorted(groups, key=lambda key: (key[1] is None, -(key[1] or 0), names.index(key[0])))


def table(groups: Mapping[Row, dict[str, Spread]]) -> list[str]:
    """Lines of the Markdown table."""
    head = ["variant", "T", "seeds", *(title.replace(", r", ", r x 100") for _, title, _, _ in COLUMNS)]
    lines = []
    for key in ordered(groups):
        figures, (variant, temperature) = groups[key], key
        seeds = figures["miou"][2]
        cells = [cell(figures.get(name), factor) for name, _, factor, _ in COLUMNS]
        lines.append([VARIANT_NAMES[variant], f"{temperature:g}" if temperature else "-", str(seeds), *cells])
    uniform = ["*uniform attention*", "", ""]
    for name, _, factor, reference in COLUMNS:
        values = [figures[reference][0] for figures in groups.values() if reference in figures]
        flat = "" if name == "miou" or name.startswith("decomposition") else "1" if "entropy" in name else "0"
        uniform.append(f"{factor * sum(values) / len(values):.1f}" if values else flat)
    return markdown_lines(head, [*lines, uniform])


def row_name(row: Row) -> str:
    """A row as text: "dnl, T = 0.05"."""
    return row[0] if row[1] is None else f"{row[0]}, T = {row[1]:g}"


def compared(rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """Pairs of rows whose difference is tested: each with the standard block as published, and its two temperatures."""
    rows = list(rows)
    standard: Row = ("nl", 1.0)
    pairs: list[tuple[Row, Row]] = [(row, standard) for row in rows if row != standard and standard in rows]
    for row in rows:
        others = [other for other in rows if other[0] == row[0] and (other[1] or 0) > (row[1] or 0)]
        pairs += [(row, other) for other in others if other != standard]
    return pairs


def differences(results: Mapping[Run, dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table of differences between rows, each with a paired test; none where no row is shared."""
    lines = []
    for first, second in compared(ordered(over_seeds(results))):
        for name, title, factor, _ in COLUMNS:
            found = difference(results, first, second, name)
            if name in TESTED and found.seeds > 1:
                text = cell((found.mean, found.deviation, found.seeds), factor)
                p = "-" if math.isnan(found.p) else f"{found.p:.2g}"
                lines.append(f"| {row_name(first)} | {row_name(second)} | {title} | {text} | {found.seeds} | {p} |")
    if not lines:
        return []
    head = ["| row | less | figure | difference | seeds | p |", "|---|---|---|---|---|---|"]
    note = "Differences over the seeds that both rows have, mean ± deviation, with p of a paired t-test."
    return ["## Differences", "", note, "", *head, *lines, ""]


def write_report(ablation: Ablation) -> None:
    """Write ``table.md``, ``results.json`` and ``ablation.png`` into the ablation's folder.

    Args:
        ablation: an :class:`Ablation` with at least one result.

    Raises:
        InputError: a file cannot be written.

    Example:
        >>> import os
        >>> from dnl_ext.segmentation.experiments import Ablation, write_report
        >>> tiny = {"steps": 1, "crop": (64, 64), "batch_size": 1, "width": 4, "val_images": 1}
        >>> ablation = Ablation("runs", overrides=tiny, variants=["dnl"], temperatures=[0.05], seeds=[0], pretext=0)
        >>> _ = ablation.run()
        >>> write_report(ablation)
        >>> sorted(name for name in os.listdir("runs") if "." in name and not os.path.isdir(f"runs/{name}"))
        ['ablation.png', 'results.json', 'table.md']
    """
    groups = over_seeds(ablation.results)
    done, planned = len(ablation.results), len(ablation.runs)
    config = ablation.base
    lines = [
        "# The terms of the non-local block, alone, multiplied and added",
        "",
        f"- Recipe {ablation.recipe_name}: {ablation.recipe.source}",
        f"- {done} of {planned} runs done. {config.steps} steps of {config.batch_size} crops of "
        f"{config.crop[0]} x {config.crop[1]} pixels, {config.optimizer} at {config.lr:g}"
        + (f"; encoder first alone for {ablation.pretext} steps." if ablation.pretext else "."),
        f"- Attention over {ablation.images} validation images. Mean ± deviation over seeds.",
        "- Regions and boundaries are measured by the definitions of dnl_ext.analysis.consistency, which are not the "
        "paper's; compare with uniform attention. JSD (0 to 0.693): 0 means that all queries look at the same places. "
        "Entropy: share of log N, 0 where a row is a single key. Columns r are correlations times 100.",
        "",
        *table(groups),
        "",
        *differences(ablation.results),
        "![Four of the columns](ablation.png)",
        "",
    ]
    try:
        (ablation.out / "table.md").write_text("\n".join(lines), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {ablation.out / 'table.md'}: {error.strerror}") from None
    entries = [
        {"variant": variant, "temperature": temperature,
         "figures": {name: {"mean": value[0], "deviation": value[1], "seeds": value[2]}
                     for name, value in groups[variant, temperature].items()}}
        for variant, temperature in ordered(groups)
    ]  # fmt: skip
    write_json(ablation.out / "results.json", to_dict({
        "recipe": ablation.recipe_name, "source": ablation.recipe.source, "runs_done": done, "runs_planned": planned,
        "means": entries, "runs": list(ablation.results.values()),
    }))  # fmt: skip
    draw(ablation.out / "ablation.png", ablation.results, groups)


def draw(path: Path, results: Mapping[Run, dict[str, Any]], groups: Mapping[Row, dict[str, Spread]]) -> None:
    """Write the figure: one panel per shown column, a dot per seed, a bar at the mean, a line at uniform attention."""
    temperatures = sorted({key[1] for key in groups if key[1]}, reverse=True)
    variants = [variant for variant in VARIANT_NAMES if any(key[0] == variant for key in groups)]
    columns = [column for column in COLUMNS if column[0] in SHOWN]
    figure, axes = plt.subplots(1, len(columns), figsize=(4.1 * len(columns), 3.6), layout="constrained")
    for axis, (name, title, factor, reference) in zip(axes, columns, strict=True):
        for (variant, temperature), figures in groups.items():
            mean = figures.get(name, (math.nan,))[0]
            if math.isnan(mean):
                continue
            series = temperatures.index(temperature) if temperature else 0
            offset = 0.0 if temperature is None else 0.32 * (series - (len(temperatures) - 1) / 2)
            color = "#777777" if temperature is None else COLORS[series % len(COLORS)]
            place = variants.index(variant) + offset
            axis.bar(place, factor * mean, 0.28, color=color, alpha=0.35)
            dots = [
                factor * value for run, result in results.items()
                if run.row == (variant, temperature) and (value := figures_of(result).get(name)) is not None
            ]  # fmt: skip
            axis.plot([place] * len(dots), dots, "o", color=color, markersize=4)
        flat = [figures[reference][0] for figures in groups.values() if reference in figures]
        if flat:
            axis.axhline(factor * sum(flat) / len(flat), color="black", linewidth=1, linestyle="--")
        axis.set_title(title)
        axis.set_xticks(range(len(variants)), [variant.replace("dnl_", "dnl\n") for variant in variants])
        axis.set_xlim(-0.6, len(variants) - 0.4)
        axis.spines[["top", "right"]].set_visible(False)
    handles: list[Any] = [
        plt.Rectangle((0, 0), 1, 1, color=COLORS[n % len(COLORS)], alpha=0.5) for n in range(len(temperatures))
    ]
    labels = [f"temperature {temperature:g}" for temperature in temperatures]
    handles.append(plt.Line2D([], [], color="black", linewidth=1, linestyle="--"))
    figure.legend(handles, [*labels, "uniform attention"], loc="outside lower center", ncols=4, frameon=False)
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    finally:
        plt.close(figure)
