"""The typer application: a table of commands, each imported when it is used.

A command ``name`` is the function ``name`` of ``dnl_ext/cli/name.py``, annotated for typer. A file that is not there
is a command that is not there.
"""

import importlib
import importlib.util
from typing import Any

import typer
from typer.core import TyperGroup

COMMANDS = ("demo", "train", "evaluate", "predict", "maps", "diagnose", "ablate", "bench", "tune", "doctor")


class LazyGroup(TyperGroup):
    """A group whose commands are files of this package."""

    def list_commands(self, ctx: typer.Context) -> list[str]:
        return [name for name in COMMANDS if importlib.util.find_spec(f"{__package__}.{name}")]

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"{__package__}.{cmd_name}")
        single = typer.Typer(add_completion=False)
        single.command(name=cmd_name)(getattr(module, cmd_name))
        return typer.main.get_command(single)


app: typer.Typer = typer.Typer(cls=LazyGroup, add_completion=False, no_args_is_help=True)


@app.callback()
def dnl_ext() -> None:
    """Exact global attention for convolutional networks, in memory linear in the number of positions."""
