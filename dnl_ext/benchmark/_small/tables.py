"""A document of small calls: read, and as tables for the terminal or a page."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnl_ext.analysis.tables import markdown_lines

from ..runner import OWN
from .measure import SMALL_SCHEMA

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def load_small(path: str | Path) -> dict[str, Any]:
    """Read a document of :func:`run_small` that :func:`save_json` wrote.

    Raises:
        ValueError: not such a document.
        OSError: it cannot be read.

    Example:
        >>> import pathlib, tempfile
        >>> from dnl_ext.benchmark import load_small, save_json
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_json(f"{folder}/small.json")({"small_schema": 1, "cells": []})
        ...     load_small(f"{folder}/small.json")["cells"]
        []
    """
    try:
        document = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not is_small(document) or document["small_schema"] != SMALL_SCHEMA or "cells" not in document:
        raise ValueError(f"{path}: expected a document of small calls of schema {SMALL_SCHEMA}")
    return document


def is_small(document: object) -> bool:
    """Whether a JSON document is one of small calls, of any schema.

    Example:
        >>> from dnl_ext.benchmark import is_small
        >>> is_small({"small_schema": 1}), is_small({"schema": 1})
        (True, False)
    """
    return isinstance(document, dict) and "small_schema" in document


def _grid(document: dict[str, Any], threads: int) -> tuple[list[tuple[str, str]], dict[tuple[str, str], Any]]:
    """Columns (dtype, direction), and for each row (what, sizes) its cells by column."""
    columns, table = {}, {}
    for cell in document["cells"]:
        if cell["threads"] == threads:
            column = cell["dtype"], cell["direction"]
            columns[column] = None
            table.setdefault((cell["what"], cell["sizes"]), {})[column] = cell
    return list(columns), table


def _figure(cell: dict[str, Any] | None, mark: str) -> str:
    """A cell's figure and its peer; `mark` around those below 1."""
    if cell is None:
        return ""
    if cell["ratio"] is None:
        return "failed"
    text = f"{cell['ratio']:.2f}"
    return f"{mark}{text}{mark} {cell['best_peer']}" if cell["ratio"] < 1 else text


def _head(columns: Sequence[tuple[str, str]]) -> list[str]:
    titles = [f"{dtype} {'forward' if direction == 'forward' else '+ backward'}" for dtype, direction in columns]
    return ["operator or block", "sizes", *titles]


def _figures(
    columns: Sequence[tuple[str, str]], table: Mapping[tuple[str, str], Any], mark: str
) -> Iterator[list[str]]:
    """The lines of a table: a row's name, its sizes, and the figures of its cells."""
    for (what, sizes), cells in table.items():
        yield [what, sizes, *(_figure(cells.get(column), mark) for column in columns)]


def _threads(document: dict[str, Any]) -> list[int]:
    return list(dict.fromkeys(cell["threads"] for cell in document["cells"]))


def _count(document: dict[str, Any], threads: int) -> str:
    cells = [cell for cell in document["cells"] if cell["threads"] == threads]
    losing = sum(cell["ratio"] is None or cell["ratio"] < 1 for cell in cells)
    clearly = sum(
        cell["ratio"] is not None and cell["methods"][cell["best_peer"]]["quartiles"][1] < 1 for cell in cells
    )
    rows_of = {(cell["what"], cell["sizes"]) for cell in cells}
    return (
        f"{threads} thread{'s' if threads > 1 else ''}: {len(cells)} cells of {len(rows_of)} rows, {losing} below 1.0, "
        f"of {clearly} three quarters of the rounds"
    )


def small_tables(document: dict[str, Any]) -> "Iterator[Table | Text]":
    """A document of :func:`run_small` as tables for the terminal, every cell of it, and how many are below 1.

    Example:
        >>> from dnl_ext.benchmark import small_tables
        >>> list(small_tables({"cells": []}))
        []
    """
    from rich.table import Table
    from rich.text import Text

    for threads in _threads(document):
        columns, table = _grid(document, threads)
        shown = Table(
            title=f"Time of the best peer over that of dnl_ext, {threads} thread{'s' if threads > 1 else ''}; "
            "* below 1, and to whom",
            title_justify="left",
            header_style="bold",
        )
        for title in _head(columns):
            shown.add_column(title)
        for figures in _figures(columns, table, "*"):
            shown.add_row(*figures)
        yield shown
        yield Text(_count(document, threads), style="bold")
    for cell in document["cells"]:
        if OWN in cell["failures"]:
            where = f"{cell['what']} {cell['sizes']} {cell['dtype']} {cell['direction']}"
            yield Text(f"- {where}: {cell['failures'][OWN]}", style="bold red")


def small_markdown(document: dict[str, Any]) -> str:
    """The same as Markdown.

    Example:
        >>> from dnl_ext.benchmark import small_markdown
        >>> small_markdown({"cells": []})
        ''
    """
    lines: list[str] = []
    for threads in _threads(document):
        columns, table = _grid(document, threads)
        lines += [f"{_count(document, threads)}.", ""]
        lines += [*markdown_lines(_head(columns), _figures(columns, table, "**")), ""]
    return "\n".join(lines).rstrip()
