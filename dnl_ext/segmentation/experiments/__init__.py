"""Experiments that train several networks and compare them.

:func:`run_demo` is ``dnl-ext demo``; :class:`Ablation` with :func:`write_report` and :func:`draw_pictures` is
``dnl-ext ablate``.
"""

from .ablation import Ablation
from .ablation_pictures import draw_pictures
from .ablation_report import write_report
from .comparison import Difference, difference, over_seeds
from .demo import DemoSettings, run_demo
from .memory import measure_step
from .recipes import RECIPES, Recipe
from .runs import Run

__all__ = [
    "RECIPES",
    "Ablation",
    "DemoSettings",
    "Difference",
    "Recipe",
    "Run",
    "difference",
    "draw_pictures",
    "measure_step",
    "over_seeds",
    "run_demo",
    "write_report",
]
