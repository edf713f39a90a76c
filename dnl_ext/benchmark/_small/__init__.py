"""Small calls: every operator and block at sizes where a call's own cost shows, against the best plain PyTorch.

A row is an operator or a block at one size, a cell is a row in one dtype, direction and number of threads. A method's
values are checked against float64 before it is timed. A cell's figure is the time of the fastest peer over that of
dnl_ext: for each peer the median over rounds of the ratio within a round, and of these the least. Below 1 we lose.
"""

from .measure import SMALL_SCHEMA, SmallOptions, run_small
from .tables import is_small, load_small, small_markdown, small_tables

__all__ = ["SMALL_SCHEMA", "SmallOptions", "is_small", "load_small", "run_small", "small_markdown", "small_tables"]
