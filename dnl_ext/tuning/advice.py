"""What the operators ask at the first call of a shape (csrc/ops/pairwise/path_choice.h): which path it takes."""

import contextlib
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .. import _tuned
from .._load import _C
from .._tuned import Call, Choice, Machine
from .child import IN_CHILD
from .trial import Unchecked, runnable
from .tuner import Target, self_check, tune

#: What could not be checked in this process, and is not tried again.
_unchecked: set[tuple[Any, ...]] = set()
#: Held by the thread that measures or checks; others take what is known until it has.
_at_work = threading.Lock()


def advise(
    device: int,
    capability: int,
    multiprocessors: int,
    dtype: str,
    backward: bool,
    sizes: Sequence[int],
    layout: Mapping[str, bool],
) -> tuple[str, bool]:
    """The path of a call, and whether later calls of its shape take it unasked.

    What was measured decides, else the default of the architecture, which is checked first. With DNL_EXT_TUNE=1 a shape
    that was not measured is measured now. Nothing is launched while the stream is captured into a graph: the call then
    takes what is known, or the chain, and is asked for again.

    Args:
        device: index of the GPU. capability: 10 major + minor. multiprocessors: of it.
        dtype: "bfloat16", "float16" or "float32". backward: which direction.
        sizes: (batches, queries, keys, Dqk, Dv).
        layout: ``query_channel_first``, ``key_channel_first`` and ``value_channel_first``.

    Example:
        >>> import torch
        >>> from dnl_ext.tuning import advise
        >>> layout = dict.fromkeys(("query_channel_first", "key_channel_first", "value_channel_first"), True)
        >>> if torch.cuda.is_available():
        ...     path, keep = advise(0, 90, 132, "bfloat16", False, (1, 4096, 4096, 256, 512), layout)
    """
    if os.environ.get(IN_CHILD):
        return "chain", False
    batches, queries, keys, width, channels = sizes
    first = layout["query_channel_first"], layout["key_channel_first"], layout["value_channel_first"]
    call = Call(dtype, backward, (batches, queries, keys, width, channels), first)
    machine = _tuned.machine_of(device)
    choice = _choice(machine, capability, multiprocessors, call)
    record = _tuned.measured(machine, call)
    new = _asked_to_tune() and (record is None or record.call != call)
    known = "chain" if choice.unchecked else choice.path
    subject = (machine, choice.path, dtype, backward, width, channels, first)
    if not new and (not choice.unchecked or subject in _unchecked):
        return known, True
    if dtype == "float32" and not _C.tf32_allowed():
        return "chain", False
    if capturing(device):
        return known, False
    if not _at_work.acquire(blocking=False):
        return known, False
    try:
        target = Target(
            torch.device("cuda", device) if device >= 0 else torch.device("cpu"), machine, capability, multiprocessors
        )
        if new:
            _measure(call, target)
            choice = _choice(machine, capability, multiprocessors, call)
        if choice.unchecked:
            _check(choice.path, call, target)
            choice = _choice(machine, capability, multiprocessors, call)
    except Unchecked as error:
        _unchecked.add(subject)
        _warn(f"{choice.path} could not be checked ({error}); {dtype} takes the chain, and the next process asks again")
        return "chain", True
    except Exception as error:  # such as no memory for a second problem beside the user's own
        text = str(error).strip().splitlines()
        _warn(f"{call.describe()} could not be measured ({text[0] if text else type(error).__name__})")
        return known, True
    finally:
        _at_work.release()
    return choice.path, True


def _choice(machine: Machine, capability: int, multiprocessors: int, call: Call) -> Choice:
    """What is known now, and the chain where the default cannot take the call: then there is nothing to check."""
    choice = _tuned.choice(machine, capability, call)
    if choice.unchecked and not runnable(call, capability, multiprocessors, [choice.path]):
        return Choice("chain", f"{choice.path}, the default of this architecture, cannot take it")
    return choice


def capturing(device: int) -> bool:
    """Whether the stream on which calls on this GPU run is being captured into a graph."""
    if device < 0:
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _asked_to_tune() -> bool:
    return os.environ.get("DNL_EXT_TUNE", "0").lower() not in ("", "0", "false", "off", "no")


def _measure(call: Call, target: Target) -> None:
    outcomes, unwritten = tune([call], target)
    if target.device.type == "cuda":
        torch.cuda.empty_cache()  # what a stream of its own has used would serve no other
    for outcome in outcomes:
        for reason in outcome.wrong.values():
            _warn(f"{reason}; it is not taken")
        if outcome.skipped:
            _warn(f"{call.describe()} could not be measured ({outcome.skipped})")
    if unwritten:
        _warn(unwritten)


def _check(path: str, call: Call, target: Target) -> None:
    verdict: Any = self_check(path, call, target)
    if verdict.reason:
        _warn(f"{verdict.reason}; {call.dtype} takes the chain")


def _warn(text: str) -> None:
    with contextlib.suppress(RuntimeWarning):  # where warnings are errors: none can leave an operator's choice
        warnings.warn(f"dnl_ext: {text}", RuntimeWarning, stacklevel=2)
