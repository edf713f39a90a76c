"""The command line, ``python -m dnl_ext``. Its packages come with the extra ``dnl_ext[cli]``; ``doctor`` needs none.

One file per command; `app` finds them by name and imports a command's file when the command is used.
"""

import importlib.util
import sys
from collections.abc import Sequence

__all__ = ["main"]

#: Packages of the extra, by import name.
PACKAGES = ("typer", "rich", "PIL", "matplotlib", "skimage")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command, as ``python -m dnl_ext`` and ``dnl-ext`` do.

    Args:
        arguments: the command and its options; None takes them from ``sys.argv``.

    Raises:
        SystemExit: always: 0 where all went well, 2 after one line on stderr for what the user can mend, 128 + the
            signal's number after an interruption, 1 for anything else.

    Example:
        >>> from dnl_ext.cli import main
        >>> main(["train", "--steps", "0"])  # error: --steps must be at least 1, got 0
        Traceback (most recent call last):
        SystemExit: 2
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    words = sys.argv[1:] if arguments is None else arguments
    if missing and list(words[:1]) == ["doctor"]:
        from . import health

        sys.exit(health.main(words[1:]))
    if missing:
        print(f'dnl_ext: {", ".join(missing)} not found; pip install "dnl_ext[cli]"', file=sys.stderr)
        sys.exit(2)
    from .app import app

    app(arguments, prog_name="dnl-ext" if sys.argv[0].endswith("dnl-ext") else "python -m dnl_ext")
