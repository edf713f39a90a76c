"""Figures of an ablation compared between its rows: mean and spread over seeds, and paired tests of differences."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from scipy import stats

from .recipes import Row
from .runs import Run

#: (mean, deviation over seeds, number of seeds) of a figure.
Spread: TypeAlias = tuple[float, float, int]


def figures_of(result: Mapping[str, Any]) -> dict[str, float]:
    """All figures of a result by name, "miou" and those of the attention; what could not be measured is left out."""
    figures = {"miou": result["miou"], **result["attention"]}
    return {name: value for name, value in figures.items() if value is not None}


def over_seeds(results: Mapping[Run, Mapping[str, Any]]) -> dict[Row, dict[str, Spread]]:
    """Mean and spread of every figure over the seeds of each (variant, temperature).

    Args:
        results: {Run: result}.

    Returns:
        {(variant, temperature): {figure: (mean, deviation over seeds, number of seeds)}}; the deviation of one is nan.

    Example:
        >>> from dnl_ext.segmentation.experiments import Run, over_seeds
        >>> results = {Run("dnl", 0.05, seed): {"miou": 0.5 + seed, "attention": {}} for seed in (0, 1, 2)}
        >>> over_seeds(results)
        {('dnl', 0.05): {'miou': (1.5, 1.0, 3)}}
    """
    groups: dict[Row, list[dict[str, float]]] = {}
    for run, result in results.items():
        groups.setdefault(run.row, []).append(figures_of(result))
    return {
        row: {
            name: spread([entry[name] for entry in entries if name in entry])
            for name in dict.fromkeys(name for entry in entries for name in entry)
        }
        for row, entries in groups.items()
    }


def spread(values: Sequence[float]) -> Spread:
    """(mean, deviation, number) of a list; nan for what it is too short for."""
    mean = statistics.fmean(values) if values else float("nan")
    return mean, statistics.stdev(values) if len(values) > 1 else float("nan"), len(values)


class Difference(NamedTuple):
    """A figure's difference between two rows, over the seeds that both have.

    Attributes:
        mean: of the differences; nan where the rows share no seed.
        deviation: of the differences between seeds; nan for one seed.
        seeds: number of seeds that both rows have.
        p: of a two-sided paired t-test, nan where it says nothing: fewer than two seeds, or equal differences.

    Example:
        >>> from dnl_ext.segmentation.experiments import Difference
        >>> Difference(mean=0.012, deviation=0.004, seeds=5, p=0.003).seeds
        5
    """

    mean: float
    deviation: float
    seeds: int
    p: float


def difference(results: Mapping[Run, Mapping[str, Any]], first: Row, second: Row, figure: str) -> Difference:
    """A figure of one row less that of another, paired by seed.

    Runs of one seed see the same images in the same order. They do not begin with the same weights behind the block,
    which different blocks draw differently.

    Args:
        results: {Run: result}.
        first, second: (variant, temperature).
        figure: "miou", or a figure of the attention such as "total.jsd".

    Returns:
        A :class:`Difference`.

    Example:
        >>> from dnl_ext.segmentation.experiments import Run, difference
        >>> scores = {"nl": (0.50, 0.54, 0.52), "dnl": (0.53, 0.58, 0.54)}
        >>> results = {
        ...     Run(variant, 1.0, seed): {"miou": score, "attention": {}}
        ...     for variant, values in scores.items() for seed, score in enumerate(values)
        ... }
        >>> found = difference(results, ("dnl", 1.0), ("nl", 1.0), "miou")
        >>> round(found.mean, 3), found.seeds, round(found.p, 3)
        (0.03, 3, 0.035)
    """
    ours: list[float] = []
    theirs: list[float] = []
    for run, result in results.items():
        if run.row == first:
            a = figures_of(result).get(figure)
            b = figures_of(results.get(Run(*second, run.seed), {"miou": None, "attention": {}})).get(figure)
            if a is not None and b is not None:
                ours.append(a)
                theirs.append(b)
    mean, deviation, seeds = spread([a - b for a, b in zip(ours, theirs, strict=True)])
    p = math.nan
    if seeds > 1 and deviation > 0:
        tested: Any = stats.ttest_rel(ours, theirs)
        p = float(tested.pvalue)
    return Difference(mean, deviation, seeds, p)
