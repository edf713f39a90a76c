"""Second derivatives: errors of at most three times plain PyTorch's, differentiated twice in the same dtype; memory."""

import dataclasses

import accuracy
import cases
import pytest
import test_memory
import torch
from test_second import second
from toolchain import needs_gpu

import dnl_ext
from dnl_ext import reference


def second_case(seed):
    """A random case with a gradient that is not constant: of one that is, second derivatives are but rounding."""
    case = cases.random_case(seed, dtype=(torch.float32, torch.bfloat16, torch.float16)[seed % 3], large=0, hot=0)
    return dataclasses.replace(case, grad=("contiguous", "cat_slice", "transposed")[seed // 3 % 3])


def second_errors(case, device="cpu"):
    """By name: error of ours and of the reference, both on `device`, against the reference in float64."""
    inputs, dy = case.make()
    generator = torch.Generator().manual_seed(case.seed + 1_000_000)
    cotangents = [torch.randn(x.shape, generator=generator).to(case.dtype) for x in inputs.values()]

    def results(ops, dtype, device):
        def f(*x):
            return getattr(ops, case.op)(*x, **case.options)

        x, t = ([x.to(device, dtype) for x in tensors] for tensors in (inputs.values(), cotangents))
        return [x.cpu() for x in second(f, x, dy.to(device, dtype), t)]

    which = ((dnl_ext, case.dtype, device), (reference, case.dtype, device), (reference, torch.float64, "cpu"))
    ours, theirs, truth = (results(*x) for x in which)
    # Of rows that are one-hot to the last bit of float64 it has no gradients but for those of the size of that bit.
    unknown = torch.finfo(torch.float64).eps * max(accuracy.norm(t) for t in truth)
    return {
        name: (accuracy.distance(a, t), accuracy.distance(b, t))
        for name, a, b, t in zip(("grad_output", *inputs), ours, theirs, truth, strict=True)
        if accuracy.norm(t) > unknown or accuracy.norm(a.double()) > 10 * unknown
    }


class TestErrors:
    def check(self, case):
        for name, (ours, theirs) in second_errors(case).items():
            assert ours <= accuracy.BAR["gradient"] * theirs, f"{case}\n{name}: {ours:.3g}, reference {theirs:.3g}"

    @pytest.mark.parametrize("seed", range(15))
    def test_random_cases(self, seed):
        self.check(second_case(seed))

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", range(15, 300))
    def test_more_random_cases(self, seed):
        self.check(second_case(seed))

    @needs_gpu
    @pytest.mark.parametrize("seed", range(15))
    def test_random_cases_on_a_gpu(self, seed):
        self.check(second_case(seed), "cuda")

    @pytest.mark.parametrize("mean", [0.0, 10.0, 30.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_hot_logits(self, mean, dtype, device):
        """A scale of 1 at 40 channels: most of a row's weight is on one key."""
        self.check(cases.make_case(dtype=dtype, mean=mean, options={"scale": 1.0, "whiten": "channel"}))


#: Memory is measured in a process of its own, as in test_memory.py.
SCRIPT = """
def step(ops, q, k, v, m, dy):
    inputs = (q, k, v, m)
    y = getattr(dnl_ext, ops, dnl_ext).disentangled_attention(*inputs)
    gradients = torch.autograd.grad(y, inputs, dy.requires_grad_(), create_graph=True)
    results = torch.autograd.grad(gradients, (dy, *inputs), [torch.ones_like(x) for x in gradients])
    return (y, *gradients, *results)
"""


@test_memory.on_linux
class TestMemory:
    CALLS = (
        test_memory.call("reference", 2048, 8, 8),
        test_memory.call("fused", 2048, 8, 8),
        test_memory.call("fused", 4096, 8, 8),
    )

    def test_grows_with_positions_and_not_with_their_square(self):
        """A map is 16 MB at N = 2048 and 64 MB at 4096. Plain PyTorch holds several; here six blocks of 4 MB live."""
        reference_small, small, large = test_memory.beyond(*self.CALLS, step=SCRIPT)
        assert reference_small > 6 * 16 * test_memory.MEGABYTE
        assert small < 40 * test_memory.MEGABYTE
        assert large < 48 * test_memory.MEGABYTE

    @pytest.mark.slow
    def test_8192_positions(self):
        """One map is 256 MB here; operands and results in float32, before they are copied into theirs, are 110."""
        (fused,) = test_memory.beyond(test_memory.call("fused", 8192), step=SCRIPT)
        assert fused < 200 * test_memory.MEGABYTE
