"""All paths on the calls that matter: each is checked, the right ones are timed in turn, the fastest is chosen."""

import contextlib
import datetime
import functools
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from .. import _tuned
from .._load import _C
from .._tuned import Call, Machine, Measured, Verdict
from ..benchmark.timing import Entry, clock_for, interleave
from .child import first_fault_of_child
from .trial import Problem, Trial, Unchecked, fault, finish, first_fault, runnable

#: Dqk, Dv and N of the calls that are tuned where none are named: the official block on feature maps of 64 x 64, of
#: 97 x 97 (a 769 x 769 crop at stride 8) and of 128 x 128 pixels.
WIDTHS = ((256, 256), (256, 512), (256, 1024))
POSITIONS = (4096, 9409, 16384)
#: Seconds of timing that a call gets; each path has at least ROUNDS samples.
SECONDS, ROUNDS = 0.5, 5
#: Time that any path has to end in, all rounds together.
PATIENCE = 600.0
#: Another path must be this much faster than the chain to be chosen.
MARGIN = 1.02
#: Sizes of the self-check, odd, with several tiles each way: batches, Nq, Nk.
SMALL = ((1, 193, 321), (2, 97, 130))
#: Of its larger problems, queries for each multiprocessor and keys: a block of any kernel then works on one tile after
#: another, as in calls of real sizes.
LARGE = (128, 1500)


@dataclass(frozen=True)
class Target:
    """A GPU, as the choice sees it.

    Attributes:
        device: as torch names it. machine: what records are kept for. capability: 10 major + minor.
        multiprocessors: of it.

    Example:
        >>> import torch
        >>> from dnl_ext.tuning import Target
        >>> target = Target.of("cuda") if torch.cuda.is_available() else None
    """

    device: torch.device
    machine: Machine
    capability: int  # 10 major + minor
    multiprocessors: int

    @classmethod
    def of(cls, device: torch.device | str) -> "Target":
        index = torch.device(device).index
        index = torch.cuda.current_device() if index is None else index
        properties = torch.cuda.get_device_properties(index)
        capability = 10 * properties.major + properties.minor
        machine = _tuned.machine_of(index)
        return cls(torch.device("cuda", index), machine, capability, properties.multi_processor_count)


@dataclass(frozen=True)
class Outcome:
    """What came of one call.

    Attributes:
        path: the fastest path that is right; None where none is, or where nothing was timed.
        milliseconds: median per path that is right. wrong: what is wrong with the others, each with a command that
            shows it. skipped: why nothing could be found out.

    Example:
        >>> from dnl_ext.tuning import Outcome, usual_calls
        >>> outcome = Outcome(usual_calls()[0], "fused", {"chain": 1.87, "fused": 1.31})
        >>> outcome.path, outcome.wrong
        ('fused', {})
    """

    call: Call
    path: str | None
    milliseconds: dict[str, float] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    skipped: str = ""


def usual_calls(
    dtypes: Sequence[str] = ("bfloat16", "float16"), widths: Sequence[tuple[int, int]] = WIDTHS
) -> list[Call]:
    """The calls that are tuned where none are named, channel-first, most common first.

    Example:
        >>> from dnl_ext.tuning import usual_calls
        >>> print(usual_calls()[0].describe())
        forward, batch 1, N = 4096, (256, 256)
    """
    return [
        Call(dtype, backward, (1, n, n, *pair))
        for dtype in dtypes
        for n in POSITIONS
        for pair in widths
        for backward in (False, True)
    ]


def tune(
    calls: Iterable[Call],
    target: Target,
    *,
    paths: Sequence[str] | None = None,
    seconds: float = SECONDS,
    check_only: bool = False,
    unary: bool = False,
    seed: int = 0,
    report: Callable[[Outcome], object] = lambda outcome: None,
) -> tuple[list[Outcome], str]:
    """Check and time the paths of each call, and keep what was found.

    Args:
        calls: what to tune.
        target: the GPU.
        paths: names of those to try, all by default.
        seconds: of timing a call.
        check_only: time nothing and keep nothing.
        unary, seed: of the problem's numbers.
        report: called with each Outcome as soon as it is known and kept.

    Returns:
        The outcomes, and why they could not be written to the file, or nothing.

    Example:
        >>> import torch
        >>> from dnl_ext.tuning import Target, tune, usual_calls
        >>> if torch.cuda.is_available():
        ...     outcomes, unwritten = tune(usual_calls()[:1], Target.of("cuda"))
    """
    outcomes, unwritten = [], ""
    for call in calls:
        problem = Problem(call, target.device, unary, seed)
        candidates = runnable(call, target.capability, target.multiprocessors, paths)
        try:
            wrong = {path: reason for path in candidates if (reason := _fault(problem, path, target, check_only))}
            right = [path for path in candidates if path not in wrong]
            times = {} if check_only or not right else measure(problem, right, seconds)
            outcome = Outcome(call, _fastest(times), times, wrong)
        except torch.OutOfMemoryError:
            outcome = Outcome(call, None, skipped="out of GPU memory")
        if outcome.path:
            record = Measured(target.machine, call, outcome.path, outcome.milliseconds, _today(), outcome.wrong)
            unwritten = _tuned.known().add([record])
        outcomes.append(outcome)
        report(outcome)
    _C.forget_paths()
    return outcomes, unwritten


def _fault(problem: Problem, path: str, target: Target, check_only: bool) -> str:
    """What is wrong with a path. One that has never run on this GPU is tried by another process first: this one would
    lose its context, and all that was measured, to an illegal access."""
    if target.device.type == "cuda" and path != "chain" and not check_only:
        with contextlib.suppress(Unchecked):
            verdict = _tuned.verdict(target.machine, path, problem.call) or self_check(path, problem.call, target)
            if verdict.reason:
                return verdict.reason
    return fault(problem, path)


def measure(problem: Problem, paths: Sequence[str], seconds: float) -> dict[str, float]:
    """Median milliseconds of each path on a problem, timed in turn."""

    def work(settle: Callable[[], None]) -> dict[str, float]:
        trial = Trial(problem)
        if trial.output is not None:
            trial.grad_output.normal_()
        entries = [Entry(path, functools.partial(trial.run, path)) for path in paths]
        interleave(entries, clock_for(problem.device), seconds, least=ROUNDS)
        return {entry.name: 1e3 * statistics.median(entry.samples) for entry in entries if entry.samples}

    return finish(work, problem.device, PATIENCE)


def _fastest(times: dict[str, float]) -> str | None:
    best = min(times, key=lambda path: times[path], default=None)
    if best and "chain" in times and times["chain"] <= MARGIN * times[best]:
        return "chain"
    return best


def check_problems(call: Call, target: Target) -> list[Problem]:
    """The self-check's: the widths of a call at small sizes, channel-first and by rows, and at larger ones in the order
    of the call, with and without the unary term."""
    width, channels = call.sizes[3:]
    queries, keys = LARGE
    large = (1, queries * target.multiprocessors - 63, keys)  # whole waves of blocks, so that none share the keys

    def problem(sizes: tuple[int, int, int], channel_first: tuple[bool, bool, bool], unary: bool) -> Problem:
        return Problem(Call(call.dtype, call.backward, (*sizes, width, channels), channel_first), target.device, unary)

    return [
        problem(SMALL[0], (True, True, True), unary=False),
        problem(SMALL[1], (False, False, False), unary=True),
        problem(large, call.channel_first, unary=True),
        problem(large, call.channel_first, unary=False),
    ]


def self_check(path: str, call: Call, target: Target, patience: float | None = None) -> Verdict:
    """Whether a path is right, and ends, on problems with the widths of a call; kept in the file.

    Raises:
        Unchecked: that could not be found out, and nothing is kept.
    """
    # The emulated device is in this process.
    check = first_fault_of_child if target.device.type == "cuda" else first_fault
    reason = check(path, check_problems(call, target), patience)
    width, channels = call.sizes[3:]
    verdict = Verdict(
        target.machine, path, call.dtype, call.backward, width, channels, reason, _today(), call.channel_first
    )
    _tuned.known().add([verdict])
    return verdict


def _today() -> str:
    return datetime.date.today().isoformat()
