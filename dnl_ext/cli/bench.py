"""`python -m dnl_ext bench`: the benchmark's command line. The benchmark itself is dnl_ext/benchmark/."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import fail

if TYPE_CHECKING:
    from rich.console import Console

    from ..benchmark import Options

#: Numbers of positions of a run that names none: with --full, on the CPU, on CUDA.
FULL, QUICK, QUICK_CUDA = (1024, 2048, 4096, 8192, 16384, 32768), (1024, 2048, 4096), (4096, 16384)
#: Columns of the tables where they are not written to a terminal.
WIDTH_OF_A_FILE = 140
WIDTH_OF_SMALL = 200
#: Least rounds of --small.
LEAST_ROUNDS_OF_SMALL = 15


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    """ "256,256;256,512" as ((256, 256), (256, 512))."""
    try:
        pairs = [[int(size) for size in part.replace("x", ",").split(",")] for part in text.split(";")]
        shapes = tuple((width, channels) for width, channels in pairs)
    except ValueError:
        shapes = ()
    if not shapes or any(min(shape) < 1 for shape in shapes):
        fail(f"--shapes: expected Dqk,Dv pairs such as '256,256;256,512', got {text!r}")
    return shapes


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        fail(f"--n: expected numbers such as '1024,4096', got {text!r}")
    return numbers


def _names(option: str, text: str, known: Iterable[str]) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    unknown = [name for name in names if name not in known]
    if unknown:
        fail(f"{option}: expected names of {', '.join(known)}; got {', '.join(unknown)}")
    return names


def bench(
    shapes: Annotated[str, typer.Option(help="Dqk,Dv pairs, ';' between them.")] = "256,256;256,512;256,1024",
    n: Annotated[str, typer.Option("--n", help="Numbers of positions (1024,2048,4096).")] = "",
    dtype: Annotated[str, typer.Option(help="Some of fp32,bf16,fp16,fp64.")] = "fp32,bf16",
    direction: Annotated[str, typer.Option(help="forward, training (forward + backward).")] = "forward,training",
    peers: Annotated[str, typer.Option(help="Names, 'all', or 'default': all but what compiles on a CPU.")] = "default",
    device: Annotated[str, typer.Option(help="cpu or cuda (cuda where there is one).")] = "",
    batch: Annotated[int, typer.Option(min=1)] = 1,
    heads: Annotated[int, typer.Option(min=1)] = 1,
    whiten: Annotated[bool, typer.Option(help="Centre query and key (peers: in plain PyTorch).")] = True,
    unary: Annotated[bool, typer.Option(help="Add the unary term (peers: in plain PyTorch).")] = False,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves torch's number.")] = 0,
    budget: Annotated[float, typer.Option(help="Seconds of timing for all cases; each has --rounds.")] = 150.0,
    rounds: Annotated[int, typer.Option(min=1, help="Least rounds of a case, whatever the budget.")] = 3,
    full: Annotated[bool, typer.Option(help="N up to 32768, and memory: hours on two cores.")] = False,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too.")] = False,
    tf32: Annotated[bool, typer.Option(help="Let fp32 products on CUDA use TF32, for every method.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the figures here, after every case.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw them here.")] = None,
    load: Annotated[Path | None, typer.Option(help="Show or draw the figures of this JSON; run nothing.")] = None,
    check_only: Annotated[bool, typer.Option(help="Check every method's values; time nothing.")] = False,
    small: Annotated[bool, typer.Option(help="Small calls of every operator and block instead, on the CPU.")] = False,
    only: Annotated[str, typer.Option(help="Of --small: rows whose name or sizes contain this.")] = "",
    markdown: Annotated[bool, typer.Option(help="Of --small: write the table as Markdown.")] = False,
) -> None:
    """Check, then time attention forward and backward against what PyTorch offers, as a share of a plain product."""
    import torch
    from rich.console import Console

    from dnl_ext import benchmark
    from dnl_ext.config import show_config

    console = Console()
    if not console.is_terminal:
        console.width = WIDTH_OF_A_FILE
    if small:
        _small(console, dtype, direction, threads, rounds, only, json, load, markdown)
        return
    if load is not None:
        try:
            document = benchmark.load(load)
        except (OSError, ValueError) as error:
            fail(f"--load: {error}")
        _show(console, document, png)
        return
    cuda = torch.cuda.is_available()
    device = device or ("cuda" if cuda and show_config()["cuda"]["built"] else "cpu")
    if device.split(":")[0] not in ("cpu", "cuda") or (device != "cpu" and not cuda):
        fail(f"--device: {device} is not here")
    if threads:
        torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    sizes = FULL if full else QUICK if device == "cpu" else QUICK_CUDA
    if peers in ("all", "default"):
        kind = device.split(":")[0]
        every = tuple(name for name, method in benchmark.METHODS.items() if kind in method.devices)
        names = every if peers == "all" else None
    else:
        names = _names("--peers", peers, benchmark.METHODS)
    options = benchmark.Options(
        shapes=_shapes(shapes),
        positions=_numbers(n) if n else sizes,
        dtypes=_names("--dtype", dtype, benchmark.DTYPES),
        directions=_names("--direction", direction, benchmark.DIRECTIONS),
        peers=names,
        device=device,
        batch=batch,
        heads=heads,
        whiten=whiten,
        unary=unary,
        budget=budget,
        rounds=rounds,
        memory=memory or full,
        check_only=check_only,
    )
    document = _run(console, benchmark, options, json)
    _show(console, document, png)
    if json is not None:
        console.print(f"wrote {json}")
    if not benchmark.passed(document):
        typer.echo("bench: dnl_ext failed its own check", err=True)
        raise typer.Exit(1)


def _small(
    console: "Console",
    dtype: str,
    direction: str,
    threads: int,
    rounds: int,
    only: str,
    json: Path | None,
    load: Path | None,
    markdown: bool,
) -> None:
    """`bench --small`. Where no number of threads is given, one and torch's."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from dnl_ext import benchmark

    if not console.is_terminal:
        console.width = WIDTH_OF_SMALL
    if load is not None:
        try:
            document = benchmark.load_small(load)
        except (OSError, ValueError) as error:
            fail(f"--load: {error}")
    else:
        options = benchmark.SmallOptions(
            dtypes=_names("--dtype", dtype, benchmark.DTYPES),
            directions=_names("--direction", direction, benchmark.DIRECTIONS),
            threads=(threads,) if threads else tuple(sorted({1, torch.get_num_threads()})),
            rounds=max(rounds, LEAST_ROUNDS_OF_SMALL),
            only=only,
        )
        if not options.selected():
            fail(f"--only: no row contains {only!r}")
        save = _saver(benchmark, json)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("starting")

            def progress(row, done, total):
                bar.update(task, description=row, completed=done, total=total)

            document = benchmark.run_small(options, save, progress)
    if markdown:
        typer.echo(benchmark.small_markdown(document))
    else:
        for part in benchmark.small_tables(document):
            console.print(part)
    if json is not None:
        console.print(f"wrote {json}")
    if any("dnl_ext" in cell["failures"] for cell in document["cells"]):
        typer.echo("bench: dnl_ext failed its own check", err=True)
        raise typer.Exit(1)


def _saver(benchmark: Any, path: Path | None) -> Any:
    """What writes the document; a place that cannot be written is said before anything is timed."""
    if path is None:
        return None
    try:
        save = benchmark.save_json(path)
    except OSError as error:
        fail(f"--json: cannot write to {path.parent}: {error.strerror}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        fail(f"--json: cannot write {path}")
    return save


def _run(console: "Console", benchmark: Any, options: "Options", json: Path | None) -> dict[str, Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    save = _saver(benchmark, json)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting")

        def progress(case, done, total):
            bar.update(task, description=case.describe(), completed=done, total=total)

        return benchmark.run(options, save, progress)


def _show(console: "Console", document: dict[str, Any], png: Path | None) -> None:
    from dnl_ext import benchmark

    for part in benchmark.tables(document):
        console.print(part)
    if png is not None:
        try:
            benchmark.chart(document, png)
        except (OSError, ValueError) as error:
            fail(f"--png: {error}")
        console.print(f"wrote {png}")
