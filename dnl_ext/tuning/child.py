"""The self-check in a process of its own.

An illegal access ends a CUDA context, and whatever the process has on the GPU with it; a kernel that never ends keeps
all that wait for the device. Both are then the child's. It reads a task from its input, names each stage on its output
before it begins, and ends with a line that holds the result.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from .._tuned import Call
from .trial import PATIENCE, Problem, Unchecked, first_fault

#: What runs the child.
COMMAND = (sys.executable, "-c", "from dnl_ext.tuning.child import main; main()")
#: Seconds in which the child imports torch, wakes the GPU up and ends.
START = 120.0


def first_fault_of_child(path: str, problems: Sequence[Problem], patience: float | None = None) -> str:
    """:func:`first_fault` of the same arguments, found by another process on the same GPU.

    Raises:
        Unchecked: nothing was found out: there is no such process, or not even the chain ran in it.
    """
    seconds = PATIENCE if patience is None else patience
    task = {"path": path, "seconds": seconds, "problems": [_plain(problem) for problem in problems]}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "DNL_EXT_TUNE": "0"}
    stages: list[str] = []
    try:
        done = subprocess.run(
            COMMAND,
            input=json.dumps(task),
            capture_output=True,
            text=True,
            timeout=START + 2 * seconds,
            env=environment,
        )
        output, ending = done.stdout, f"with exit code {done.returncode}"
        last = done.stderr.strip().splitlines()[-1:]
    except subprocess.TimeoutExpired as error:
        output, ending = _text(error.stdout), f"by the check, after {START + 2 * seconds:g} s"
        last = []
    except OSError as error:
        raise Unchecked(f"no process for the self-check: {error}") from None
    for line in output.splitlines():
        found = _parsed(line)
        if "reason" in found:
            return str(found["reason"])
        if "unchecked" in found:
            raise Unchecked(str(found["unchecked"]))
        stages += [found["stage"]] if "stage" in found else []
    what = f"its process was ended {ending}" + "".join(f": {line}" for line in last)
    if stages and stages[-1] != "chain":
        return f"{what} [{stages[-1]}]"
    raise Unchecked(what)


def _plain(problem: Problem) -> dict[str, Any]:
    return {"call": asdict(problem.call), "device": str(problem.device), "unary": problem.unary, "seed": problem.seed}


def _problem(plain: dict[str, Any]) -> Problem:
    call = plain["call"]
    return Problem(
        Call(call["dtype"], call["backward"], tuple(call["sizes"]), tuple(call["channel_first"])),
        torch.device(plain["device"]),
        plain["unary"],
        plain["seed"],
    )


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _parsed(line: str) -> dict[str, Any]:
    """A line of the child; other libraries may print too."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def main() -> None:
    task = json.load(sys.stdin)

    def say(**what: str) -> None:
        print(json.dumps(what), flush=True)

    try:
        problems = [_problem(plain) for plain in task["problems"]]
        say(reason=first_fault(task["path"], problems, task["seconds"], lambda stage: say(stage=stage)))
    except Exception as error:
        text = str(error).strip().splitlines()
        say(unchecked=text[0] if text else type(error).__name__)
    os._exit(0)  # a kernel that never ends would keep the interpreter from ending
