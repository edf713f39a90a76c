"""The analysis of a large map costs less than 500 MB and less than three forwards of the block's attention."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = """
import json
import sys
import time
import torch
import dnl_ext
from dnl_ext import analysis

SHAPE, CHANNELS = (128, 256), 256
torch.set_num_threads(2)


def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024


def channel_first():
    return torch.randn(1, CHANNELS, SHAPE[0] * SHAPE[1]).transpose(1, 2)


def measure(arguments, labels, whiten):
    terms = analysis.attention_terms(*(None if x is None else x[0] for x in arguments), whiten=whiten)
    value = arguments[2][0]
    return analysis.measure_terms(terms, labels=(labels, labels), inputs=value, outputs=value)


query, key, value = (channel_first() for _ in range(3))
mask, labels = torch.randn(1, SHAPE[0] * SHAPE[1]), torch.randint(0, 19, SHAPE)
results = {}
for joint, unary, whiten in (("sum", mask, "channel"), ("product", None, None)):
    arguments = (query, key, value, unary)
    measure([None if x is None else x[:, :64] for x in arguments], labels[:1, :64], whiten)  # warm up
    dnl_ext.disentangled_attention(*(None if x is None else x[:, :64] for x in arguments), whiten=whiten)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak becomes what is resident now
    before, start = status("VmRSS"), time.perf_counter()
    statistics = measure(arguments, labels, whiten)
    analysed = time.perf_counter()
    peak = status("VmHWM") - before
    if sys.argv[1] == "time":
        dnl_ext.disentangled_attention(*arguments, whiten=whiten)
    forward = time.perf_counter() - analysed
    assert statistics.joint == joint and statistics.queries == 32768
    results[joint] = {"peak": peak, "seconds": analysed - start, "forward": forward}
print(json.dumps(results))
"""


@functools.cache
def cost(what):
    """Figures of both joints, "memory" or "time": in processes of their own, since seeing every peak costs time."""
    root = pathlib.Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    if what == "memory":
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back, and is seen when taken again
    done = subprocess.run([sys.executable, "-c", SCRIPT, what], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads(done.stdout)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak can be reset on Linux only"),
]


@pytest.mark.parametrize("joint", ["sum", "product"])
class TestAt32768Positions:
    def test_memory(self, joint):
        """One N x N map is 4.3 GB here."""
        assert cost("memory")[joint]["peak"] < 500 * 2**20

    def test_time(self, joint):
        assert cost("time")[joint]["seconds"] < 3 * cost("time")[joint]["forward"]
