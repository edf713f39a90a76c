"""One path on one problem: whether it is right, whether it ends, how long it takes.

Right is what the benchmark's gate calls so (dnl_ext/benchmark/check.py): an error against float64 of at most twice
(gradients: three times) that of plain PyTorch. Either error of a small problem is one draw of a few roundings, so a
problem that misses is drawn anew, and root mean squares over all draws count. Two runs must agree bit for bit.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .._load import _C
from .._tuned import Call
from ..benchmark.case import Case, Inputs, make_inputs
from ..benchmark.check import OWN_BAR, Truth, gradient_names

Result = TypeVar("Result")

#: Further draws of a problem that misses the bar.
REDRAWS = 6
#: Seconds after which a path counts as one that does not end. The first call loads its kernels, or compiles PTX.
PATIENCE = 60.0
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}

#: What threads that never ended hold: their kernels may still write to it.
_abandoned: list[Any] = []


class Unfinished(RuntimeError):
    """A path did not end in time. Its kernel cannot be stopped: what waits for the whole device may wait forever.

    Example:
        >>> import time, torch
        >>> from dnl_ext.tuning import Unfinished
        >>> from dnl_ext.tuning.trial import finish
        >>> try:
        ...     finish(lambda settle: time.sleep(1), torch.device("cpu"), seconds=0.01)
        ... except Unfinished as error:
        ...     print(error)
        no end within 0.01 s
    """


class Unchecked(RuntimeError):
    """Whether a path is right could not be found out: not even the chain ran, or there was no memory.

    Example:
        >>> from dnl_ext.tuning import Unchecked
        >>> str(Unchecked("out of GPU memory"))
        'out of GPU memory'
    """


@contextlib.contextmanager
def forced(path: str) -> Iterator[None]:
    """Calls of this thread take `path`, and nobody else's do."""
    _C.force_path(path)
    try:
        yield
    finally:
        _C.force_path("")


def finish(work: Callable[[Callable[[], None]], Result], device: torch.device, seconds: float) -> Result:
    """The result of ``work(settle)``, run in a thread of its own and, on a GPU, on a stream of its own.

    The thread has none of the caller's state (autocast, modes, gradients, compilation). ``settle()`` returns when the
    GPU has done all that was asked of it so far; work calls it before it reads a result, since a plain read would wait
    for a kernel that never ends.

    Raises:
        Unfinished: no end within `seconds`.
        Exception: what work raised.
    """
    deadline = time.monotonic() + seconds
    done, box = threading.Event(), {}

    def settle():
        if device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record()
        while not event.query():
            if time.monotonic() > deadline:
                raise Unfinished
            time.sleep(0.0005)

    def run():
        try:
            if device.type == "cuda":
                with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
                    box["result"] = work(settle)
                    settle()
            else:
                box["result"] = work(settle)
        except BaseException as error:
            box["error"] = error
        done.set()

    threading.Thread(target=run, daemon=True, name="dnl_ext tuning").start()
    # The thread gives up by itself; it is late only where it does not come back from a call.
    if not done.wait(max(0.0, deadline - time.monotonic())) or isinstance(box.get("error"), Unfinished):
        _abandoned.append((work, box))
        raise Unfinished(f"no end within {seconds:g} s")
    if "error" in box:
        raise box["error"]
    return box["result"]


@dataclass(frozen=True)
class Problem:
    """A call with numbers."""

    call: Call
    device: torch.device
    unary: bool = False
    seed: int = 0

    @property
    def case(self) -> Case:
        batch, queries, keys, width, channels = self.call.sizes
        direction = "training" if self.call.backward else "forward"
        return Case(
            width, channels, queries, keys, SHORT[self.call.dtype], direction, str(self.device), batch, unary=self.unary
        )

    def inputs(self) -> Inputs:
        """In the layout of the call."""
        inputs = make_inputs(self.case, self.seed)
        names = ("query", "key", "value")
        query, key, value = (
            getattr(inputs, name).detach() if first else getattr(inputs, name).detach().contiguous()
            for name, first in zip(names, self.call.channel_first, strict=True)
        )
        mask = inputs.mask_logits
        return Inputs(query, key, value, None if mask is None else mask.detach())

    def reproducer(self, path: str) -> str:
        """A command that repeats the check."""
        layout = ",".join("channel_first" if first else "rows" for first in self.call.channel_first)
        command = f"dnl-ext tune --check-only --path {path} --shape {','.join(map(str, self.call.sizes))}"
        command += f" --dtype {self.call.dtype} --direction {'backward' if self.call.backward else 'forward'}"
        command += f" --layout {layout} --seed {self.seed}"
        return command + (" --unary" if self.unary else "")


class Trial:
    """A problem in memory: one direction of pairwise attention by any path, through the operators themselves.

    Autograd would run a backward in a thread of its own, where no path is forced.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem: Problem = problem
        self.case: Case = problem.case
        self.inputs: Inputs = problem.inputs()
        self.truth: Truth = Truth(self.case, self.inputs, seed=problem.seed + 1)
        self.output: torch.Tensor | None = None
        if not problem.call.backward:
            return
        with forced("chain"):
            self.saved: tuple[torch.Tensor, ...] = self._forward(save_residual=True)
        self.output = self.saved[0]
        assert self.truth.grad_output is not None
        self.grad_output: torch.Tensor = torch.zeros_like(self.output)
        self.grad_output[..., self.truth.rows, :] = self.truth.grad_output.to(self.output.dtype)

    def _forward(self, save_residual: bool) -> tuple[torch.Tensor, ...]:
        whiten = "channel" if self.case.whiten else None
        return torch.ops.dnl_ext.pairwise_forward(*self.inputs, self.case.scale, whiten, save_residual)

    def run(self, path: str) -> tuple[torch.Tensor, ...]:
        """(output,) of a forward, the gradients of a backward."""
        with forced(path):
            if not self.problem.call.backward:
                return self._forward(save_residual=False)[:1]
            whiten = "channel" if self.case.whiten else None
            grads = torch.ops.dnl_ext.pairwise_backward(
                self.grad_output, *self.inputs, *self.saved, self.case.scale, whiten, True, True, True, self.case.unary
            )
            return tuple(grads[: len(gradient_names(self.inputs))])

    def named(self, results: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        if self.output is None:
            return {"output": results[0]}
        return {"output": self.output} | dict(zip(gradient_names(self.inputs), results, strict=True))


def runnable(call: Call, capability: int, multiprocessors: int, paths: Sequence[str] | None = None) -> list[str]:
    """The paths that can take a call on such a GPU, all of them or those of `paths`."""
    names = ("query_channel_first", "key_channel_first", "value_channel_first")
    layout: dict[str, Any] = dict(zip(names, call.channel_first, strict=True))
    found = []
    for path in paths or _C.cuda_paths():
        with contextlib.suppress(NotImplementedError):
            plan = _C.cuda_plan(
                call.dtype, *call.sizes, **layout, backward=call.backward, capability=capability,
                multiprocessors=multiprocessors, tf32=call.dtype == "float32", path=path,
            )  # fmt: skip
            if plan["path"] == path:
                found.append(path)
    return found


def fault(problem: Problem, path: str, patience: float | None = None) -> str:
    """What is wrong with a path on a problem, with a command that shows it; nothing for a path that is right."""
    seconds = PATIENCE if patience is None else patience
    try:
        reason = finish(lambda settle: _misses(problem, path, settle), problem.device, seconds)
    except Unfinished as error:
        reason = str(error)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        text = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {text[0] if text else ''}"
    return f"{reason} [{problem.reproducer(path)}]" if reason else ""


def first_fault(
    path: str,
    problems: Sequence[Problem],
    patience: float | None = None,
    begin: Callable[[str], object] = lambda stage: None,
) -> str:
    """What is wrong with a path on the first of the problems that it fails, or nothing.

    The chain goes first: where that fails, the path is not to blame. ``begin("chain")`` is called before it, and
    ``begin(command)`` before the path, with the command that repeats it.

    Raises:
        Unchecked: the chain failed too, or there was no memory.
    """
    try:
        for problem in problems:
            begin("chain")
            if reason := fault(problem, "chain"):
                raise Unchecked(reason)
            begin(problem.reproducer(path))
            if reason := fault(problem, path, patience):
                return reason
    except torch.OutOfMemoryError:
        raise Unchecked("out of GPU memory") from None
    return ""


def _misses(problem: Problem, path: str, settle: Callable[[], None]) -> str:
    """Which result misses the bar, and stays above it over further draws."""
    squares: dict[str, list[float]] = {}
    for draw in range(1 + REDRAWS):
        trial = Trial(Problem(problem.call, problem.device, problem.unary, problem.seed + draw))
        first, second = trial.run(path), trial.run(path)
        settle()
        if not all(torch.equal(x, y) or not x.isfinite().all() for x, y in zip(first, second, strict=True)):
            return f"{path}: two runs differ"
        results = trial.named(first)
        _, _, wrong = trial.truth.verdict(results, own=True)
        errors = trial.truth.errors(results)
        for name, error in errors.items():
            own, bar = squares.setdefault(name, [0.0, 0.0])
            squares[name] = [own + error**2, bar + trial.truth.bars[name] ** 2]
        if draw == 0 and wrong is None:
            return ""
    for name, (own, bar) in squares.items():
        ratio = math.sqrt(own / bar) if bar else math.inf
        allowed = OWN_BAR["output" if name == "output" else "grad"]
        if not ratio <= allowed:  # NaN is wrong too
            return f"{path}: {name} is off by {ratio:.1f} times plain PyTorch's error (allowed: {allowed:g})"
    return ""
