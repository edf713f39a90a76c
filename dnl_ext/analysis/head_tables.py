"""The attention heads of a network as tables: by how far they ignore the query, and layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .results import Estimate
from .tables import Figure, Section, cell

if TYPE_CHECKING:
    from .heads import LayerReport, ModelReport

COLUMNS = (
    Figure("total.jsd", "JSD of rows", "0: one map for all queries; at most log 2 = 0.693"),
    Figure("total.cosine_distance", "cosine distance", "0: one map for all queries"),
    Figure("decomposition.unary_of_map", "unary share", "1: the logits know no query"),
    Figure("decomposition.variance", "variance of logits", "0: uniform attention"),
    Figure("pairwise.jsd", "JSD, pairwise", "0 to 0.693"),
    Figure("total.entropy_share", "entropy", "1: uniform attention; 0: one key"),
    Figure("mask.jsd", "JSD of the mask alone", "what equal logits would have"),
)


def present_columns(summaries: list[Mapping[str, Estimate]]) -> list[Figure]:
    """The columns that any head has."""
    return [column for column in COLUMNS if any(column.key in summary for summary in summaries)]


def shown_name(layer: str) -> str:
    """The name of a layer in a table."""
    return layer or "(the model)"


def span(numbers: Sequence[int]) -> str:
    """The number that all are, or the least and the greatest."""
    least, greatest = min(numbers), max(numbers)
    return str(least) if least == greatest else f"{least}..{greatest}"


def layer_row(layer: LayerReport, columns: list[Figure]) -> list[str]:
    """Means over the heads of a layer, and in front the least and largest of the first figure."""
    summaries = [head.summary() for head in layer.heads]
    images = [image for head in layer.heads for image in head.images]
    sizes = " x ".join(span([getattr(image, name) for image in images]) for name in ("queries", "keys"))
    row = [shown_name(layer.name), str(len(layer.heads)), sizes]
    for column in columns:
        values = [summary[column.key].value for summary in summaries if column.key in summary]
        if not values:
            row += ["-", "-"] if column is columns[0] else ["-"]
            continue
        row.append(f"{sum(values) / len(values):.3f}")
        if column is columns[0]:
            row.append(f"{min(values):.3f} to {max(values):.3f}")
    return [*row, ", ".join(layer.remarks) or "-"]


def head_sections(report: ModelReport, limit: int | None = None) -> list[Section]:
    """Tables of a :class:`.heads.ModelReport`: the heads, those that ignore the query first, and the layers.

    Args:
        report: of :func:`measure_model`.
        limit: most heads in the first table, half of them from either end; None is all.

    Returns:
        list of :class:`.tables.Section`; what no head has is left out.
    """
    ranking = report.ranking()
    columns = present_columns([summary for _, _, summary in report.heads()])
    titles = [column.name for column in columns]
    rows = [
        [str(rank), shown_name(layer), str(head), *(cell(summary.get(column.key)) for column in columns)]
        for rank, (layer, head, summary) in enumerate(ranking, 1)
    ]
    title = "Heads, those that ignore the query first"
    if limit is not None and len(rows) > limit:
        ends = max(limit // 2, 1)
        rows = [*rows[:ends], ["..."] * (3 + len(columns)), *rows[-ends:]]
        title += f" ({ends} from either end of {len(ranking)})"
    found = [Section(title, ["rank", "layer", "head", *titles], rows)] if rows else []
    layers = [layer_row(layer, columns) for layer in report.layers.values()]
    if layers:
        head = ["layer", "heads", "queries x keys", titles[0], "of single heads", *titles[1:], "remarks"]
        found.append(Section("Layers: means over their heads", head, layers))
        found.append(Section("How to read it", ["figure", "compare with"], [[c.name, c.against] for c in columns]))
    if report.skipped:
        rows = [[shown_name(name), reason] for name, reason in report.skipped.items()]
        found.append(Section("Left out", ["layer", "reason"], rows))
    return found
