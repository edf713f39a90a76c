"""Peak memory of one call beyond its inputs, outputs and gradients.

On the CPU a process of its own runs the call once and asks the kernel for its highest resident set (VmHWM); on CUDA the
allocator keeps the peak.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import torch
from typing_extensions import Self

from .case import Case, Inputs, make_inputs
from .methods import METHODS, Attention

#: Positions of the small call that runs first, so that libraries, pools and compilers are in memory already.
WARM_UP_POSITIONS = 64
#: A process that gives freed memory back at once, so that its resident set is what is in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


def available_bytes() -> int | None:
    """Memory that a new allocation can have on this machine or in this control group, or None where nobody knows."""
    found = []
    try:
        with open("/proc/meminfo") as lines:
            found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as current:
            found.append(int(limit.read()) - int(current.read()))
    except (OSError, ValueError):  # another system, no control group, or its limit is "max"
        pass
    return min(found, default=None)


def status_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    with open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def call(
    case: Case, function: Attention, inputs: Inputs, grad_output: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """One call as it is timed: (output,) or (output, gradients...). `grad_output` may be made by the first call."""
    if not case.training:
        with torch.no_grad():
            return (function(*inputs),)
    output = function(*inputs)
    if grad_output is None:
        grad_output = torch.ones_like(output)
    return (output, *torch.autograd.grad(output, inputs.leaves, grad_output))


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(x.untyped_storage().nbytes() for x in tensors)


def peak_cuda(case: Case, function: Attention, inputs: Inputs, grad_output: torch.Tensor | None) -> int:
    """Bytes beyond inputs, outputs and gradients at the peak of one call on the GPU."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call(case, function, inputs, grad_output)
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before - storage_bytes(results))


class CpuPeaks:
    """A process that measures one call after the other on the CPU, each in a fork of its own. Use as a context."""

    def __enter__(self) -> Self:
        program = f"from {__name__} import serve; serve({torch.get_num_threads()})"
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]  # the same dnl_ext as here
        environment = os.environ | MALLOC | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self.process: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, "-c", program], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.requests: IO[str] = self.process.stdin
        self.answers: IO[str] = self.process.stdout
        return self

    def __exit__(self, *_: object) -> None:
        self.requests.close()
        self.answers.close()
        self.process.wait()

    def peak(self, case: Case, method: str) -> int:
        """Bytes beyond inputs, outputs and gradients at the peak of one call. Raises RuntimeError with the reason."""
        print(json.dumps({"case": asdict(case), "method": method}), file=self.requests, flush=True)
        answer = json.loads(self.answers.readline() or '{"error": "the measuring process died"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["bytes"]


def _measure(case: Case, function: Attention) -> int:
    """Bytes beyond inputs, outputs and gradients at the peak of one call in this process."""
    small = replace(case, queries=min(case.queries, WARM_UP_POSITIONS), keys=min(case.keys, WARM_UP_POSITIONS))
    call(small, function, make_inputs(small))
    inputs = make_inputs(case)
    grad_output = None
    if case.training:  # channel-first, as the next layer would send it
        shape = (case.batch, case.heads, case.channels, case.queries)
        grad_output = torch.ones(shape, dtype=case.torch_dtype).transpose(-1, -2)
    try:
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")  # VmHWM begins anew
    except OSError:
        pass
    before = status_bytes("VmRSS")
    results = call(case, function, inputs, grad_output)
    return max(0, status_bytes("VmHWM") - before - storage_bytes(results))


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """{"bytes": ...} or {"error": ...}, measured in a fork: this process itself never computes."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            case = Case(**request["case"])
            function = METHODS[request["method"]].functions(case)[0]
            answer: dict[str, Any] = {"bytes": _measure(case, function)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    return json.loads(text) if text else {"error": f"the measured process ended with status {status}"}


def serve(threads: int) -> None:
    """Answer one JSON request a line until standard input ends."""
    torch.set_num_threads(threads)
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)
