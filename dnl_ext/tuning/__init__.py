"""Which CUDA path a call of pairwise attention takes, decided on the user's own GPU: checked, then timed, then chosen.

    trial.py     one path on one problem: is it right, does it end, how long does it take
    child.py     the check of a path that has never run here, in a process that may die of it
    tuner.py     all paths on the calls that matter, into records of a file (dnl_ext/_tuned.py)
    advice.py    what the operators ask at the first call of a shape

``python -m dnl_ext tune`` is its command line; docs/cuda.md explains the choice.
"""

from .advice import advise
from .trial import Unchecked, Unfinished
from .tuner import Outcome, Target, tune, usual_calls

__all__ = ["Outcome", "Target", "Unchecked", "Unfinished", "advise", "tune", "usual_calls"]
