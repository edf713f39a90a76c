"""See dnl_ext.whiten: every name of the paper's code, alone, before the pairwise term, and in the blocks."""

import dataclasses
import itertools
import math
import os
import subprocess
import sys

import accuracy
import cases
import formulas
import pytest
import toolchain
import torch
from blocks import (
    BLOCKS,
    CHANNELS_LAST,
    assert_loads_both_ways,
    assert_same,
    backends,
    dimensions,
    make_input,
    scramble,
)
from transcriptions import OfficialBlock, whitened

import dnl_ext
from dnl_ext import reference

NAMES = [name for name in reference.WHITEN_NAMES if name is not None]
DEVIATION = ("in", "ln", "fln")
names = pytest.mark.parametrize("name", NAMES)
deviations = pytest.mark.parametrize("name", DEVIATION)
on_every_device = pytest.mark.usefixtures("device")
dtypes = pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)


def one_group(x, name, index):
    """The elements of x (..., N, C) that share statistics with the one at `index`: a mask."""
    mask = torch.zeros(x.shape, dtype=torch.bool)
    where = list(index)
    for axis in formulas.WHITEN_AXES[name] or range(-x.dim(), 0):
        where[axis] = slice(None)
    mask[tuple(where)] = True
    return mask


class TestNames:
    @toolchain.needs_kernels
    def test_csrc_has_the_same_list(self):
        assert dnl_ext._C.whiten_names() == NAMES

    @names
    def test_formula(self, name):
        """Against the transcription, which is written for (B, C, N)."""
        x = torch.randn(3, 5, 7, dtype=torch.float64) + 2
        for function in (dnl_ext.whiten, reference.whiten):
            torch.testing.assert_close(function(x.mT, name).mT, whitened(x, name), rtol=1e-12, atol=1e-12)

    def test_none_is_the_input_itself(self):
        x = torch.randn(2, 3, 4)
        assert dnl_ext.whiten(x, None) is x and reference.whiten(x, None) is x

    def test_channel_is_mean_subtract(self):
        x = torch.randn(2, 30, 4)
        for name in ("channel", "in_nostd"):
            torch.testing.assert_close(dnl_ext.whiten(x, name), dnl_ext.mean_subtract(x))
        torch.testing.assert_close(dnl_ext.whiten(x, "spatial"), dnl_ext.mean_subtract(x, -1))

    def test_eps(self):
        x = torch.randn(2, 9, 4, dtype=torch.float64)
        y, expected = dnl_ext.whiten(x, "in", eps=0.5), reference.whiten(x, "in", eps=0.5)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        assert (y - dnl_ext.whiten(x, "in")).abs().max() > 0.1


@on_every_device
class TestValues:
    @dtypes
    @names
    @pytest.mark.parametrize("mean", [0.0, 30.0])
    def test_error_is_within_the_bar(self, dtype, name, mean):
        sizes = [((2, 2), 131, 67), ((3,), 64, 65), ((), 300, 3), ((2,), 5, 130)]
        grads = itertools.cycle(cases.GRADIENTS)  # 20 cases and 6 gradients: each meets several sizes and layouts
        for (lead, nq, dqk), layout in itertools.product(sizes, cases.LAYOUTS):
            accuracy.check(
                cases.make_case(
                    "whiten", lead=lead, nq=nq, dqk=dqk, dtype=dtype, layout=layout, mean=mean, grad=next(grads),
                    options={"name": name},
                )
            )  # fmt: skip

    @deviations
    @pytest.mark.parametrize("channel_first", [False, True])
    def test_a_large_mean_leaves_the_variance(self, name, channel_first):
        """At 2^20 deviations a sum of squares has no digit of the variance left, in float32 or as E[x^2] - E[x]^2."""
        x = torch.randn(2, 400, 16, generator=torch.Generator().manual_seed(0)) + 2**20
        x = x.mT.contiguous().mT if channel_first else x
        expected = reference.whiten(x.double(), name)
        assert (dnl_ext.whiten(x, name) - expected).abs().max() < 0.1  # the mean itself has a step of 1/16

    @pytest.mark.parametrize("name", ["ln", "fln", "ln_nostd", "fln_nostd"])
    def test_float16_sums_do_not_overflow(self, name):
        x = torch.full((2, 1000, 2), 60000.0, dtype=torch.float16)
        assert dnl_ext.whiten(x, name).abs().max() == 0


class TestRandom:
    """On the CPU; tests/kernels/test_cuda.py has the emulated ones."""

    @pytest.mark.parametrize("first", range(0, 240, 60))
    def test_random_cases(self, first):
        for seed in range(first, first + 60):
            accuracy.check(cases.random_case(seed, op="whiten"))

    @dtypes
    @names
    def test_before_the_pairwise_term(self, dtype, name):
        for seed, op in itertools.product(range(4), ("disentangled_attention", "pairwise_softmax")):
            case = cases.random_case(1000 + seed, op=op, dtype=dtype, large=0)
            accuracy.check(dataclasses.replace(case, options={**case.options, "whiten": name}))


@toolchain.needs_kernels
def test_every_instruction_set():
    """The kernels of each table that this CPU has agree, on every order of memory."""
    script = (
        "import torch, dnl_ext\n"
        "x = torch.arange(2 * 37 * 19.0).reshape(2, 37, 19).sin().requires_grad_()\n"
        f"for name in {NAMES}:\n"
        "    for y in (x, x.mT.contiguous().mT, x.repeat_interleave(2, 2)[..., ::2]):\n"
        "        z = dnl_ext.whiten(y, name); g, = torch.autograd.grad((z * z.detach().cos()).sum(), x)\n"
        "        print(z.double().square().sum().item(), z.double()[0, 3, 5].item(), g.double()[1, 30, 18].item())\n"
    )
    printed = []
    for capability in [capability for capability, supported in dnl_ext._C.cpu_capabilities() if supported]:
        environment = {**os.environ, "DNL_EXT_CPU_CAPABILITY": capability}
        command = [sys.executable, "-c", script]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        printed.append(torch.tensor([float(word) for word in result.stdout.split()], dtype=torch.float64))
    assert len(printed[0]) == 9 * len(NAMES)
    for other in printed[1:]:
        torch.testing.assert_close(other, printed[0], rtol=1e-5, atol=1e-5)


class TestDifferentiation:
    @names
    @pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
    def test_gradcheck(self, name, lead):
        x = torch.randn(*lead, 5, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: dnl_ext.whiten(x, name), x, check_batched_grad=True)
        channel_first = torch.randn(*lead, 4, 5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: dnl_ext.whiten(x.mT, name), channel_first)

    @names
    @pytest.mark.parametrize("in_dim", [0, 1, 2])
    def test_vmap_keeps_samples_apart(self, name, in_dim):
        x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
        mapped = torch.func.vmap(lambda x: dnl_ext.whiten(x, name), in_dims=in_dim)(x)
        expected = torch.stack([reference.whiten(part, name) for part in x.unbind(in_dim)])
        torch.testing.assert_close(mapped, expected, rtol=1e-12, atol=1e-12)
        twice = torch.func.vmap(torch.func.vmap(lambda x: dnl_ext.whiten(x, name)))(x)
        expected = torch.stack([torch.stack([reference.whiten(y, name) for y in part]) for part in x])
        torch.testing.assert_close(twice, expected, rtol=1e-12, atol=1e-12)

    @names
    def test_compiles(self, name):
        def loss(x):
            return dnl_ext.whiten(x, name).square().mul(torch.arange(4.0, dtype=x.dtype)).sum()

        x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
        torch.compiler.reset()  # torch keeps no more than 8 compilations of a function
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        expected = torch.autograd.grad(loss(x), x)
        torch.testing.assert_close(torch.autograd.grad(compiled(x), x), expected)
        torch.library.opcheck(torch.ops.dnl_ext.whiten_forward, (x.detach(), name, 0, 1e-5))


@on_every_device
class TestLayout:
    @names
    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
    def test_output_and_gradient_have_the_order_of_the_input(self, name, order):
        x = torch.randn([[2, 3, 4][i] for i in order]).permute([order.index(i) for i in range(3)]).requires_grad_()
        y = dnl_ext.whiten(x, name)
        assert y.stride() == x.stride()
        (dx,) = torch.autograd.grad(y, x, torch.randn(2, 3, 4))
        assert dx.stride() == x.stride()

    @toolchain.needs_kernels  # torch's own sums and products promise no such thing
    @dtypes
    @names
    def test_neither_repeats_nor_threads_matter(self, dtype, name):
        x = torch.randn(3, 301, 77).to(dtype).requires_grad_()
        dy = torch.randn(3, 301, 77).to(dtype)
        results = []
        try:
            for threads in (1, 1, 2, 3):
                torch.set_num_threads(threads)
                y = dnl_ext.whiten(x, name)
                results.append((y.detach(), *torch.autograd.grad(y, x, dy)))
        finally:
            torch.set_num_threads(1)
        assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@on_every_device
class TestEdges:
    @names
    @dtypes
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_not_finite_stays_in_its_group(self, name, dtype, value):
        x = torch.randn(2, 20, 9).to(dtype)
        index = (1, 13, 4)
        x[index] = value
        finite = dnl_ext.whiten(x, name).isfinite()
        assert torch.equal(finite, ~one_group(x, name, index))
        assert torch.equal(finite, reference.whiten(x, name).isfinite())

    @names
    @pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 5, 0), (0, 4)])
    def test_empty(self, name, shape):
        x = torch.randn(shape, requires_grad=True)
        y = dnl_ext.whiten(x, name)
        y.sum().backward()
        assert y.shape == x.grad.shape == shape

    @deviations
    def test_one_element_has_no_variance(self, name):
        assert dnl_ext.whiten(torch.randn(1, 1), name).isnan().all()

    def test_constant_input_is_zero_with_a_deviation(self):
        x = torch.full((2, 7, 4), 3.0)
        assert all(dnl_ext.whiten(x, name).abs().max() == 0 for name in NAMES)

    @pytest.mark.parametrize("function", [dnl_ext.whiten, reference.whiten])
    def test_unknown_names_list_the_valid_ones(self, function):
        with pytest.raises(ValueError, match=r"^name: expected one of 'channel', .*'fln', None, got 'nln'$"):
            function(torch.randn(2, 3, 4), "nln")
        with pytest.raises(TypeError, match=r"^name: expected a string or None, got int"):
            function(torch.randn(2, 3, 4), 1)

    def test_wrong_calls(self):
        x = torch.randn(2, 3, 4)
        with pytest.raises(ValueError, match=r"^x: expected shape \(..., N, C\), got \(4,\)"):
            dnl_ext.whiten(x[0, 0], "ln")
        with pytest.raises(ValueError, match=r"^eps: expected a number of at least 0, got -1"):
            dnl_ext.whiten(x, "ln", eps=-1)
        with pytest.raises(TypeError, match=r"^eps: expected a float"):
            dnl_ext.whiten(x, "ln", eps="small")
        raw = torch.ops.dnl_ext
        with pytest.raises(ValueError, match=r"^name: expected one of 'channel', .*, got 'bn'$"):
            raw.whiten_forward(x, "bn", 0, 1e-5)
        with pytest.raises(ValueError, match=r"^apart: expected a value from 0 to 1, got 2"):
            raw.whiten_forward(x, "ln", 2, 1e-5)
        y, rstd = raw.whiten_forward(x, "ln", 0, 1e-5)
        with pytest.raises(ValueError, match=r"^rstd: expected shape \(2,\), got \(2, 4\)"):
            raw.whiten_backward(x, y, torch.zeros(2, 4), "ln", 0, 1e-5)
        with pytest.raises(ValueError, match=r"^output: expected shape \(2, 3, 4\), got \(2, 3, 3\)"):
            raw.whiten_backward(x, y[..., 1:], rstd, "ln", 0, 1e-5)


class TestBlocks:
    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("name", [*NAMES, "bn", "bn_affine", None])
    @dimensions
    @backends
    def test_equals_original(self, backend, dims, name, channels_last):
        original = OfficialBlock(8, 4, True, True, True, name, 0.3, dims=dims).double()
        ours = BLOCKS[dims].official(8, 4, 0.3, True, True, True, name, backend=backend).double()
        scramble(original)
        assert_loads_both_ways(ours, original)
        memory_format = CHANNELS_LAST.get(dims) if channels_last else None
        x = make_input(dims, memory_format=memory_format)
        assert_same(ours, original, x)
        assert_same(ours.eval(), original.eval(), x)

    @pytest.mark.parametrize("name", [*NAMES, "bn", "bn_affine"])
    def test_empty_batch(self, name):
        block, x = BLOCKS[2].mmseg(8, whiten=name), make_input(2, batch=0, dtype=torch.float32)
        block(x).sum().backward()
        assert x.grad.shape == x.shape

    def test_keys_of_batch_norms(self):
        keys = set(BLOCKS[2].official(8, whiten_type=["bn"]).state_dict())
        assert {"key_bn.running_mean", "query_bn.running_var"} <= keys and "key_bn.weight" not in keys
        keys = set(BLOCKS[2].official(8, whiten_type=["bn_affine"]).state_dict())
        assert {"key_bn_affine.weight", "query_bn_affine.bias"} <= keys
