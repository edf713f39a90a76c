"""Attention over parts of the keys, merged: what sharding is made of, in a group of one process, by every route.

A group of one with small blocks takes every step but the messages: means, partial softmaxes, their merge, the backward
of parts with the statistics of whole rows.
"""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from accuracy import check
from cases import DTYPES, make_case, random_case
from torch._subclasses.fake_tensor import FakeTensorMode

import dnl_ext
from dnl_ext import distributed

raw = torch.ops.dnl_ext


@pytest.fixture(autouse=True, scope="module")
def group_of_one(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def in_blocks(block, exchange="ring"):
    def function(*inputs, **options):
        return distributed.disentangled_attention(*inputs, **options, block=block, exchange=exchange)

    return function


def small_case(seed, dtype, whiten):
    """A random case whose whitening can be sharded."""
    case = random_case(seed, "disentangled_attention", dtype, large=0)
    return dataclasses.replace(case, options={**case.options, "whiten": whiten})


def check_more(dtype, seed):
    check(small_case(seed, dtype, ("channel", None)[seed % 2]), in_blocks(block=5 + seed % 50))


class TestAccuracy:
    """The bar of the project, accuracy.py: 2 and 3 times the error of plain PyTorch in the same dtype."""

    @pytest.mark.parametrize("whiten", ["channel", None])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_random_cases(self, dtype, whiten):
        for seed in range(4):
            check(small_case(seed, dtype, whiten), in_blocks(block=20 + 17 * seed))

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_more_random_cases(self, dtype):
        for seed in range(100, 300):
            check_more(dtype, seed)

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_random_cases_by_every_route(self, device, dtype):
        for seed in range(50, 54):
            check(small_case(seed, dtype, ("channel", None)[seed % 2]), in_blocks(block=10 + seed))

    @pytest.mark.parametrize("mean", [0.0, 10.0, 30.0])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_hot_logits_and_large_means(self, device, dtype, mean):
        case = make_case(nq=70, nk=90, dtype=dtype, mean=mean, options={"scale": 1.25})
        check(case, in_blocks(block=23))

    @pytest.mark.parametrize("mean", [0.0, 30.0])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_fused_path(self, emulated, monkeypatch, dtype, mean):
        monkeypatch.setenv("DNL_EXT_CUDA_PATH", "fused")
        case = make_case(nq=70, nk=90, dtype=dtype, mean=mean, options={"scale": 1.25})
        check(case, in_blocks(block=40))


class TestMerge:
    def test_a_block_of_everything_is_the_operator(self):
        """One part of whole rows differs in centring alone."""
        q, k, v = (torch.randn(2, n, d, dtype=torch.float64) for n, d in ((9, 4), (11, 4), (11, 6)))
        y, stats, _ = raw.pairwise_part_forward(q, k, v, 0.5, True)
        torch.testing.assert_close(y, dnl_ext.pairwise_attention(q, k, v, scale=0.5, whiten=None))
        lse = 0.5 * stats[..., 0] - stats[..., 1].log()
        torch.testing.assert_close(lse, (0.5 * q @ k.transpose(1, 2)).logsumexp(-1))

    def test_rows_that_some_parts_have_nothing_for(self):
        """Keys of -inf logits: a part without any probability adds nothing."""
        q = torch.ones(1, 3, 2, dtype=torch.float64)
        k, v = torch.randn(1, 6, 2, dtype=torch.float64), torch.randn(1, 6, 2, dtype=torch.float64)
        k[:, 2:4] = -torch.inf
        expected = dnl_ext.reference.pairwise_attention(q, k, v, whiten=None)
        assert expected.isfinite().all()
        torch.testing.assert_close(in_blocks(2)(q, k, v, whiten=None), expected)

    @pytest.mark.parametrize("where", ["query", "key", "value", "mask_logits"])
    def test_nan_reaches_what_it_reaches_in_the_reference(self, where):
        inputs, _ = make_case(nq=8, nk=9, dqk=3, dv=2, dtype=torch.float64).make()
        inputs[where][0, 4] = torch.nan
        for whiten in ("channel", None):
            ours = in_blocks(3)(*inputs.values(), whiten=whiten)
            expected = dnl_ext.reference.disentangled_attention(*inputs.values(), whiten=whiten)
            assert torch.equal(ours.isnan(), expected.isnan())

    def test_gradcheck(self):
        inputs, _ = make_case(nq=5, nk=7, dqk=3, dv=2, dtype=torch.float64).make()
        for exchange in ("ring", "gather"):
            leaves = [x.clone().requires_grad_() for x in inputs.values()]
            assert torch.autograd.gradcheck(in_blocks(2, exchange), leaves)

    def test_only_the_gradients_that_are_wanted(self):
        inputs, grad = make_case(nq=5, nk=7, dqk=3, dv=2, dtype=torch.float64).make()
        full = [x.clone().requires_grad_() for x in inputs.values()]
        in_blocks(3)(*full).backward(grad)
        for needs in range(1, 16):
            leaves = [x.clone().requires_grad_(bool(needs >> i & 1)) for i, x in enumerate(inputs.values())]
            in_blocks(3)(*leaves).backward(grad)
            for x, y in zip(leaves, full, strict=True):
                assert x.grad is None if not x.requires_grad else torch.allclose(x.grad, y.grad, rtol=1e-12, atol=1e-14)

    def test_second_derivatives_raise(self):
        q = torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(in_blocks(2)(q, q, q).sin().sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            grad.sum().backward()


class TestOperators:
    def inputs(self, dtype=torch.float32):
        shapes = {"dy": (2, 5, 4), "q": (2, 5, 3), "k": (2, 7, 3), "v": (2, 7, 4)}
        return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_fake(self, dtype):
        dy, q, k, v = self.inputs(dtype).values()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        real = raw.pairwise_part_forward(q, k, v, 0.5, True)
        backward = (real[1], torch.zeros(2, 5, dtype=wide), 0.5, True, False, True)
        real += raw.pairwise_part_backward(dy, q, k, v, *backward)
        with FakeTensorMode() as mode:
            dy, q, k, v = (mode.from_tensor(x) for x in (dy, q, k, v))
            backward = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in backward]
            fake = raw.pairwise_part_forward(q, k, v, 0.5, True) + raw.pairwise_part_backward(dy, q, k, v, *backward)
        for x, y in zip(real, fake, strict=True):
            assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)

    @pytest.mark.parametrize(
        ("argument", "replace", "message"),
        [
            (4, torch.zeros(2, 5, 3), "softmax_stats: expected shape"),
            (4, torch.zeros(2, 5, 2, dtype=torch.float64), "softmax_stats: expected"),
            (5, torch.zeros(2, 4), "delta: expected shape"),
            (5, torch.zeros(2, 5).double(), "delta: expected"),
            (0, torch.zeros(2, 5, 3), "grad_output: expected shape"),
            (6, float("nan"), "scale: expected a finite number"),
        ],
    )
    def test_wrong_calls_raise(self, argument, replace, message):
        arguments = [*self.inputs().values(), torch.zeros(2, 5, 2), torch.zeros(2, 5), 0.5, True, True, True]
        raw.pairwise_part_backward(*arguments)
        arguments[argument] = replace
        with pytest.raises(ValueError, match=message):
            raw.pairwise_part_backward(*arguments)
