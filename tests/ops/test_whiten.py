"""See dnl_ext.mean_subtract. Wrong calls are in test_errors.py, what torch does with it in test_autograd.py."""

import itertools
import math

import accuracy
import cases
import pytest
import torch

import dnl_ext
from dnl_ext import mean_subtract, reference

pytestmark = pytest.mark.usefixtures("device")
dtypes = pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)


class TestValues:
    @dtypes
    @pytest.mark.parametrize("layout", cases.LAYOUTS)
    @pytest.mark.parametrize("mean", [0.0, 30.0])
    @pytest.mark.parametrize(("nq", "dqk"), [(131, 67), (1, 5), (7, 1), (64, 64), (700, 3)])
    def test_error_is_within_the_bar(self, dtype, layout, mean, nq, dqk):
        for grad in cases.GRADIENTS:
            accuracy.check(
                cases.make_case(
                    "mean_subtract",
                    nq=nq,
                    dqk=dqk,
                    dtype=dtype,
                    layout=layout,
                    mean=mean,
                    grad=grad,
                    options={"dim": -2},
                )
            )

    @pytest.mark.parametrize("dims", [1, 2, 3, 4, 5])
    def test_every_dimension_of_every_order(self, dims):
        x = torch.randn([2, 3, 4, 5, 2][:dims], dtype=torch.float64)
        for order in itertools.islice(itertools.permutations(range(dims)), 60):
            y = x.permute(order).contiguous().permute([order.index(i) for i in range(dims)])
            for dim in range(-dims, dims):
                torch.testing.assert_close(mean_subtract(y, dim), reference.mean_subtract(x, dim))

    def test_positions_are_the_last_dimension_but_one_by_default(self):
        x = torch.randn(2, 3, 4)
        assert torch.equal(mean_subtract(x), mean_subtract(x, 1))

    @pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300])
    def test_sizes_around_blocks(self, size):
        for shape in ((size, 65), (65, size), (3, size, 5)):
            x = torch.randn(shape, dtype=torch.float64)
            for y in (x, x.mT.contiguous().mT):
                torch.testing.assert_close(mean_subtract(y), reference.mean_subtract(x))

    def test_overlapping_windows(self):
        """Positions that share memory, as unfold makes them."""
        x = torch.randn(50, dtype=torch.float64).unfold(0, 8, 3)
        torch.testing.assert_close(mean_subtract(x), reference.mean_subtract(x.clone()))

    def test_offsets_beyond_32_bits(self):
        """Two positions more than 2^31 elements apart, in memory of which two pages are touched."""
        try:
            memory = torch.empty(2**31 + 100, dtype=torch.bfloat16)
        except RuntimeError:
            pytest.skip("no address space for 4 GiB")
        x = memory.as_strided((2, 3), (2**31 + 7, 1), 5)
        x.copy_(torch.tensor([[1.0, 2.0, 3.0], [3.0, 6.0, 9.0]]))
        assert mean_subtract(x).tolist() == [[-1.0, -2.0, -3.0], [1.0, 2.0, 3.0]]


class TestSums:
    """Sums are kept in float32 or wider, whatever the dtype."""

    def test_long_sums_of_bfloat16(self):
        """A bfloat16 sum of ones stops at 256."""
        for x in (torch.ones(5000, 3), torch.ones(3, 5000).mT):
            assert mean_subtract(x.bfloat16()).abs().max() == 0

    def test_float16_sums_do_not_overflow(self):
        x = torch.full((1000, 2), 60000.0, dtype=torch.float16)
        assert mean_subtract(x).abs().max() == 0

    @pytest.mark.parametrize("channel_first", [False, True])
    def test_a_large_mean_is_taken_off_exactly(self, channel_first):
        """At 2^20 deviations the mean must be right to its last bit; a float32 running sum is off by hundreds."""
        x = torch.randint(-3, 4, (20_000, 4), generator=torch.Generator().manual_seed(0)).float() + 2**20
        x[-1] -= x.double().sum(0).remainder(20_000).float()  # so that the mean is an integer
        x = x.mT.contiguous().mT if channel_first else x
        assert torch.equal(mean_subtract(x).double(), x.double() - x.double().mean(0))


class TestLayout:
    @dtypes
    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
    def test_output_has_the_order_of_the_input(self, dtype, order):
        x = torch.randn([[2, 3, 4][i] for i in order]).to(dtype).permute([order.index(i) for i in range(3)])
        y = mean_subtract(x)
        assert y.stride() == x.stride() and y.dtype == dtype

    def test_output_of_a_slice_is_dense(self):
        x = torch.randn(4, 9, 8)[1:3, 2:7, ::2]
        assert mean_subtract(x).is_contiguous()

    def test_gradient_has_the_order_of_its_output(self):
        x = torch.randn(2, 4, 5).transpose(1, 2).requires_grad_()
        (dx,) = torch.autograd.grad(mean_subtract(x).square().sum(), x)
        assert dx.stride() == x.stride()

    def test_memory_around_a_slice_is_left_alone(self):
        larger = torch.full((6, 9, 8), math.nan)
        view = larger[1:3, 2:7, ::2]
        view.copy_(torch.randn(2, 5, 4))
        before = larger.clone()
        assert mean_subtract(view).isfinite().all()
        assert torch.equal(larger.isnan(), before.isnan())


class TestNonFinite:
    @dtypes
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_stays_in_its_channel(self, dtype, value):
        for x in (torch.randn(2, 20, 9), torch.randn(2, 9, 20).mT):
            x = x.to(dtype).clone(memory_format=torch.preserve_format)
            x[1, 13, 4] = value
            finite = mean_subtract(x).isfinite()
            assert not finite[1, :, 4].any()
            finite[1, :, 4] = True
            assert finite.all()


class TestDeterminism:
    @dtypes
    def test_neither_repeats_nor_threads_nor_neighbours_matter(self, dtype):
        x = torch.randn(5, 301, 77).to(dtype)
        expected = mean_subtract(x)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            try:
                for _ in range(5):
                    assert torch.equal(mean_subtract(x), expected)
            finally:
                torch.set_num_threads(1)
        for i in range(5):
            assert torch.equal(mean_subtract(x[i]), expected[i])
            poisoned = torch.full_like(x, math.nan)
            poisoned[i] = x[i]
            assert torch.equal(mean_subtract(poisoned)[i], expected[i])


def test_is_public():
    assert dnl_ext.mean_subtract is mean_subtract and "mean_subtract" in dnl_ext.__all__
