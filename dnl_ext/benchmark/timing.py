"""Interleaved timing: every round runs every method once, in shuffled order, so that none has quieter times."""

import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

#: Takes a function, runs it once and returns the seconds that it took.
Clock: TypeAlias = Callable[[Callable[[], object]], float]

#: Flush at least this many bytes before a CUDA call when the size of its L2 cache is not known.
L2_BYTES = 256 * 2**20
#: GPU cycles to keep the device busy while the host enqueues a call, so that launches are not what is timed.
HEAD_START_CYCLES = 1_000_000
#: Share of the time that the roof's product may take beyond its first samples.
ROOF_SHARE = 0.25


@dataclass
class Entry:
    """One thing to time. `call` runs it once; `samples` are its seconds, in order."""

    name: str
    call: Callable[[], object]
    share: float | None = None  # at most this share of the time spent, after `least` samples; None: every round
    samples: list[float] = field(default_factory=list)
    failure: str | None = None

    @property
    def best(self) -> float:
        return min(self.samples)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


class CpuClock:
    """Seconds of one call by the wall clock."""

    def __call__(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


class CudaClock:
    """Seconds of one call on the GPU between two events, with a cold L2 and the launches hidden where they can be."""

    def __init__(self, device: torch.device | str) -> None:
        properties = torch.cuda.get_device_properties(device)
        size = max(2 * getattr(properties, "L2_cache_size", 0), L2_BYTES)
        self.flush: torch.Tensor = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self.flush.zero_()
        if hasattr(torch.cuda, "_sleep"):
            torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000


def clock_for(device: torch.device | str) -> Clock:
    return CudaClock(device) if torch.device(device).type == "cuda" else CpuClock()


def interleave(
    entries: list[Entry], clock: Clock, budget: float, least: int = 3, most: int = 50, seed: int = 0
) -> list[Entry]:
    """Time `entries` in rounds until `budget` seconds are spent; at least `least` and at most `most` rounds.

    An entry whose call raises is left out from then on, with the reason in its `failure`. Calls must have run before:
    there is no warm-up here.
    """
    order = random.Random(seed)
    spent = {entry.name: 0.0 for entry in entries}
    started = time.perf_counter()
    for done in range(most):
        elapsed = time.perf_counter() - started
        if done >= least and elapsed * (done + 1) / done > budget:
            break
        live = [entry for entry in entries if entry.failure is None]
        for entry in order.sample(live, len(live)):
            if entry.share is not None and len(entry.samples) >= least:
                total = sum(spent.values())
                if spent[entry.name] + entry.samples[-1] > entry.share * total:
                    continue
            try:
                seconds = clock(entry.call)
            except Exception as error:
                entry.failure, entry.samples = failure_text(error), []
                continue
            entry.samples.append(seconds)
            spent[entry.name] += seconds
    return entries


def failure_text(error: BaseException, said: Iterable[warnings.WarningMessage] = ()) -> str:
    """One line that says what went wrong, with the warnings that came before it."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of GPU memory"
    texts = [str(error), *dict.fromkeys(str(warning.message) for warning in said)]
    lines = [text.strip().splitlines()[0] for text in texts if text.strip()]
    return f"{type(error).__name__}: {'; '.join(lines)}"[:400]


def roof_entry(dtype: torch.dtype, device: torch.device | str, edge: int) -> Entry:
    """The roof: a plain product of two (edge, edge) matrices of the dtype, into memory that is already there."""
    a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    product = Entry("roof", lambda: torch.mm(a, b, out=out), share=ROOF_SHARE)
    product.call()  # warm-up
    return product


def roof_edge(dtype: torch.dtype, device: torch.device | str, seconds: float) -> int:
    """Edge of the roof's product: the largest of a few sizes that takes at most `seconds`."""
    clock = clock_for(device)
    small, *larger = (2048, 4096, 8192) if torch.device(device).type == "cuda" else (1024, 2048, 3072, 4096)
    entry = roof_entry(dtype, device, small)
    once = min(clock(entry.call) for _ in range(3))
    fits = [edge for edge in larger if once * (edge / small) ** 3 <= seconds]
    return max(fits, default=small)
