"""The benchmark of dnl_ext: check every method, then time all of them in turn, then report ratios.

    case.py     what is computed: sizes, inputs, counted operations
    methods.py  who computes it: dnl_ext and what a user would pick instead
    check.py    the gate: error against float64 before anything is timed
    timing.py   interleaved timing on CPU and CUDA
    memory.py   peak memory beyond inputs, outputs and gradients
    runner.py   all of it in order, into one JSON document
    report.py   the document as a table and as a chart
    small.py    another benchmark: small calls of every operator and block

`python -m dnl_ext bench` is its command line; benchmarks/README.md explains the figures.
"""

from ._small import SMALL_SCHEMA, SmallOptions, is_small, load_small, run_small, small_markdown, small_tables
from .case import DIRECTIONS, DTYPES, Case, forward_flops, training_flops
from .methods import METHODS, Method, Unavailable
from .report import chart, load, tables
from .runner import SCHEMA, Options, passed, run, save_json

__all__ = [
    "DIRECTIONS",
    "DTYPES",
    "METHODS",
    "SCHEMA",
    "SMALL_SCHEMA",
    "Case",
    "Method",
    "Options",
    "SmallOptions",
    "Unavailable",
    "chart",
    "forward_flops",
    "is_small",
    "load",
    "load_small",
    "passed",
    "run",
    "run_small",
    "save_json",
    "small_markdown",
    "small_tables",
    "tables",
    "training_flops",
]
