"""The document of a run as tables on the terminal and as a chart."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .runner import OWN, SCHEMA

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

#: Median over best above which a case counts as noisy.
NOISY = 1.15
WORDS = {"forward": "forward", "training": "forward + backward"}
STATUSES = ("ok", "skipped", "failed", "wrong")


def load(path: str | Path) -> dict[str, Any]:
    """Read a document that :func:`save_json` wrote, and check its layout.

    Raises:
        ValueError: not such a document; the message says what is wrong with the file.
        OSError: it cannot be read.

    Example:
        >>> import pathlib, tempfile
        >>> from dnl_ext.benchmark import load
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "results.json")
        ...     _ = path.write_text("{}")
        ...     try:
        ...         load(path)
        ...     except ValueError as error:
        ...         print(str(error).removeprefix(f"{path}: "))
        expected a benchmark document of schema 1
    """
    try:
        document = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    validate(document, path)
    return document


def validate(document: Any, name: object = "document") -> None:
    """Raise ValueError unless `document` has the layout of SCHEMA."""
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(f"{name}: expected a benchmark document of schema {SCHEMA}")
    for key in ("date", "device", "config", "options", "methods", "convention", "cases"):
        if key not in document:
            raise ValueError(f"{name}: has no {key!r}")
    for case in document["cases"]:
        missing = {"case", "roof", "results", "best_peer", "ratio"} - case.keys()
        if missing:
            raise ValueError(f"{name}: a case lacks {', '.join(sorted(missing))}")
        for record in case["results"]:
            if record.get("status") not in STATUSES or (record["status"] != "ok" and not record.get("reason")):
                raise ValueError(f"{name}: {record.get('method')} has no status, or no reason for it")


def _heading(document: dict[str, Any]) -> str:
    device = document["device"]
    threads = f", {device['threads']} threads" if device["type"] == "cpu" else ""
    return f"{device['name']}{threads}, torch {document['config']['versions']['torch']}, {document['date'][:10]}"


def _groups(document: dict[str, Any], *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Cases by the values of `keys`, in order of appearance."""
    groups = {}
    for case in document["cases"]:
        groups.setdefault(tuple(case["case"][key] for key in keys), []).append(case)
    return groups


def _record(case: dict[str, Any], method: str) -> dict[str, Any] | None:
    return next((record for record in case["results"] if record["method"] == method), None)


def _methods(cases: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(record["method"] for case in cases for record in case["results"]))


def tables(document: dict[str, Any]) -> "Iterator[Table | Text]":
    """A document as tables for the terminal, in the order in which to print them.

    Args:
        document: of :func:`run` or :func:`load`.

    Returns:
        Iterator over renderables of rich: the peaks of the CPU's instruction sets, then for each dtype and direction a
        table of speeds and, where it was measured, one of memory, and notes.

    Example:
        >>> from rich.console import Console
        >>> from dnl_ext.benchmark import Options, run, tables
        >>> document = run(Options(shapes=((16, 32),), positions=(64,), dtypes=("fp32",), peers=(), check_only=True))
        >>> for table in tables(document):
        ...     Console(quiet=True).print(table)
    """
    from rich.text import Text

    yield Text(_heading(document))
    if document.get("peaks"):
        yield _peaks(document)
    for (dtype, direction), cases in _groups(document, "dtype", "direction").items():
        yield _speeds(f"{dtype} {WORDS[direction]}", cases)
        if any("memory_bytes" in record for case in cases for record in case["results"]):
            yield _memory(f"{dtype} {WORDS[direction]}: peak MB beyond inputs, outputs and gradients", cases)
    yield from _notes(document)


def _peaks(document: dict[str, Any]) -> "Table":
    from rich.table import Table

    table = Table(title="Peak of the CPU, registers only: GFLOP/s", title_justify="left", header_style="bold")
    table.add_column("instruction set")
    dtypes = list(next(iter(document["peaks"].values())))
    for dtype in dtypes:
        table.add_column(dtype, justify="right")
    used = document["config"]["cpu"]["capability"]
    for name, peaks in document["peaks"].items():
        label = f"{name}, in use" if name == used else name
        table.add_row(label, *(f"{peaks[dtype]:.0f}" for dtype in dtypes), style="bold" if name == used else None)
    return table


def _table(title: str, cases: list[dict[str, Any]]) -> "tuple[Table, list[int]]":
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("Dqk, Dv")
    table.add_column("method")
    positions = sorted({case["case"]["keys"] for case in cases})
    for n in positions:
        table.add_column(f"N = {n}", justify="right")
    return table, positions


def _rows(cases: list[dict[str, Any]], positions: list[int]) -> Iterator[tuple[str, list[dict[str, Any] | None]]]:
    """(label, {N: case}) per shape."""
    shapes = {}
    for case in cases:
        shapes.setdefault((case["case"]["width"], case["case"]["channels"]), {})[case["case"]["keys"]] = case
    for (width, channels), by_n in shapes.items():
        yield f"{width}, {channels}", [by_n.get(n) for n in positions]


def _speeds(title: str, cases: list[dict[str, Any]]) -> "Table":
    of_peak = any("peak_share" in case["roof"] for case in cases if case["roof"])
    shares = "(share of a plain product, of the peak)" if of_peak else "(share of a plain product)"
    table, positions = _table(f"{title}: GFLOP/s {shares}", cases)
    for label, row in _rows(cases, positions):
        for method in _methods(cases):
            cells = [_speed(case, method) for case in row]
            if set(cells) - {"", "skipped"}:
                style = "bold" if method == OWN else None
                table.add_row(label if method == OWN else "", method, *cells, style=style)
        if any(case and case["roof"] for case in row):
            roofs = [_figure(case["roof"]) if case and case["roof"] else "" for case in row]
            table.add_row("", "plain product", *roofs, style="dim")
        table.add_row("", "dnl_ext / best peer", *(_ratio(case) for case in row), end_section=True)
    return table


def _speed(case: dict[str, Any] | None, method: str) -> str:
    record = case and _record(case, method)
    if not record:
        return ""
    if record["status"] == "wrong":
        return f"wrong: error x{max(record['error_ratios'].values()):.1f}"
    if record["status"] != "ok":
        return record["status"]
    if "gflops" not in record:
        return f"error x{max(record['error_ratios'].values()):.2f}"
    return _figure(record)


def _figure(record: dict[str, Any]) -> str:
    """GFLOP/s, and in brackets those shares that the record has."""
    shares = [f"{record[share]:.2f}" for share in ("roof_share", "peak_share") if share in record]
    return f"{record['gflops']:.0f}" + (f" ({', '.join(shares)})" if shares else "")


def _ratio(case: dict[str, Any] | None) -> str:
    if not case or case["ratio"] is None:
        return ""
    colour = "green" if case["ratio"] >= 1 else "red"
    return f"[{colour}]{case['ratio']:.2f}[/] {case['best_peer']}"


def _memory(title: str, cases: list[dict[str, Any]]) -> "Table":
    table, positions = _table(title, cases)
    for label, row in _rows(cases, positions):
        for method in _methods(cases):
            records = [_record(case, method) if case else None for case in row]
            cells = [_megabytes(record) for record in records]
            if set(cells) - {"", "skipped"}:
                style = "bold" if method == OWN else None
                table.add_row(label if method == OWN else "", method, *cells, style=style)
        table.add_section()
    return table


def _megabytes(record: dict[str, Any] | None) -> str:
    if record is None:
        return ""
    if record.get("memory_bytes") is not None:
        return f"{record['memory_bytes'] / 1e6:.1f}"
    return "failed" if "memory_reason" in record else record["status"] if record["status"] != "ok" else ""


def _watched(case: dict[str, Any]) -> list[dict[str, Any]]:
    own = _record(case, OWN)
    return [case["roof"], *([own] if own and "best_s" in own else [])]


def _notes(document: dict[str, Any]) -> "Iterator[Text]":
    """Every reason for a figure that is missing, once, and which backend SDPA took."""
    from rich.text import Text

    timed = [case for case in document["cases"] if case["roof"]]
    noisy = sum(any(x["median_s"] > NOISY * x["best_s"] for x in _watched(case)) for case in timed)
    if noisy:
        text = f"- NOISY: in {noisy} of {len(timed)} cases a median of dnl_ext or of the plain product is over {NOISY}"
        load = document["load_average"]
        yield Text(f"{text} times its best; load average before the run {load}", style="bold red")
    notes = {}
    for case in document["cases"]:
        sizes = case["case"]
        for record in case["results"]:
            where = f"({sizes['width']}, {sizes['channels']}) {sizes['dtype']} {WORDS[sizes['direction']]}"
            if record["status"] != "ok":
                text = f"{record['method']} {record['status']}: {record['reason']}"
                notes.setdefault(text, []).append(where)
            if record.get("memory_reason"):
                notes.setdefault(f"{record['method']} memory: {record['memory_reason']}", []).append(where)
            if record["backend"] == "math":
                notes.setdefault(f"{record['method']}: PyTorch takes its N x N path", []).append(where)
    for text, where in notes.items():
        where = list(dict.fromkeys(where))
        yield Text(f"- {text}; {', '.join(where[:3])}{' and others' if len(where) > 3 else ''}", style="dim")


LEGEND_COLUMNS = 8
#: Colour and marker per method, the same in every chart; dnl_ext stands out.
STYLES = {
    "dnl_ext": ("#c1121f", "o"),
    "eager": ("#1d3557", "s"),
    "sdpa_views": ("#2a9d8f", "^"),
    "sdpa_contiguous": ("#457b9d", "v"),
    "sdpa_slices": ("#8ecae6", "<"),
    "chunks": ("#e09f3e", "D"),
    "sdpa_flash": ("#6a4c93", "P"),
    "sdpa_efficient": ("#b5838d", "X"),
    "sdpa_cudnn": ("#588157", "*"),
    "flex": ("#9c6644", ">"),
    "compiled": ("#6c757d", "h"),
    "ffpa": ("#f72585", "d"),
    "flash_attn": ("#3a0ca3", "p"),
}


def chart(document: dict[str, Any], path: str | Path) -> None:
    """Draw a document to a PNG: share of the plain product's speed, and memory where it was measured, against N.

    One row per dtype and direction and one column per (Dqk, Dv), each row of speeds followed by its row of memory.

    Args:
        document: of :func:`run` or :func:`load`.
        path: the file; its folder is made.

    Raises:
        ValueError: the document has no figures to draw.

    Example:
        >>> from dnl_ext.benchmark import chart
        >>> chart({"cases": []}, "results.png")
        Traceback (most recent call last):
        ...
        ValueError: the document has no figures to draw
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = []
    for (dtype, direction), cases in _groups(document, "dtype", "direction").items():
        for quantity in ("roof_share", "memory_bytes"):
            if any(record.get(quantity) is not None for case in cases for record in case["results"]):
                rows.append((quantity, f"{dtype}, {WORDS[direction]}", cases))
    if not rows:
        raise ValueError("the document has no figures to draw")
    shapes = list(_groups(document, "width", "channels"))
    size = (4.2 * len(shapes) + 0.6, 2.6 * len(rows) + 1.3)
    figure, axes = plt.subplots(len(rows), len(shapes), figsize=size, squeeze=False, sharex="col", sharey="row")
    for row, (quantity, title, cases) in enumerate(rows):
        for axis, shape in zip(axes[row], shapes, strict=True):
            _panel(axis, quantity, [c for c in cases if (c["case"]["width"], c["case"]["channels"]) == shape])
            if row == 0:
                axis.set_title(f"Dqk = {shape[0]}, Dv = {shape[1]}", fontsize=10)
        _scale(axes[row], quantity)
        what = "share of a plain product" if quantity == "roof_share" else "peak memory, MB"
        axes[row][0].set_ylabel(f"{title}\n{what}", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("positions N", fontsize=9)
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    names = sorted(handles, key=lambda name: (name != OWN, name not in STYLES))  # dnl_ext first, reference lines last
    lines = -(-len(names) // LEGEND_COLUMNS)
    figure.tight_layout(rect=(0, 0, 1, 1 - (0.35 + 0.2 * lines) / size[1]))
    figure.suptitle(_heading(document), fontsize=11, y=1 - 0.1 / size[1], va="top")
    figure.legend(
        [handles[name] for name in names], names, loc="upper center", ncols=LEGEND_COLUMNS, frameon=False, fontsize=9,
        bbox_to_anchor=(0.5, 1 - 0.3 / size[1]),
    )  # fmt: skip
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _scale(axes: Any, quantity: str) -> None:
    """Axis limits of a row of panels, which share them."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    if quantity == "roof_share":
        highest = max(y for axis in axes for line in axis.get_lines() for y in line.get_ydata())
        axes[0].set_ylim(0, 1.08 * highest)
        return
    for axis in axes:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())


def _panel(axis: Any, quantity: str, cases: list[dict[str, Any]]) -> None:
    cases = sorted(cases, key=lambda case: case["case"]["keys"])
    for method in sorted(_methods(cases), key=lambda name: name == OWN):  # dnl_ext on top
        points = [(case["case"]["keys"], (_record(case, method) or {}).get(quantity)) for case in cases]
        points = [(n, y if quantity == "roof_share" else y / 1e6) for n, y in points if y is not None]
        if not points:
            continue
        colour, marker = STYLES.get(method, ("#000000", "."))
        own = method == OWN
        axis.plot(
            *zip(*points, strict=True), color=colour, marker=marker, markersize=5 if own else 4,
            linewidth=2.4 if own else 1.2, label=method, alpha=1.0 if own else 0.85,
        )  # fmt: skip
    positions = [case["case"]["keys"] for case in cases]
    if positions:
        axis.set_xscale("log", base=2)
        axis.set_xticks(positions, [str(n) for n in positions], fontsize=8)
        axis.minorticks_off()
    if quantity == "roof_share":
        axis.axhline(1.0, color="black", linewidth=0.8, linestyle=":", label="plain product")
    else:
        maps = [case["case"]["map_bytes"] / 1e6 for case in cases]
        axis.plot(positions, maps, color="black", linewidth=0.8, linestyle="--", label="one N x N map")
    axis.grid(True, linewidth=0.4, alpha=0.5)
    axis.tick_params(labelsize=8)
