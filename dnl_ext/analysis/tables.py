"""The figures as tables: which there are, what they are called, and what to compare each with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .results import Estimate

if TYPE_CHECKING:
    from .probe import BlockReport

#: Below this a figure is rounding, shown as 0.
NEGLIGIBLE = 1e-9


class Figure(NamedTuple):
    """A row: the key in a summary, its name, and what to read it against (text, or the key of a figure)."""

    key: str
    name: str
    against: str


SECTIONS = {
    "Degeneration": (
        Figure("total.cosine_distance", "cosine distance of rows, total", "0: one map for all"),
        Figure("total.jsd", "Jensen-Shannon divergence of rows, total", "0 to log 2 = 0.693"),
        Figure("pairwise.cosine_distance", "cosine distance of rows, pairwise", "0"),
        Figure("pairwise.jsd", "Jensen-Shannon divergence of rows, pairwise", "0 to 0.693"),
        Figure("input_cosine_distance", "cosine distance of the block's inputs", "0: all positions alike"),
        Figure("output_cosine_distance", "cosine distance of the block's outputs", "the inputs'"),
    ),
    "Decomposition of the logits": (
        Figure("decomposition.variance", "variance", "0: uniform attention"),
        Figure("decomposition.pairwise", "share: whitened pairwise", "shares add up to 1"),
        Figure("decomposition.unary", "share: unary", "0 in a whitened block"),
        Figure("decomposition.row", "share: constant per row", "no effect on the map"),
        Figure("decomposition.unary_of_map", "unary / (unary + pairwise)", "1: one map for all queries"),
        Figure("decomposition.mask_variance", "variance of the unary term's own logits", "0: uniform"),
    ),
    "Entropy (share of log N)": (
        Figure("total.entropy_share", "total", "1: uniform"),
        Figure("pairwise.entropy_share", "pairwise", "1"),
        Figure("unary.entropy_share", "unary", "1"),
    ),
    "Coupling of the gradients (elasticity)": (
        Figure("coupling.pairwise_by_unary.slope", "pairwise gradient on the unary map", "1 product, 0 sum"),
        Figure("coupling.pairwise_by_unary.values", "of it through the values", "the rest is 1 or 0"),
        Figure("coupling.pairwise_by_unary.correlation", "correlation", "0: independent"),
        Figure("coupling.unary_by_pairwise.slope", "unary gradient on the pairwise map", "1 product, 0 sum"),
        Figure("coupling.unary_by_pairwise.values", "of it through the values", "the rest is 1 or 0"),
        Figure("coupling.unary_by_pairwise.correlation", "correlation", "0"),
    ),
    "Consistency with the labels (our definition)": (
        Figure("pairwise.own_class.mass", "pairwise, mass on the own class", "pairwise.own_class.uniform"),
        Figure("pairwise.own_class.correlation", "pairwise, correlation with the own class", "0: uniform"),
        Figure("total.own_class.mass", "total, mass on the own class", "total.own_class.uniform"),
        Figure("total.own_class.correlation", "total, correlation with the own class", "0: uniform"),
        Figure("unary.boundaries.mass", "unary, mass on boundaries", "unary.boundaries.uniform"),
        Figure("unary.boundaries.correlation", "unary, correlation with boundaries", "0: uniform"),
    ),
}


class Section(NamedTuple):
    """A table of text.

    Attributes:
        title: of the table.
        head: texts above the columns.
        rows: texts of the cells, a list for each row.
    """

    title: str
    head: list[str]
    rows: list[list[str]]


def sections(columns: Mapping[str, Mapping[str, Estimate]]) -> list[Section]:
    """Tables of several summaries side by side.

    Args:
        columns: {title: summary}, a summary being what :meth:`probe.BlockReport.summary` returns.

    Returns:
        list of :class:`Section`; figures and sections that no column has are left out.
    """
    found = []
    for title, figures in SECTIONS.items():
        rows = []
        for figure in figures:
            if not any(figure.key in summary for summary in columns.values()):
                continue
            cells = [cell(summary.get(figure.key)) for summary in columns.values()]
            rows.append([figure.name, *cells, reference_value(figure.against, columns)])
        if rows:
            found.append(Section(title, ["figure", *columns, "compare with"], rows))
    return found


def reference_value(against: str, columns: Mapping[str, Mapping[str, Estimate]]) -> str:
    """What a row is to be compared with: a text, or the mean of another figure, which is uniform attention's."""
    values = [summary[against].value for summary in columns.values() if against in summary]
    if values:
        return f"uniform: {sum(values) / len(values):.3f}"
    return "-" if "." in against and " " not in against else against


def cell(estimate: Estimate | None) -> str:
    """A mean with its standard error over images."""
    if estimate is None:
        return "-"
    value, error = estimate.value, estimate.stderr
    small = NEGLIGIBLE < abs(value) < 0.001
    text = f"{value:.1e}" if small else f"{value + 0.0:.3f}"
    return text if error != error else f"{text} ± {error:.3f}" if error >= 0.0005 else f"{text} ± <0.001"


def markdown_lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table as lines of Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def as_markdown(section: Section) -> str:
    """A section as Markdown text."""
    return "\n".join([f"### {section.title}", "", *markdown_lines(section.head, section.rows), ""])


def markdown(reports: Iterable[BlockReport]) -> str:
    """The tables of several :class:`probe.BlockReport` side by side, as Markdown."""
    columns = {f"{report.name} ({report.joint})": report.summary() for report in reports if report.images}
    return "\n".join(as_markdown(section) for section in sections(columns))
