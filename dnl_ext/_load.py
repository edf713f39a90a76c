"""Loads the compiled operators, or defines them without kernels, or says in one sentence why neither can be had."""

import os
import re
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING

import torch  # before ours: its libraries must be loaded first, and ours link to them

REBUILD = "rebuild it against the torch you run: pip install --force-reinstall --no-deps ."
#: What DNL_EXT_NO_KERNELS=1 leaves in the package when it is installed: why there are no kernels, in one line.
MARKER = Path(__file__).with_name("_left_out.txt")


def _why_left_out() -> str:
    """Why the operators run without kernels; empty where they have some."""
    wanted = os.environ.get("DNL_EXT_KERNELS", "on")
    if wanted not in ("on", "off"):
        raise ValueError(f"DNL_EXT_KERNELS: expected on or off, got {wanted!r}")
    if wanted == "off":
        return "DNL_EXT_KERNELS=off"
    return MARKER.read_text().strip() if MARKER.exists() else ""


def schemas() -> list[str]:
    """The schemas of all operators that have kernels, as the compiled library defines them."""
    text = Path(__file__).with_name("schemas.inc").read_text()
    found = re.findall(r'^DNL_SCHEMA\(((?:\s*"[^"]*")+)\)$', text, re.MULTILINE)
    return ["".join(re.findall(r'"([^"]*)"', words)) for words in found]


#: Why there are no kernels; empty where there are.
LEFT_OUT = _why_left_out()

if TYPE_CHECKING:
    from . import _C
elif LEFT_OUT:
    from . import _no_kernels as _C

    sys.modules[__package__]._C = _C  # as the import of a compiled one does
    _library = torch.library.Library("dnl_ext", "FRAGMENT")
    for _schema in schemas():
        _library.define(_schema)
else:
    try:
        from . import _C
    except ImportError as error:
        absent = error.name == __package__  # no file of that name for this Python; one that does not load has another
        built_for = sorted(path.name.split(".")[1] for path in MARKER.parent.glob("_C.*.*"))
        own = EXTENSION_SUFFIXES[0].split(".")[1]  # as "cpython-312-x86_64-linux-gnu"
        remedy = REBUILD
        if absent and built_for and own not in built_for:
            reason = f"dnl_ext._C was built for {', '.join(built_for)}, and this Python is {own}"
        elif absent or not Path(error.path or __file__).with_name("libdnl_ext.so").exists():
            reason = "dnl_ext is not built: its compiled part, dnl_ext._C or the libdnl_ext.so beside it, is missing"
            folder = MARKER.parents[1]
            if folder.joinpath("setup.py").exists():  # Python was run in it, and finds it before what is installed
                remedy = (
                    f"these are the sources in {folder}, which hide an installed dnl_ext: run Python elsewhere, or "
                    "build them in place: pip install --editable ."
                )
        else:
            reason = (
                f"dnl_ext._C was built for another torch or Python and does not load into torch {torch.__version__}"
            )
        without = "or set DNL_EXT_KERNELS=off to run it as plain PyTorch"
        raise ImportError(f"{reason}; {remedy}, {without} ({error})") from error


def _route_errors() -> None:
    """Choose how errors of operators get to Python with their types: the first route that this torch knows."""
    for route in ("registered", "pybind", "torch"):
        _C.route_errors(route)
        try:
            torch.ops.dnl_ext.softmax(torch.empty(0, dtype=torch.complex64))
        except NotImplementedError:
            return
        except RuntimeError:
            continue


if not LEFT_OUT:
    _route_errors()

__all__ = ["LEFT_OUT", "_C"]
