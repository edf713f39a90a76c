"""Peak memory and time of one training step, each measured in a process of its own.

A fresh process, because a high-water mark never falls and freed memory stays with the allocator. Counted is the peak
above what the process held before the step: activations, maps, gradients and workspaces, not weights, optimizer state
or libraries. A small step goes first, so that nothing is counted that every process pays once.
"""

import dataclasses
import gc
import json
import subprocess
import sys
import time
from typing import Any

import torch

from ..training.config import TrainConfig

#: Crop of the small step that goes first, in pixels.
FIRST = (64, 128)
#: The process that measures. This file is no program itself: its package has imported it when it would start.
PROGRAM = "from dnl_ext.segmentation.experiments import memory; memory.main()"


def measure_step(config: TrainConfig, timeout: float = 600) -> dict[str, Any]:
    """Run one training step of ``config`` on the built-in data in a new process.

    Args:
        config: a :class:`~dnl_ext.segmentation.training.TrainConfig`; its crop and batch size are those of the step.
        timeout: seconds after which the process is given up.

    Returns:
        dict with ``peak_bytes`` (int), ``seconds`` (of a second step of the same shapes) and ``method``; or with
        ``error`` (one line) alone where the step did not run, such as for lack of memory.

    Example:
        >>> from dnl_ext.segmentation.experiments import measure_step
        >>> from dnl_ext.segmentation.training import TrainConfig
        >>> step = measure_step(TrainConfig(crop=(64, 128), batch_size=1, width=4))
        >>> step["peak_bytes"] >= 0 and step["seconds"] > 0
        True
    """
    command = [sys.executable, "-c", PROGRAM, json.dumps(dataclasses.asdict(config))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"not finished after {timeout} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        killed = f"ended by signal {-done.returncode}, as when memory runs out"
        return {"error": killed if done.returncode < 0 else lines[-1] if lines else f"exit code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


class HostPeak:
    """Peak resident memory between construction and :meth:`read`, above the resident memory at construction."""

    def __init__(self) -> None:
        gc.collect()
        self.method: str
        self.before: int
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # sets VmHWM back to VmRSS
            self.method, self.before = "VmHWM", status_bytes("VmRSS")
        except OSError:
            self.method, self.before = "ru_maxrss", largest_resident()

    def read(self) -> int:
        """The peak in bytes."""
        after = status_bytes("VmHWM") if self.method == "VmHWM" else largest_resident()
        return max(0, after - self.before)


def status_bytes(key: str) -> int:
    """A memory figure of this process from /proc/self/status, in bytes. Raises OSError where there is none."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def largest_resident() -> int:
    """The largest resident size so far, in bytes."""
    import resource  # Windows has none, where the rest of this package runs

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class DevicePeak:
    """The same for memory that PyTorch's CUDA allocator has handed out."""

    method = "torch.cuda.max_memory_allocated"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        self.before: int = torch.cuda.memory_allocated(device)

    def read(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self.before


def measure_here(config: TrainConfig) -> dict[str, Any]:
    """What :func:`measure_step` returns, in this process."""
    from ..training.trainer import Trainer

    trainer = Trainer(config)
    images, labels = trainer.batch(0)
    small = (..., slice(FIRST[0]), slice(FIRST[1]))
    trainer.train_step(images[small].contiguous(), labels[small].contiguous())
    peak = DevicePeak(trainer.device) if trainer.device.type == "cuda" else HostPeak()
    trainer.train_step(images, labels)
    peak_bytes = peak.read()
    start = time.perf_counter()
    trainer.train_step(images, labels)
    return {"peak_bytes": peak_bytes, "seconds": time.perf_counter() - start, "method": peak.method}


def main() -> None:
    """Print what :func:`measure_here` returns for the settings in the first argument, both as JSON."""
    print(json.dumps(measure_here(TrainConfig(**json.loads(sys.argv[1])))))
