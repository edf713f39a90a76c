"""The self-check in a process of its own.

An illegal access ends a CUDA context, and whatever the process has on the GPU with it; a kernel that never ends keeps
all that wait for the device. Both are then the child's. It reads a task from its input, names each stage on its output
before it begins, and ends with a line that holds the result.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from .._tuned import Call
from .trial import PATIENCE, Problem, Unchecked, first_fault

#: The child's program. Its arguments are the parent's sys.path: it must import what the parent has, wherever it runs.
PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from dnl_ext.tuning.child import main; main()"
#: Seconds in which the child imports torch, wakes the GPU up and ends.
START = 120.0
#: Before each line that is the child's own: libraries print too.
MARK = "dnl_ext self-check: "
#: Ends that others make: Ctrl-C, a scheduler, a system without memory.
BY_OTHERS = {-getattr(signal, name, 0) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGKILL")}
#: Set for the child, whose own calls are not to be checked.
IN_CHILD = "DNL_EXT_IN_SELF_CHECK"


def first_fault_of_child(path: str, problems: Sequence[Problem], patience: float | None = None) -> str:
    """:func:`first_fault` of the same arguments, found by another process on the same GPU.

    Raises:
        Unchecked: nothing was found out: there is no such process, it was ended from outside, or not even the chain
            ran in it.
    """
    seconds = PATIENCE if patience is None else patience
    task = {"path": path, "seconds": seconds, "problems": [_plain(problem) for problem in problems]}
    stage, last, code = "", "", 0
    try:
        done = subprocess.run(
            [_interpreter(), "-c", PROGRAM, *sys.path],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            timeout=START + len(problems) * (PATIENCE + seconds),
            env={**os.environ, IN_CHILD: "1"},
            start_new_session=True,  # Ctrl-C is the parent's
        )
    except subprocess.TimeoutExpired as error:
        raise Unchecked(f"the self-check took more than {error.timeout:g} s") from None
    except OSError as error:
        raise Unchecked(f"no process for the self-check: {error}") from None
    code, last = done.returncode, "".join(f": {line}" for line in done.stderr.strip().splitlines()[-1:])
    for line in done.stdout.splitlines():
        if not line.startswith(MARK):
            continue
        found = json.loads(line.removeprefix(MARK))
        if "reason" in found:
            return found["reason"]
        if "unchecked" in found:
            raise Unchecked(found["unchecked"])
        stage = found["stage"]
    what = f"the self-check's process ended with exit code {code}{last}"
    if stage in ("", "chain") or code in BY_OTHERS:
        raise Unchecked(what)
    return f"{what} [{stage}]"


def _interpreter() -> str:
    """This Python. A program that embeds one, or was frozen, would start itself."""
    name = os.path.basename(sys.executable or "").lower()
    if getattr(sys, "frozen", False) or not name.startswith(("python", "pypy")):
        raise Unchecked(f"no Python for the self-check: sys.executable is {sys.executable!r}")
    return sys.executable


def _plain(problem: Problem) -> dict[str, Any]:
    plain = {"call": asdict(problem.call), "device": str(problem.device), "unary": problem.unary, "seed": problem.seed}
    return plain | {"gpu": _identity(problem.device)}


def _problem(plain: dict[str, Any]) -> Problem:
    call, device = plain["call"], torch.device(plain["device"])
    if _identity(device) != plain["gpu"]:
        raise Unchecked(f"{device} is another GPU in the process of the self-check")
    return Problem(
        Call(call["dtype"], call["backward"], tuple(call["sizes"]), tuple(call["channel_first"])),
        device,
        plain["unary"],
        plain["seed"],
    )


def _identity(device: torch.device) -> str:
    """Of a GPU: a program may change CUDA_VISIBLE_DEVICES after it has started."""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", "")) if device.type == "cuda" else ""


def main() -> None:
    task = json.load(sys.stdin)

    def say(**what: str) -> None:
        print(f"\n{MARK}{json.dumps(what)}", flush=True)

    try:
        problems = [_problem(plain) for plain in task["problems"]]
        say(reason=first_fault(task["path"], problems, task["seconds"], lambda stage: say(stage=stage)))
    except Exception as error:
        text = str(error).strip().splitlines()
        say(unchecked=text[0] if text else type(error).__name__)
    os._exit(0)  # a kernel that never ends would keep the interpreter from ending
