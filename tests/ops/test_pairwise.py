"""See dnl_ext.disentangled_attention, dnl_ext.pairwise_attention and dnl_ext.pairwise_softmax.

Random shapes are in test_random.py, identities in test_identities.py, calls that must raise in test_errors.py, what
torch does with the operators in test_autograd.py, memory in test_memory.py.
"""

import concurrent.futures
import itertools
import math

import accuracy
import cases
import pytest
import torch

import dnl_ext
from dnl_ext import disentangled_attention, pairwise_attention, pairwise_softmax, reference

pytestmark = pytest.mark.usefixtures("device")
dtypes = pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
half_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
whitens = pytest.mark.parametrize("whiten", ["channel", None])
NAMES = ("query", "key", "value", "mask_logits")


def make(lead=(2,), nq=21, nk=33, dqk=9, dv=7, dtype=torch.float64, mean=0.0, mask=True):
    case = cases.make_case(lead=lead, nq=nq, nk=nk, dqk=dqk, dv=dv, dtype=dtype, mean=mean, mask=mask)
    inputs, grad = case.make()
    return list(inputs.values()), grad


def everything(inputs, grad, function=disentangled_attention, **options):
    """Output and all gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = function(*leaves, **options)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def relative_error(x, truth):
    return accuracy.distance(x, truth) / accuracy.norm(truth)


def assert_equal(actual, expected):
    for name, a, b in zip(("output", *NAMES), actual, expected, strict=False):
        assert torch.equal(a, b), f"{name}: {int((a != b).sum())} of {a.numel()} differ"


class TestValues:
    @dtypes
    @pytest.mark.parametrize("layout", cases.LAYOUTS)
    @pytest.mark.parametrize("mask", [True, False])
    @whitens
    def test_error_is_within_the_bar(self, dtype, layout, mask, whiten):
        for mean, grad in zip((0.0, 10.0, 30.0), ("contiguous", "transposed", "cat_slice"), strict=True):
            accuracy.check(
                cases.make_case(
                    mask=mask,
                    dtype=dtype,
                    layout=layout,
                    mean=mean,
                    grad=grad,
                    options={"scale": 0.3, "whiten": whiten},
                )
            )

    @dtypes
    @pytest.mark.parametrize("layout", cases.LAYOUTS)
    @whitens
    def test_map_is_within_the_bar(self, dtype, layout, whiten):
        for mean in (0.0, 10.0, 30.0):
            options = {"scale": 0.3, "whiten": whiten}
            accuracy.check(cases.make_case("pairwise_softmax", dtype=dtype, layout=layout, mean=mean, options=options))

    @dtypes
    @pytest.mark.parametrize("grad", cases.GRADIENTS)
    def test_every_form_of_gradient(self, dtype, grad):
        accuracy.check(cases.make_case(dtype=dtype, grad=grad, lead=(2, 2)))

    @pytest.mark.parametrize("names", list(itertools.combinations(NAMES, 2)))
    def test_layouts_mix(self, names):
        layouts = {name: "channel_first" if name in names else "permuted" for name in NAMES}
        accuracy.check(cases.make_case(lead=(2, 3), layouts=layouts))
        accuracy.check(cases.make_case(lead=(2, 3), layouts=layouts, dtype=torch.bfloat16))

    @pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3), (2, 1, 3), (1, 1, 1), (17,)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_leading_dimensions(self, lead, dtype):
        accuracy.check(cases.make_case(lead=lead, nq=23, nk=31, dqk=12, dv=10, dtype=dtype))

    SIZES = (1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191, 192, 193, 383, 384, 385)

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_sizes_around_tiles(self, size, dtype):
        """Against the reference in float64, every size in every place; tolerances far below any wrong element."""
        tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]
        for i, sizes in enumerate(((size, 5, 3, 4), (5, size, 3, 4), (5, 6, size, 4), (5, 6, 3, size), (size,) * 4)):
            if i == 4 and size > 200:
                continue
            inputs, grad = make((), *sizes, dtype=dtype)
            truth = everything([x.double() for x in inputs], grad.double(), reference.disentangled_attention)
            for name, a, b in zip(("output", *NAMES), everything(inputs, grad), truth, strict=True):
                if accuracy.norm(b) > 1e-6:
                    assert relative_error(a, b) < tolerance, (sizes, name)

    @pytest.mark.parametrize("slope", [-1, 0, 1])
    def test_more_keys_than_any_tile(self, slope):
        """Several blocks, whose maxima fall, stay or rise, so that earlier sums are rescaled or left alone."""
        inputs, grad = make((), nq=40, nk=2000, dqk=6, dv=5)
        inputs[0] = inputs[0].abs() + torch.arange(6) * 0.1
        inputs[1] = inputs[1] + 3 * slope * torch.linspace(-1, 1, 2000, dtype=torch.float64).unsqueeze(-1)
        expected = everything(inputs, grad, reference.disentangled_attention, whiten=None)
        for a, b in zip(everything(inputs, grad, whiten=None), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)

    def test_overlapping_windows(self):
        """query and key whose positions share memory, as unfold makes them."""
        memory = torch.randn(200, dtype=torch.float64)
        q, k, v = memory.unfold(0, 8, 3)[:40], memory.unfold(0, 8, 2)[:50], memory.unfold(0, 5, 1)[:50]
        actual = everything([q, k, v], torch.ones(40, 5).double(), pairwise_attention)
        expected = everything([q, k, v], torch.ones(40, 5).double(), reference.pairwise_attention)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)

    def test_offsets_beyond_32_bits(self):
        """Positions more than 2^31 elements apart, in memory of which a few pages are touched."""
        try:
            memory = torch.empty(2**31 + 1000, dtype=torch.bfloat16)
        except RuntimeError:
            pytest.skip("no address space for 4 GiB")
        inputs, grad = make((), 2, 2, 4, 4, dtype=torch.bfloat16)
        far = []
        for i, x in enumerate((*inputs, grad)):
            strides = (2**31 + 7, 1)[: x.dim()]
            far.append(memory.as_strided(x.shape, strides, 100 * i).copy_(x))
        assert_equal(everything(far[:4], far[4]), everything(inputs, grad))


class TestHotSoftmax:
    """The paper's temperature makes logits twenty times hotter than attention's; the maximum must never be dropped."""

    @dtypes
    @pytest.mark.parametrize("scale", [1.25, -1.25, 20.0])
    def test_error_is_within_the_bar(self, dtype, scale):
        case = cases.make_case(
            dtype=dtype, dqk=256 if scale < 20 else 40, options={"scale": scale, "whiten": "channel"}
        )
        p = reference.pairwise_softmax(*(x.double() for x in list(case.make()[0].values())[:2]), scale=scale)
        assert p.max(-1).values.median() > 0.5, "the softmax of this test is flat"
        accuracy.check(case)

    @dtypes
    def test_logits_beyond_the_range_of_exp(self, dtype):
        inputs, grad = make(dtype=dtype, mask=False)
        results = everything(inputs, grad, pairwise_attention, scale=1000.0)
        assert all(x.isfinite().all() for x in results)
        truth = reference.pairwise_attention(*(x.double() for x in inputs), scale=1000.0)
        assert relative_error(results[0], truth) < {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 0.1)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_products_that_cancel_cancel_exactly(self, dtype, device):
        """Products of 16-bit numbers are exact in float32: +a and -a times the same key, centred by nobody, are 0."""
        generator = torch.Generator().manual_seed(0)
        query, key = (3000 * torch.randn(n, 1, generator=generator) for n in (40, 50))
        query, key = (torch.cat([x, sign * x], -1).to(dtype) for x, sign in ((query, -1), (key, 1)))
        value, grad = (torch.randn(n, 7, generator=generator).to(dtype) for n in (50, 40))
        y, dq, dk, dv = everything((query, key, value), grad, pairwise_attention, scale=1.0, whiten=None)
        mean = value.double().mean(0)
        assert relative_error(y, mean.expand(40, 7)) < torch.finfo(dtype).eps
        assert relative_error(dv, (grad.double().sum(0) / 50).expand(50, 7)) < torch.finfo(dtype).eps
        ds = (grad.double() @ (value.double() - mean).mT) / 50
        assert relative_error(dq, ds @ key.double()) < 2 * torch.finfo(dtype).eps
        assert relative_error(dk, ds.mT @ query.double()) < 2 * torch.finfo(dtype).eps

    def test_scale_zero_is_uniform(self):
        inputs, grad = make()
        expected = everything(inputs, grad, reference.disentangled_attention, scale=0.0)
        for a, b in zip(everything(inputs, grad, scale=0.0), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)

    @dtypes
    @pytest.mark.parametrize("mask", [True, False])
    @whitens
    def test_one_key_leaves_query_and_key_no_gradient(self, dtype, mask, whiten):
        """A softmax over one key is 1: its gradients are zero, not the rounding of dP - Delta."""
        inputs, grad = make(nk=1, dtype=dtype, mask=mask)
        _, dq, dk, dv, *_ = everything(inputs, grad, whiten=whiten, scale=1.25)
        assert not dq.any()
        assert not dk.any()
        torch.testing.assert_close(dv, (1 + mask) * grad.double().sum(-2, keepdim=True).to(dtype))


class TestMeans:
    """What a common mean of the inputs costs: nothing, where it cancels in exact arithmetic."""

    def errors(self, dtype, mean, function=disentangled_attention, scale=0.3):
        """Relative errors of output and gradients; query, key and mask logits have `mean`, values have none."""
        inputs, grad = make((), 200, 300, 64, 32, dtype=torch.float64)
        for i in (0, 1, 3):
            inputs[i] = inputs[i] + mean * (1 if i == 3 else torch.randn(64).sign().double())
        inputs, grad = [x.to(dtype) for x in inputs], grad.to(dtype)
        truth = everything([x.double() for x in inputs], grad.double(), reference.disentangled_attention, scale=scale)
        return [
            relative_error(a, b) for a, b in zip(everything(inputs, grad, function, scale=scale), truth, strict=True)
        ]

    @half_dtypes
    @pytest.mark.parametrize("mean", [10.0, 30.0])
    def test_16_bit_errors_do_not_grow(self, dtype, mean):
        """The bar of plain PyTorch grows 20 times here; raw products, centred keys and a column-sum fix do not."""
        plain = self.errors(dtype, 0.0)
        for name, with_mean, without in zip(("output", *NAMES), self.errors(dtype, mean), plain, strict=True):
            assert with_mean < 2 * without, (name, with_mean, without)
        assert self.errors(dtype, mean, reference.disentangled_attention)[1] > 4 * plain[1]

    def test_float32_errors_grow_no_faster_than_the_inputs_rounding(self):
        plain = self.errors(torch.float32, 0.0)
        for name, with_mean, without in zip(NAMES, self.errors(torch.float32, 30.0)[1:], plain[1:], strict=True):
            assert with_mean < 40 * without, (name, with_mean, without)

    @half_dtypes
    def test_values_with_a_mean_cost_query_and_key_nothing(self, dtype):
        """Delta = <dy, y> of a 16-bit output has lost what it needs; the residual keeps it."""
        inputs, grad = make((), 200, 300, 64, 32, dtype=dtype)
        errors = []
        for mean in (0.0, 32.0):
            moved = [*inputs[:2], (inputs[2] + mean), inputs[3]]
            truth = everything([x.double() for x in moved], grad.double(), reference.disentangled_attention)
            results = everything(moved, grad)
            errors.append([relative_error(a, b) for a, b in zip(results, truth, strict=True)])
        for i in (1, 2):
            assert errors[1][i] < 3 * errors[0][i], (NAMES[i - 1], errors[1][i], errors[0][i])


class TestLayout:
    @dtypes
    @pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
    def test_output_has_the_order_of_query_and_gradients_that_of_their_inputs(self, dtype, order):
        def permuted(*shape):
            x = torch.randn([shape[i] for i in order]).to(dtype)
            return x.permute([order.index(i) for i in range(4)]).requires_grad_()

        q, k, v = permuted(2, 3, 5, 4), permuted(2, 3, 7, 4), permuted(2, 3, 7, 6)
        y = pairwise_attention(q, k, v)
        assert y.stride() == permuted(2, 3, 5, 6).stride()
        for x, dx in zip((q, k, v), torch.autograd.grad(y.square().sum(), (q, k, v)), strict=True):
            assert dx.stride() == x.stride()

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_feature_maps_keep_their_memory_format(self, memory_format):
        """From a convolution to the next one: views in, a view out, no copy in between."""
        theta, phi, g = (torch.randn(2, c, 6, 5).to(memory_format=memory_format) for c in (4, 4, 8))
        tokens = [x.flatten(2).transpose(1, 2) for x in (theta, phi, g)]
        assert all(x.data_ptr() == y.data_ptr() for x, y in zip(tokens, (theta, phi, g), strict=True))
        y = pairwise_attention(*tokens).transpose(1, 2).unflatten(2, (6, 5))
        assert y.is_contiguous(memory_format=memory_format)

    def test_residual_is_kept_only_for_a_backward(self):
        """Through the public function: a graph holds it, a call without one does not make it."""
        inputs, _ = make(dtype=torch.bfloat16)
        calls = []
        original = dnl_ext.ops.pairwise._attend
        for requires, expected in ((True, True), (False, False)):
            leaves = [x.detach().requires_grad_(requires) for x in inputs]
            spy = lambda *x: calls.append(x[-1]) or original(*x)  # noqa: E731
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dnl_ext.ops.pairwise, "_attend", spy)
                disentangled_attention(*leaves)
            assert calls.pop() is expected


class TestNonFinite:
    @dtypes
    @whitens
    def test_nan_stays_in_its_batch_element(self, dtype, whiten):
        for i in range(4):
            inputs, grad = make((3,), dtype=dtype)
            clean = everything(inputs, grad, whiten=whiten)
            inputs[i] = inputs[i].clone()
            inputs[i][1] = math.nan
            for a, b in zip(everything(inputs, grad, whiten=whiten), clean, strict=True):
                assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2])
            assert everything(inputs, grad, whiten=whiten)[0][1].isnan().all()

    @dtypes
    def test_masked_keys_take_no_part_in_the_unary_term(self, dtype):
        inputs, grad = make(dtype=dtype)
        inputs[3] = inputs[3].clone()
        inputs[3][:, ::2] = -math.inf
        ours = everything(inputs, grad)
        assert all(x.isfinite().all() for x in ours)
        assert torch.equal(ours[4][:, ::2], torch.zeros_like(ours[4][:, ::2]))
        truth = everything([x.double() for x in inputs], grad.double(), reference.disentangled_attention)
        for a, b in zip(ours, truth, strict=True):
            assert relative_error(a, b) < 16 * torch.finfo(dtype).eps

    @dtypes
    def test_a_query_that_is_nan_is_alone_without_whitening(self, dtype):
        inputs, _ = make((), dtype=dtype, mask=False)
        inputs[0] = inputs[0].clone()
        inputs[0][3, 2] = math.nan
        y = pairwise_attention(*inputs, whiten=None)
        assert y[3].isnan().all() and y.isnan().any(-1).sum() == 1
        assert pairwise_attention(*inputs).isnan().all()

    @dtypes
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_a_value_spoils_its_channel_and_nothing_else(self, dtype, value):
        inputs, _ = make((), dtype=dtype)
        inputs[2] = inputs[2].clone()
        inputs[2][5, 4] = value
        finite = disentangled_attention(*inputs).isfinite()
        assert not finite[:, 4].any()
        finite[:, 4] = True
        assert finite.all()


class TestDeterminism:
    SHAPES = tuple(
        (lead, nq, nk, dqk, dv)
        for lead, nq, nk in (((), 300, 450), ((2,), 97, 203), ((3,), 64, 64), ((5,), 33, 400), ((2, 3), 50, 51))
        for dqk, dv in ((32, 48), (19, 7))
    )

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("threads", [1, 2])
    def test_repeats_are_bit_equal(self, shape, dtype, threads, repeats=4):
        inputs, grad = make(*shape, dtype=dtype)
        torch.set_num_threads(threads)
        try:
            expected = everything(inputs, grad)
            for _ in range(repeats):
                assert_equal(everything(inputs, grad), expected)
        finally:
            torch.set_num_threads(1)

    @pytest.mark.slow
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @dtypes
    @pytest.mark.parametrize("threads", [1, 2, 3])
    def test_repeats_are_bit_equal_long_form(self, shape, dtype, threads):
        self.test_repeats_are_bit_equal(shape, dtype, threads, repeats=250)

    @dtypes
    @pytest.mark.parametrize("threads", [1, 2, 3, 5])
    def test_threads_change_no_more_than_the_order_of_sums(self, dtype, threads):
        inputs, grad = make((), 300, 450, 32, 48, dtype=dtype)
        expected = everything(inputs, grad)
        torch.set_num_threads(threads)
        try:
            actual = everything(inputs, grad)
        finally:
            torch.set_num_threads(1)
        assert torch.equal(actual[0], expected[0])
        for a, b in zip(actual, expected, strict=True):
            assert relative_error(a, b.double()) < 4 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("batch", [1, 2, 3, 8])
    @dtypes
    def test_an_element_does_not_feel_its_neighbours(self, batch, dtype, threads=1):
        """Its output is bit-equal alone, among other data and among NaN; its gradients among any data of one batch."""
        inputs, grad = make((batch,), 70, 90, 19, 24, dtype=dtype)
        torch.set_num_threads(threads)
        try:
            expected = everything(inputs, grad)
            for i in {0, 1 % batch, batch - 1}:
                alone = everything([x[i : i + 1] for x in inputs], grad[i : i + 1])
                assert torch.equal(alone[0][0], expected[0][i])
                for a, b in zip(alone, expected, strict=True):
                    assert relative_error(a[0], b[i].double()) < 4 * torch.finfo(dtype).eps
                poisoned = [torch.full_like(x, math.nan) for x in (*inputs, grad)]
                for x, clean in zip(poisoned, (*inputs, grad), strict=True):
                    x[i] = clean[i]
                for a, b in zip(everything(poisoned[:4], poisoned[4]), expected, strict=True):
                    assert torch.equal(a[i], b[i])
        finally:
            torch.set_num_threads(1)

    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_an_element_does_not_feel_its_neighbours_with_two_threads(self, batch, dtype):
        self.test_an_element_does_not_feel_its_neighbours(batch, dtype, threads=2)

    def test_calls_from_several_python_threads(self):
        cases = [make((2,), 40 + i, 50 + i, 8, 6, dtype=torch.float32) for i in range(8)]
        expected = [everything(*case) for case in cases]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                for actual, wanted in zip(pool.map(lambda case: everything(*case), cases), expected, strict=True):
                    assert_equal(actual, wanted)


def test_are_public():
    for function in (disentangled_attention, pairwise_attention, pairwise_softmax):
        assert getattr(dnl_ext, function.__name__) is function and function.__name__ in dnl_ext.__all__
