"""Random cases of every operator against the bar of tests/accuracy.py: values, gradients, layouts, dtypes, means.

A case is its seed. To repeat one that failed: in tests/,
``python -c "import accuracy, cases; accuracy.check(cases.random_case(17))"``.
"""

import os
import pathlib
import subprocess
import sys
from math import copysign

import accuracy
import cases
import pytest
import toolchain
import torch

import dnl_ext
from dnl_ext import _C

CASES = 200
LONG_FORM, AT_ONCE = 2400, 50
POISONED = 500
PER_CAPABILITY = 40


def check_random(seed, **draw):
    accuracy.check(cases.random_case(seed, **draw))


def failures(seeds, check=check_random, **options):
    """What failed, case by case, so that one run shows all of it."""
    messages = []
    for seed in seeds:
        try:
            check(seed, **options)
        except AssertionError as error:
            messages.append(str(error))
    return messages


def report(messages):
    assert not messages, f"{len(messages)} cases failed\n" + "\n".join(messages)


class TestRandomCases:
    @pytest.mark.parametrize("seed", range(CASES))
    def test_error_is_within_the_bar(self, seed):
        accuracy.check(cases.random_case(seed))

    @pytest.mark.slow
    @pytest.mark.parametrize("first", range(CASES, CASES + LONG_FORM, AT_ONCE))
    def test_error_is_within_the_bar_long_form(self, first):
        report(failures(range(first, first + AT_ONCE), large=0.1))


class TestLargeLogits:
    """Logits of any size that the type can hold: finite where they are in float64, and within the bar."""

    @pytest.mark.parametrize("first", range(0, CASES, AT_ONCE))
    def test_error_is_within_the_bar(self, first):
        report(failures(range(first, first + AT_ONCE), hot=1, large=0))

    @pytest.mark.slow
    @pytest.mark.parametrize("first", range(CASES, CASES + LONG_FORM, AT_ONCE))
    def test_error_is_within_the_bar_long_form(self, first):
        report(failures(range(first, first + AT_ONCE), hot=1, large=0))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("scale", [1e6, -1e9, 1e12, 1e37])
    def test_one_hot_rows_have_no_gradient_of_query_and_key(self, device, scale, dtype):
        inputs = [torch.randn(1, n, 8, dtype=dtype, requires_grad=True) for n in (20, 30, 30)]
        output = dnl_ext.disentangled_attention(*inputs, scale=scale)
        query, key, value = torch.autograd.grad(output, inputs, torch.randn_like(output))
        nearest = (copysign(1, scale) * (inputs[0] - inputs[0].mean(-2)) @ inputs[1].mT).argmax(-1)
        assert torch.allclose(output, inputs[2][:, nearest[0]], rtol=0, atol=1e-5)
        assert not query.any() and not key.any() and value.isfinite().all()


class TestNonFinite:
    """NaN and infinities come out where the reference has them: the same positions in the output and all gradients."""

    @pytest.mark.parametrize("first", range(0, POISONED, AT_ONCE))
    def test_positions_are_the_references(self, first):
        report(failures(range(first, first + AT_ONCE), accuracy.check_poisoned))

    @pytest.mark.slow
    @pytest.mark.parametrize("first", range(POISONED, 10 * POISONED, 500))
    def test_positions_are_the_references_long_form(self, first):
        report(failures(range(first, first + 500), accuracy.check_poisoned))


@toolchain.needs_kernels
class TestCpuCapabilities:
    """Every instruction set this CPU has: the choice is made once per process, so each runs in its own."""

    @pytest.mark.parametrize("name", [name for name, supported in _C.cpu_capabilities() if supported])
    def test_each_passes(self, name):
        here = pathlib.Path(__file__).parent
        paths = [str(path) for path in (here, here.parent, here.parents[1])]
        code = (
            "import torch, test_random; from dnl_ext import _C\n"
            "torch.set_num_threads(1)\n"
            f"assert _C.cpu_capability() == {name!r}, _C.cpu_capability()\n"
            f"messages = test_random.failures(range(10_000, {10_000 + PER_CAPABILITY}), large=0)\n"
            f"messages += test_random.failures(range({PER_CAPABILITY}), hot=1, large=0)\n"
            "messages += test_random.failures(range(200), test_random.accuracy.check_poisoned)\n"
            "test_random.report(messages)\n"
        )
        environment = {
            **os.environ,
            "DNL_EXT_CPU_CAPABILITY": name,
            "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
        }
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def test_an_unknown_name_is_refused(self):
        code = "import torch, dnl_ext; dnl_ext.unary_softmax(torch.zeros(3))"
        environment = {
            **os.environ,
            "DNL_EXT_CPU_CAPABILITY": "avx9000",
            "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        }
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 1
        assert "ValueError: DNL_EXT_CPU_CAPABILITY: avx9000 is not built" in done.stderr
