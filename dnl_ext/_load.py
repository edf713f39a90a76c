"""Loads the compiled operators, or says in one sentence why they cannot be loaded."""

import torch  # before ours: its libraries must be loaded first, and ours link to them

REBUILD = "rebuild it against the torch you run: pip install --force-reinstall --no-deps ."

try:
    from . import _C
except ImportError as error:
    missing = any(name in str(error) for name in ("_C", "libdnl_ext.so: cannot open")) and "dnl_ext" in str(error)
    if missing and "undefined symbol" not in str(error):
        reason = "dnl_ext is not built: its compiled part, dnl_ext._C or the libdnl_ext.so beside it, is missing"
    else:
        reason = f"dnl_ext._C was built for another torch or Python and does not load into torch {torch.__version__}"
    raise ImportError(f"{reason}; {REBUILD} ({error})") from error

__all__ = ["_C"]
