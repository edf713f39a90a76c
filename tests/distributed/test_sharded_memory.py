"""Peak memory of a rank, against that of one process with all positions.

Counted: this rank's inputs (query, key, value, mask logits, gradient of the output) and all that forward and backward
take beyond them at their highest, results, buffers of messages and workspaces of the operators together. Measured as in
test_memory.py, as the peak of resident memory over what was resident before the call. One thread a process.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
MEGABYTE = 2**20


def measure(rank, world_size, positions, width, channels, exchange):
    """Bytes, as above. `exchange`: None for one process without any sharding."""
    import torch

    import dnl_ext
    from dnl_ext import distributed
    from dnl_ext.benchmark.memory import status_bytes

    def step(count):
        def draw(d):
            return torch.randn(1, d, count).transpose(1, 2)

        q, k, v = (draw(d).requires_grad_() for d in (width, width, channels))
        m, dy = torch.randn(1, count).requires_grad_(), draw(channels)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak becomes what is resident now
        before = status_bytes("VmRSS")
        if exchange is None:
            y = dnl_ext.disentangled_attention(q, k, v, m)
        else:
            y = distributed.disentangled_attention(q, k, v, m, exchange=exchange)
        y.backward(dy)
        assert all(x.isfinite().all() for x in (y, q.grad, k.grad, v.grad, m.grad))
        return status_bytes("VmHWM") - before + sum(x.numel() * x.element_size() for x in (q, k, v, m, dy))

    step(64)  # libraries and connections are made at first use
    return step(positions * (rank + 1) // world_size - positions * rank // world_size)


def main():
    import processes

    for world_size, *call in json.loads(sys.argv[1]):
        print(json.dumps(max(processes.run(measure, world_size, *call, timeout=3000))), flush=True)


@functools.cache
def peaks(*calls):
    """The most bytes of any rank, for each call: (world_size, positions, width, channels, exchange)."""
    paths = [ROOT, ROOT / "tests", pathlib.Path(__file__).parent, os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed goes back to the system, and is seen when taken again
    }
    script = "import test_sharded_memory\nif __name__ == '__main__': test_sharded_memory.main()"
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(calls)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def calls_of(*size):
    return (1, *size, None), (2, *size, "ring"), (4, *size, "ring")


pytestmark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak can be reset on Linux only"
)


class TestRing:
    def check(self, *size):
        one, two, four = peaks(*calls_of(*size))
        print(f"{size}: {one / MEGABYTE:.0f} MB, {two / one:.2f} of it on two ranks, {four / one:.2f} on four")
        assert two < 0.6 * one
        assert four < 0.35 * one

    @pytest.mark.slow
    def test_16384_positions_of_few_channels(self):
        self.check(16_384, 64, 128)

    @pytest.mark.slow
    def test_32768_positions(self):
        self.check(32_768, 256, 512)
