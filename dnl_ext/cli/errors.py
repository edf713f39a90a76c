"""Exit codes of the commands: 2 with one line for what the user can fix, 128 + signal when interrupted."""

import functools
import signal

import typer

from ..segmentation.errors import InputError, Interrupted


def fail(message):
    """Print one line on stderr and exit with code 2."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def out_of_memory(error):
    """Whether an exception says that memory ran out (PyTorch's CPU allocator raises a bare RuntimeError)."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def one_line_errors(command):
    """Turn the errors of the training tools into one line on stderr and an exit code, without a traceback."""

    @functools.wraps(command)
    def wrapped(*args, **options):
        try:
            return command(*args, **options)
        except InputError as error:
            fail(error)
        except Interrupted as stop:
            where = f"; the state is saved, continue with\n  {options_to_resume(stop)}" if stop.checkpoint else ""
            typer.echo(f"stopped after step {stop.step}{where}", err=True)
            raise typer.Exit(128 + stop.signum) from None
        except KeyboardInterrupt:
            typer.echo("stopped", err=True)
            raise typer.Exit(128 + signal.SIGINT) from None
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            fail("out of memory: try --backend fused, a smaller --crop or a smaller --batch-size")

    return wrapped


def options_to_resume(stop):
    """The command that continues an interrupted training."""
    return f"python -m dnl_ext train --resume --out {stop.checkpoint.parent}"
