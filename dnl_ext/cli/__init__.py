"""The command line, ``python -m dnl_ext``. Its packages come with the extra ``dnl_ext[cli]``.

One file per command; `app` finds them by name and imports a command's file when the command is used.
"""

import importlib.util
import sys

#: Packages of the extra, by import name.
PACKAGES = ("typer", "rich", "PIL", "matplotlib", "skimage")


def main() -> None:
    """Entry point of ``python -m dnl_ext`` and ``dnl-ext``."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        print(f'dnl_ext: {", ".join(missing)} not found; pip install "dnl_ext[cli]"', file=sys.stderr)
        sys.exit(2)
    from .app import app

    app(prog_name="dnl-ext" if sys.argv[0].endswith("dnl-ext") else "python -m dnl_ext")
