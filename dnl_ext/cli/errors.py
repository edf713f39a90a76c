"""Exit codes of the commands: 2 with one line for what the user can fix, 128 + signal when interrupted.

Of several processes in step with each other, the main one speaks for all (`tell`).
"""

import contextlib
import functools
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, ParamSpec

import typer

from ..segmentation.errors import InputError, InputWarning, Interrupted
from ..segmentation.training import distributed

P = ParamSpec("P")


def tell(message: object) -> None:
    """Print on stderr, once for all processes. Every process must come here."""
    if distributed.is_main():
        typer.echo(message, err=True)
    # A launcher ends the others as soon as one has ended, and the main process must have spoken before that.
    distributed.wait()


def fail(message: object) -> NoReturn:
    """Print one line on stderr and exit with code 2; see :func:`tell`."""
    tell(f"error: {message}")
    raise typer.Exit(2)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out (PyTorch's CPU allocator raises a bare RuntimeError)."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


@contextlib.contextmanager
def one_line_warnings() -> Iterator[None]:
    """Context in which an :class:`InputWarning` is one line on stderr, the first of each kind; others are as before."""
    said, show_other = set(), warnings.showwarning

    def show(message: Any, category: type[Warning], *place: Any, **options: Any) -> None:
        if not issubclass(category, InputWarning):
            show_other(message, category, *place, **options)
        elif message.what is None:
            typer.echo(f"warning: {message}", err=True)
        elif message.what not in said:
            said.add(message.what)
            typer.echo(f"warning: {message} (said for the first such file)", err=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", InputWarning)
        warnings.showwarning = show
        yield


def one_line_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turn the errors and warnings of the training tools into one line each on stderr, and errors into exit codes."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **options: P.kwargs) -> None:
        try:
            with one_line_warnings():
                return command(*args, **options)
        except InputError as error:
            fail(error)
        except Interrupted as stop:
            where = (
                f"; the state is saved, continue with\n  {options_to_resume(stop.checkpoint)}"
                if stop.checkpoint
                else ""
            )
            tell(f"stopped after step {stop.step}{where}")
            raise typer.Exit(128 + stop.signum) from None
        except KeyboardInterrupt:
            if distributed.is_main():
                typer.echo("stopped", err=True)
            raise typer.Exit(128 + signal.SIGINT) from None
        except (MemoryError, RuntimeError) as error:
            # These are of one process: the others are not where it is.
            if out_of_memory(error):
                process = f"process {distributed.rank()} is " if distributed.is_distributed() else ""
                remedy = "try --backend fused, a smaller --crop or a smaller --batch-size"
                typer.echo(f"error: {process}out of memory: {remedy}", err=True)
                raise typer.Exit(2) from None
            if distributed.is_lost(error):
                if distributed.is_main():
                    typer.echo("error: another process of this training has ended", err=True)
                raise typer.Exit(1) from None
            raise

    return wrapped


def options_to_resume(checkpoint: Path) -> str:
    """The command that continues an interrupted training."""
    processes = distributed.world_size()
    launch = "python" if processes == 1 else f"torchrun --nproc-per-node {processes}"
    return f"{launch} -m dnl_ext train --resume --out {checkpoint.parent}"
