"""No buffer grows with Nq * Nk: the peak of resident memory, measured in a process of its own.

Linux keeps the peak (VmHWM) and lets a process reset it (/proc/self/clear_refs); elsewhere these tests are skipped.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest

MEGABYTE = 2**20

SCRIPT = """
import json
import sys
import torch
import dnl_ext


def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024


def channel_first(positions, channels, dtype):
    return torch.randn(1, channels, positions).to(dtype).transpose(1, 2)


def measure(ops, positions, width, channels, dtype, threads):
    torch.set_num_threads(threads)
    dtype = getattr(torch, dtype)
    q, k, v = (channel_first(positions, c, dtype).requires_grad_() for c in (width, width, channels))
    m = torch.randn(1, positions).to(dtype).requires_grad_()
    dy = channel_first(positions, channels, dtype)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak becomes what is resident now
    before = status("VmRSS")
    results = step(ops, q, k, v, m, dy)
    assert all(x.isfinite().all() for x in results)
    return status("VmHWM") - before - sum(x.numel() * x.element_size() for x in results)


calls = json.loads(sys.argv[1])
for ops, _, width, channels, dtype, threads in calls:
    measure(ops, 64, width, channels, dtype, threads)  # libraries and threads are loaded at first use
print(json.dumps([measure(*call) for call in calls]))
"""


#: What is measured: a function of the name of `ops`, inputs and gradient that returns all results.
STEP = """
def step(ops, q, k, v, m, dy):
    y = getattr(dnl_ext, ops, dnl_ext).disentangled_attention(q, k, v, m)
    y.backward(dy)
    return y, q.grad, k.grad, v.grad, m.grad
"""


def call(ops, positions, width=256, channels=512, dtype="float32", threads=2):
    return ops, positions, width, channels, dtype, threads


@functools.cache
def beyond(*calls, step=STEP):
    """Bytes that `step` of each call needs beyond its inputs and results."""
    root = pathlib.Path(__file__).parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
        "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed goes back to the system, and is seen when taken again
    }
    done = subprocess.run(
        [sys.executable, "-c", step + SCRIPT, json.dumps(calls)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


on_linux = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak can be reset on Linux only"
)


@on_linux
class TestPeak:
    MEASURED = (
        call("reference", 2048, 8, 8),
        call("fused", 2048, 8, 8),
        call("fused", 8192, 8, 8),
        call("fused", 8192, dtype="bfloat16"),
        call("fused", 16_384),
    )

    def test_the_measurement_sees_a_map(self):
        """The reference holds several maps of 16 MB each at N = 2048; the fused operator not half of one."""
        reference, fused, *_ = beyond(*self.MEASURED)
        assert reference > 2 * 16 * MEGABYTE
        assert fused < 8 * MEGABYTE

    def test_grows_with_positions_and_not_with_their_square(self):
        """From 2048 to 8192 positions of 8 channels: 4 times what is linear, and no more."""
        _, small, large, *_ = beyond(*self.MEASURED)
        assert large < max(6 * small, 16 * MEGABYTE)

    def test_8192_positions_of_16_bit(self):
        assert beyond(*self.MEASURED)[3] < 100 * MEGABYTE

    def test_16384_positions(self):
        """One map is 1.07 GB here, and the reference needs several."""
        assert beyond(*self.MEASURED)[4] < 200 * MEGABYTE

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_32768_positions(self, dtype):
        """A 1024 x 2048 photograph at stride 8; one map is 4.3 GB."""
        assert beyond(call("fused", 32_768, dtype=dtype))[0] < 200 * MEGABYTE

    @pytest.mark.slow
    def test_more_threads_need_no_copy_of_dq_each(self):
        """dq of this call takes 16 MB in float32; eight threads with one each would need 128."""
        one, eight = (beyond(call("fused", 16_384, 256, 16, threads=threads))[0] for threads in (1, 8))
        assert eight - one < 64 * MEGABYTE
