"""Checking the methods of a row against float64, and timing those that are right."""

import datetime
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dnl_ext.config import show_config

from ..case import DIRECTIONS, DTYPES
from ..check import USUAL_FLOOR
from ..runner import OWN, describe_device
from ..timing import failure_text
from .rows import Job, Row, rows

#: Version of the layout of a document of small calls.
SMALL_SCHEMA = 1
#: Seconds of one sample: so many calls in a row that it takes this long.
SAMPLE_SECONDS = 1e-3
#: Multiple of plain PyTorch's error from which a method counts as wrong. torch's attention reaches 10 in float32.
WRONG = 30.0
#: Relative error from which it counts as wrong whatever plain PyTorch's is.
MOST = 0.5
#: Calls before the first sample.
WARM_UP = 3


def _bound(job: Job, name: str, training: bool) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A call of a method without arguments: its output, or its gradients by everything that wants one."""
    method, leaves = job.methods[name], job.leaves(name, training)
    if not training:

        def forward() -> tuple[torch.Tensor, ...]:
            with torch.no_grad():
                return (method(*job.inputs),)

        return forward
    output = method(*job.inputs)
    values = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    grad_output = torch.empty_like(output).copy_(values.to(job.rounded or output.dtype))
    return lambda: torch.autograd.grad(method(*job.inputs), leaves, grad_output)


def _errors(results: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> list[float]:
    """Relative errors. A gradient of zero, as that of the bias of a whitened key, has none of its own: it is compared
    with the largest one."""
    norms = [torch.linalg.vector_norm(t).item() for t in truth]
    least = _least(truth)
    return [
        torch.linalg.vector_norm(x.double() - t).item() / max(norm, least, 1e-300)
        for x, t, norm in zip(results, truth, norms, strict=True)
    ]


def _least(truth: Sequence[torch.Tensor]) -> float:
    """The norm below which a tensor counts as zero."""
    return 1e-3 * max(torch.linalg.vector_norm(t).item() for t in truth)


def _checked(job: Job, training: bool) -> tuple[dict[str, Callable[[], tuple[torch.Tensor, ...]]], dict[str, str]]:
    """Calls of the methods that give what plain PyTorch gives in float64, and why others do not."""
    calls, failures = {}, {}
    truth = _bound(job.double(), "eager", training)()
    floor = USUAL_FLOOR * torch.finfo(job.inputs[0].dtype).eps
    bars = [max(floor, error) for error in _errors(_bound(job, "eager", training)(), truth)]
    # Of what is zero the error is rounding alone, and has no measure but plain PyTorch's.
    limits = [
        min(WRONG * bar, MOST) if torch.linalg.vector_norm(t).item() > _least(truth) else WRONG * bar
        for bar, t in zip(bars, truth, strict=True)
    ]
    for name in job.methods:
        try:
            call = _bound(job, name, training)
            errors = _errors(call(), truth)
        except Exception as raised:
            failures[name] = failure_text(raised)
            continue
        wrong = [(error, bar) for error, bar, limit in zip(errors, bars, limits, strict=True) if not error <= limit]
        if not wrong:
            calls[name] = call
        else:  # NaN is wrong too
            error, bar = wrong[0]
            failures[name] = f"wrong: off by {error:.1e}, {error / bar:.1f} times plain PyTorch's error"
    return calls, failures


def _times(
    calls: Mapping[str, Callable[[], object]], clock: Callable[[], float], rounds: int
) -> dict[str, list[float]]:
    """Seconds of one call of each method, once a round, in shuffled order. A sample is many calls."""

    def sample(call: Callable[[], object], count: int) -> float:
        start = clock()
        for _ in range(count):
            call()
        return (clock() - start) / count

    counts = {}
    for name, call in calls.items():
        for _ in range(WARM_UP):
            call()
        counts[name] = max(1, round(SAMPLE_SECONDS / max(sample(call, 2), 1e-7)))
    order, samples = random.Random(0), {name: [] for name in calls}
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            samples[name].append(sample(calls[name], counts[name]))
    return samples


def run_cell(row: Row, dtype: str, direction: str, rounds: int) -> dict[str, Any]:
    """One cell: what each method took, and the figure. On one thread the clock is that thread's own."""
    threads = torch.get_num_threads()
    cell: dict[str, Any] = {"what": row.what, "sizes": row.sizes, "dtype": dtype, "direction": direction}
    cell |= {"threads": threads, "methods": {}, "failures": {}, "best_peer": None, "ratio": None}
    calls, cell["failures"] = _checked(row.make(DTYPES[dtype]), direction == "training")
    times = _times(calls, time.thread_time if threads == 1 else time.perf_counter, rounds)
    for name, samples in times.items():
        cell["methods"][name] = {"median_s": statistics.median(samples), "best_s": min(samples)}
    if OWN not in times:
        return cell
    for name, samples in times.items():
        ratios = sorted(peer / own for peer, own in zip(samples, times[OWN], strict=True))
        quarter = len(ratios) // 4
        quartiles = [ratios[quarter], ratios[-1 - quarter]]
        cell["methods"][name] |= {"ratio": statistics.median(ratios), "quartiles": quartiles}
    peers = [name for name in times if name != OWN]
    cell["best_peer"] = min(peers, key=lambda name: cell["methods"][name]["ratio"], default=None)
    if peers:
        cell["ratio"] = cell["methods"][cell["best_peer"]]["ratio"]
    return cell


@dataclass
class SmallOptions:
    """What a sweep over small calls covers.

    Attributes:
        dtypes, directions: as in :class:`Case`. threads: numbers of threads, each for the whole sweep.
        rounds: samples of every method in every cell. only: rows whose name or sizes contain this.

    Example:
        >>> from dnl_ext.benchmark import SmallOptions
        >>> len(SmallOptions().selected()) >= 60
        True
        >>> [row.sizes for row in SmallOptions(only="GlobalContext3d").selected()]
        ['1x32x4x8x8']
    """

    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")
    directions: tuple[str, ...] = DIRECTIONS
    threads: tuple[int, ...] = (1,)
    rounds: int = 15
    only: str = ""

    def selected(self) -> list[Row]:
        return [row for row in rows() if self.only in f"{row.what} {row.sizes}"]

    def cells(self) -> Iterator[tuple[int, Row, str, str]]:
        for threads in self.threads:
            for row in self.selected():
                for dtype in self.dtypes:
                    for direction in self.directions:
                        yield threads, row, dtype, direction


def run_small(
    options: SmallOptions,
    save: Callable[[dict[str, Any]], object] | None = None,
    progress: Callable[[str, int, int], object] | None = None,
) -> dict[str, Any]:
    """Time small calls of every operator and block against plain PyTorch.

    Args:
        options: :class:`SmallOptions`.
        save: function of the document, called after every row (an interrupted run keeps what it has).
        progress: function of (row in words, number of cells done, of all), called before every cell.

    Returns:
        dict: the document, see benchmarks/README.md. ``document["cells"]`` has one entry per row, dtype, direction and
        number of threads.

    Example:
        >>> from dnl_ext.benchmark import SmallOptions, run_small
        >>> options = SmallOptions(dtypes=("fp32",), directions=("forward",), rounds=3, only="mean_subtract 64x64")
        >>> cell = run_small(options)["cells"][0]
        >>> cell["best_peer"], cell["ratio"] > 0
        ('eager', True)
    """
    document: dict[str, Any] = {
        "small_schema": SMALL_SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": describe_device("cpu"),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "config": dict(show_config()),
        "rounds": options.rounds,
        "convention": {
            "ratio": "time of the fastest peer over that of dnl_ext: for each peer the median over rounds of the ratio "
            "within a round, and of these the least; quartiles likewise",
            "clock": "CPU time of the thread on one thread, else the wall's",
            "training": "forward and backward, gradients for every input and parameter",
        },
        "cells": [],
    }
    cells = list(options.cells())
    before = torch.get_num_threads()
    try:
        for number, (threads, row, dtype, direction) in enumerate(cells):
            if progress:
                progress(f"{row.what} {row.sizes} {dtype} {direction}", number, len(cells))
            torch.set_num_threads(threads)
            document["cells"].append(run_cell(row, dtype, direction, options.rounds))
            if save and (number + 1 == len(cells) or cells[number + 1][1] is not row):
                save(document)
    finally:
        torch.set_num_threads(before)
    return document
