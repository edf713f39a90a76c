"""See dnl_ext.unary_softmax and dnl_ext.unary_attention.

Calls that must raise are in test_errors.py, what torch does with the operators in test_autograd.py.
"""

import itertools
import math

import accuracy
import cases
import pytest
import toolchain
import torch

import dnl_ext
from dnl_ext import reference, unary_attention, unary_softmax

pytestmark = pytest.mark.usefixtures("device")
dtypes = pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
HOT = {torch.float64: 1e6, torch.float32: 1e6, torch.bfloat16: 1e4, torch.float16: 1e4}


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


class TestSoftmax:
    @dtypes
    @pytest.mark.parametrize("layout", cases.LAYOUTS)
    @pytest.mark.parametrize("mean", [0.0, 10.0, 30.0])
    @pytest.mark.parametrize("nk", [1, 2, 255, 256, 257, 700])
    def test_error_is_within_the_bar(self, dtype, layout, mean, nk):
        for grad in cases.GRADIENTS:
            accuracy.check(
                cases.make_case("unary_softmax", lead=(3,), nk=nk, dtype=dtype, layout=layout, mean=mean, grad=grad)
            )

    @dtypes
    @pytest.mark.parametrize("offset", [1e2, 1e4, -1e4, 3e4])
    def test_a_common_offset_costs_nothing(self, dtype, offset):
        """The maximum is taken off before anything is rounded; what remains is a softmax like any other."""
        m = (torch.randint(-8, 9, (4, 300)) + (offset if dtype != torch.bfloat16 else 0.0)).to(dtype)
        plain = unary_softmax(m - m.max())
        assert torch.equal(unary_softmax(m), plain)
        close(unary_softmax(m).double().sum(-1), torch.ones(4).double(), 300 * torch.finfo(dtype).eps)

    @dtypes
    def test_logits_of_any_size(self, dtype):
        m = torch.randn(3, 90).to(dtype) * HOT[dtype]
        assert unary_softmax(m).isfinite().all()
        close(unary_softmax(m).double(), torch.softmax(m.double(), -1), 4 * torch.finfo(dtype).eps)

    def test_a_row_as_long_as_a_large_image(self):
        m = torch.randn(2, 70_001)
        u = unary_softmax(m).double()
        close(u.sum(-1), torch.ones(2).double(), 1e-6)
        assert ((u - torch.softmax(m.double(), -1)) / torch.softmax(m.double(), -1)).abs().max() < 1e-5

    @pytest.mark.parametrize("columns", [1, 7, 8, 15, 16, 17, 31, 32, 33, 511, 512, 513])
    def test_sizes_around_vectors_and_blocks(self, columns):
        m = torch.randn(3, columns, dtype=torch.float64)
        close(unary_softmax(m), torch.softmax(m, -1))
        close(unary_softmax(m.mT.contiguous().mT), torch.softmax(m, -1))

    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
    def test_output_has_the_order_of_the_input(self, order):
        m = torch.randn([[2, 3, 4][i] for i in order]).permute([order.index(i) for i in range(3)])
        assert unary_softmax(m).stride() == m.stride()

    def test_gradient_from_an_output_of_another_layout(self):
        x = torch.randn(3, 5, 4, dtype=torch.float64)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        dy = torch.randn(4, 5, 3, dtype=torch.float64).permute(2, 1, 0)
        close(
            torch.autograd.grad(unary_softmax(ours), ours, dy)[0],
            torch.autograd.grad(reference.unary_softmax(theirs), theirs, dy)[0],
        )


class TestMaskedKeys:
    """-inf is how a key is masked out: it gets weight 0 and gradient 0, and the others share what is left."""

    @dtypes
    def test_take_no_part(self, dtype):
        m, v = torch.randn(2, 40).to(dtype), torch.randn(2, 40, 6).to(dtype)
        keep = torch.arange(40) % 3 != 0
        masked = m.masked_fill(~keep, -math.inf)
        assert torch.equal(unary_softmax(masked)[:, ~keep], torch.zeros(2, 14, dtype=dtype))
        tolerance = 4 * torch.finfo(dtype).eps
        close(unary_softmax(masked)[:, keep], unary_softmax(m[:, keep]), tolerance)
        close(unary_attention(masked, v), unary_attention(m[:, keep], v[:, keep]), 4 * tolerance)

    def test_take_no_gradient(self):
        m = torch.randn(2, 40, dtype=torch.float64)
        m[:, ::3] = -math.inf
        v = torch.randn(2, 40, 6, dtype=torch.float64)
        ours, theirs = ([x.clone().requires_grad_() for x in (m, v)] for _ in range(2))
        grads = torch.autograd.grad(unary_attention(*ours).square().sum(), ours)
        for a, b in zip(
            grads, torch.autograd.grad(reference.unary_attention(*theirs).square().sum(), theirs), strict=True
        ):
            assert b.isfinite().all()
            close(a, b)
        assert torch.equal(grads[0][:, ::3], torch.zeros(2, 14).double())

    @dtypes
    def test_all_of_them_is_nan_in_that_row_alone(self, dtype):
        m = torch.randn(3, 300).to(dtype)
        m[1] = -math.inf
        assert unary_softmax(m).isnan().all(-1).tolist() == [False, True, False]
        pooled = unary_attention(m, torch.randn(3, 300, 4).to(dtype))
        assert pooled.isnan().all(-1).tolist() == [False, True, False]

    def test_a_block_of_them_before_the_first_finite_one(self):
        """Longer than any block, at the start of the row: nothing has been seen yet when it is read."""
        m = torch.full((1000,), -math.inf, dtype=torch.float64)
        m[-3:] = torch.tensor([1.0, 2.0, 3.0])
        close(unary_softmax(m)[-3:], torch.softmax(m[-3:], -1))


class TestAttention:
    @dtypes
    @pytest.mark.parametrize("layout", cases.LAYOUTS)
    @pytest.mark.parametrize("mean", [0.0, 10.0, 30.0])
    @pytest.mark.parametrize(("nk", "dv"), [(131, 67), (1, 5), (7, 1), (700, 3)])
    def test_error_is_within_the_bar(self, dtype, layout, mean, nk, dv):
        for grad in cases.GRADIENTS:
            accuracy.check(
                cases.make_case("unary_attention", nk=nk, dv=dv, dtype=dtype, layout=layout, mean=mean, grad=grad)
            )

    @pytest.mark.parametrize("size", [1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 130])
    def test_sizes_around_blocks(self, size):
        for nk, dv in ((size, 65), (65, size)):
            m, v = torch.randn(2, nk, dtype=torch.float64), torch.randn(2, nk, dv, dtype=torch.float64)
            for value in (v, v.mT.contiguous().mT):
                ours, theirs = (
                    [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in (m, value)]
                    for _ in range(2)
                )
                y, expected = unary_attention(*ours), reference.unary_attention(*theirs)
                close(y, expected)
                grads = torch.autograd.grad(y.square().sum(), ours)
                for a, b in zip(grads, torch.autograd.grad(expected.square().sum(), theirs), strict=True):
                    close(a, b)

    def test_without_leading_dimensions(self):
        m, v = torch.randn(7, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
        close(unary_attention(m, v), reference.unary_attention(m, v))

    @dtypes
    def test_output_has_the_dtype_of_value(self, dtype):
        assert unary_attention(torch.randn(2, 7).to(dtype), torch.randn(2, 7, 3).to(dtype)).dtype == dtype

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_a_mean_of_the_values_costs_the_mask_gradient_nothing(self, dtype):
        """<dy, v_j> - <dy, y>: both hold the mean of the values, and the difference must not feel it."""
        m, v, dy = torch.randn(200).to(dtype), torch.randn(200, 30), torch.randn(30).to(dtype)
        errors = []
        for mean in (0.0, 64.0):
            value = (v.to(dtype) + mean).to(dtype)  # coarser with a mean, so the truth is taken of what it became
            leaf, wide = m.clone().requires_grad_(), m.double().requires_grad_()
            (dm,) = torch.autograd.grad(unary_attention(leaf, value), leaf, dy)
            (truth,) = torch.autograd.grad(reference.unary_attention(wide, value.double()), wide, dy.double())
            errors.append(accuracy.distance(dm, truth) / accuracy.norm(truth))
        assert errors[1] < 30 * errors[0]  # the reference: 64 times in float32, and more

    def test_float16_values_and_gradients_near_the_end_of_the_range(self):
        m, v = torch.randn(500).half(), torch.full((500, 3), 60000.0).half()
        assert torch.equal(unary_attention(m, v), torch.full((3,), 60000.0).half())

    def test_offsets_beyond_32_bits(self):
        try:
            memory = torch.empty(2**31 + 100, dtype=torch.bfloat16)
        except RuntimeError:
            pytest.skip("no address space for 4 GiB")
        v = memory.as_strided((2, 3), (2**31 + 7, 1), 5)
        v.copy_(torch.tensor([[1.0, 2.0, 3.0], [3.0, 6.0, 9.0]]))
        m = memory.as_strided((2,), (2**31 + 7,), 50)
        m.copy_(torch.zeros(2))
        assert unary_attention(m, v).tolist() == [2.0, 4.0, 6.0]
        assert unary_softmax(m).tolist() == [0.5, 0.5]


class TestDeterminism:
    @toolchain.needs_kernels  # torch's own sums and products promise no such thing
    @dtypes
    def test_neither_repeats_nor_threads_nor_neighbours_matter(self, dtype):
        m, v = torch.randn(5, 301).to(dtype), torch.randn(5, 301, 77).to(dtype)
        dy = torch.randn(5, 77).to(dtype)

        def everything(m, v, dy):
            leaves = [x.detach().requires_grad_() for x in (m, v)]
            y = unary_attention(*leaves)
            return [y.detach(), *torch.autograd.grad(y, leaves, dy), unary_softmax(m)]

        expected = everything(m, v, dy)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            try:
                for _ in range(5):
                    assert all(torch.equal(a, b) for a, b in zip(everything(m, v, dy), expected, strict=True))
            finally:
                torch.set_num_threads(1)
        for i in range(5):
            alone = everything(m[i], v[i], dy[i])
            assert all(torch.equal(a, b[i]) for a, b in zip(alone, expected, strict=True))
            poisoned = [torch.full_like(x, math.nan) for x in (m, v, dy)]
            for x, clean in zip(poisoned, (m, v, dy), strict=True):
                x[i] = clean[i]
            assert all(torch.equal(a[i], b[i]) for a, b in zip(everything(*poisoned), expected, strict=True))


def test_are_public():
    for name, function in (("unary_softmax", unary_softmax), ("unary_attention", unary_attention)):
        assert getattr(dnl_ext, name) is function and name in dnl_ext.__all__
