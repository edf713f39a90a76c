"""The tests' foundation: the formulas are right, cases cover what they claim, and the check can fail."""

import collections
import dataclasses
import functools
import math
import random

import accuracy
import cases
import formulas
import numpy as np
import pytest
import torch

import dnl_ext
from dnl_ext import reference

every_op = pytest.mark.parametrize("op", cases.ARGUMENTS)


@functools.cache
def drawn(count=4000):
    return [cases.random_case(seed) for seed in range(count)]


def make_case(**fields):
    """A plain attention case, large enough that no error in it is a matter of luck."""
    return cases.make_case(**{"options": {"scale": 0.4, "whiten": "channel"}, **fields})


class TestSteps:
    """The formulas written out in formulas.py are those of autograd through the reference."""

    @every_op
    @pytest.mark.parametrize("seed", range(8))
    def test_equal_autograd_of_the_reference(self, op, seed):
        case = cases.random_case(seed, op=op, dtype=torch.float64, large=0, hot=0)
        case = dataclasses.replace(case, needs=tuple(case.shapes), grad="contiguous", mean=case.mean / 10)
        inputs, grad = case.make()
        output, gradients = accuracy.run(getattr(reference, op), inputs, grad, case.options, case.needs)
        steps, step_gradients = formulas.STEPS[op](**inputs, grad=grad, **case.options)
        torch.testing.assert_close(steps, output, rtol=1e-10, atol=1e-10)
        assert set(step_gradients) == set(gradients)
        for name, expected in gradients.items():
            torch.testing.assert_close(step_gradients[name], expected, rtol=1e-8, atol=1e-9)

    @every_op
    def test_are_the_same_in_long_double(self, op):
        case = cases.random_case(5, op=op, dtype=torch.float64, large=0)
        inputs, grad = case.make()
        in_torch, gradients = formulas.STEPS[op](**inputs, grad=grad, **case.options)
        wide = {name: accuracy.widened(x) for name, x in inputs.items()}
        in_numpy, wide_gradients = formulas.STEPS[op](**wide, grad=accuracy.widened(grad), **case.options)
        assert in_numpy.dtype == np.longdouble
        np.testing.assert_allclose(in_torch.numpy(), in_numpy.astype(float), rtol=1e-9, atol=1e-9)
        for name, x in gradients.items():
            np.testing.assert_allclose(x.numpy(), wide_gradients[name].astype(float), rtol=1e-6, atol=1e-9)

    def test_unary_term_is_left_out_without_mask_logits(self):
        case = make_case(dtype=torch.float64)
        inputs, grad = case.make()
        del inputs["mask_logits"]
        _, gradients = formulas.disentangled_attention_steps(**inputs, grad=grad)
        assert set(gradients) == {"query", "key", "value"}


class TestLayouts:
    @pytest.mark.parametrize("layout", [name for name in cases.LAYOUTS if name != "expanded"])
    @pytest.mark.parametrize("shape", [(), (7,), (5, 3), (2, 5, 3), (2, 3, 4, 5), (1, 1), (0, 4), (3, 0, 2)])
    def test_keep_every_element(self, layout, shape):
        x = torch.randn(shape)
        for seed in range(5):
            assert torch.equal(cases.lay_out(x, layout, random.Random(seed)), x)

    def test_channel_first_has_positions_innermost(self):
        assert cases.lay_out(torch.randn(2, 5, 3), "channel_first", random.Random(0)).stride() == (15, 1, 5)

    def test_sliced_is_surrounded_by_nan(self):
        strides = set()
        for seed in range(20):
            x = cases.lay_out(torch.ones(4, 6, 5), "sliced", random.Random(seed))
            everything = x.untyped_storage().nbytes() // 4
            memory = x.as_strided((everything,), (1,), 0)
            assert int(memory.isnan().sum()) == everything - x.numel() > 0
            strides.add(x.stride())
        assert len(strides) > 10

    def test_expanded_repeats_one_slice_in_place(self):
        dims = collections.Counter()
        for seed in range(50):
            x = cases.lay_out(torch.randn(3, 4, 5), "expanded", random.Random(seed))
            assert x.shape == (3, 4, 5) and x.stride().count(0) == 1
            dims[x.stride().index(0)] += 1
        assert set(dims) == {0, 1, 2}

    def test_permuted_reorders_memory(self):
        strides = {cases.lay_out(torch.randn(2, 3, 4), "permuted", random.Random(s)).stride() for s in range(50)}
        assert len(strides) == 6


class TestGradientForms:
    def make(self, form, shape=(2, 5, 3), dtype=torch.float32):
        return cases.make_gradient(shape, form, dtype, torch.Generator().manual_seed(0), random.Random(0))

    @pytest.mark.parametrize("form", cases.GRADIENTS)
    @pytest.mark.parametrize("shape", [(2, 5, 3), (4,), ()])
    def test_have_the_shape_and_are_finite(self, form, shape):
        grad = self.make(form, shape)
        assert grad.shape == shape and grad.isfinite().all()

    def test_summed_has_stride_zero_as_autograd_makes_it(self):
        x = torch.zeros(2, 5, 3, requires_grad=True)
        seen = []
        y = x.clone()
        y.register_hook(lambda grad: seen.append(grad.stride()))
        y.sum().backward()
        assert self.make("summed").stride() == seen[0] == (0, 0, 0)

    def test_cat_slice_is_a_slice_of_a_larger_tensor(self):
        grad = self.make("cat_slice")
        assert grad._base is not None and grad._base.numel() > grad.numel() and grad._base.isnan().any()

    def test_transposed_is_channel_first(self):
        assert self.make("transposed").stride() == (15, 1, 5)

    def test_huge_and_zero(self):
        assert self.make("huge").abs().max() > 1e24
        assert self.make("zero").abs().max() == 0


class TestRandomCase:
    def test_is_decided_by_its_seed(self):
        a, b = cases.random_case(11), cases.random_case(11)
        assert str(a) == str(b) and str(a).startswith("Case(seed=11, ")
        (inputs, grad), (again, grad_again) = a.make(), b.make()
        assert all(torch.equal(inputs[name], again[name]) for name in inputs) and torch.equal(grad, grad_again)
        assert str(cases.random_case(12)) != str(a)

    def test_covers_every_choice(self):
        every = drawn()
        assert {c.op for c in every} == set(cases.ARGUMENTS)
        assert {c.dtype for c in every} == set(cases.DTYPES)
        assert {layout for c in every for layout in c.layouts.values()} == set(cases.LAYOUTS)
        assert {c.grad for c in every} == set(cases.GRADIENTS)
        assert {c.mean for c in every} == {0.0, 10.0, 30.0}
        attention = [c for c in every if c.op == "disentangled_attention"]
        assert {"mask_logits" in c.shapes for c in attention} == {True, False}
        assert {c.options["whiten"] for c in attention} == {"channel", None}
        scales = {c.options["scale"] for c in attention}
        assert {None, 1.25, -1.25, 0.0} <= scales
        assert {len(c.shapes["query"]) - 2 for c in attention} == {0, 1, 2, 3}
        assert {len(c.needs) for c in attention} == {1, 2, 3, 4}

    def test_covers_the_sizes(self):
        attention = [c.shapes for c in drawn() if c.op == "disentangled_attention"]
        for name, dim, most in (("query", -2, 700), ("key", -2, 700), ("key", -1, 600), ("value", -1, 600)):
            sizes = [shapes[name][dim] for shapes in attention]
            assert min(sizes) == 1 and most * 0.95 < max(sizes) <= most
            assert sum(size % 2 for size in sizes) > len(sizes) / 3
        assert sum(s["query"][-2] != s["key"][-2] for s in attention) > len(attention) / 2
        assert any(s["query"][-2] == s["key"][-2] > 1 for s in attention)

    def test_inputs_are_what_the_case_says(self):
        for seed in range(60):
            case = cases.random_case(seed, large=0)
            inputs, grad = case.make()
            assert grad.shape == case.output_shape and grad.dtype == case.dtype
            assert getattr(reference, case.op)(*inputs.values(), **case.options).shape == case.output_shape
            for name, x in inputs.items():
                assert x.shape == case.shapes[name] and x.dtype == case.dtype and x.isfinite().all()

    def test_means_are_in_deviations(self):
        for mean in (0.0, 10.0, 30.0):
            inputs, _ = make_case(mean=mean).make()
            for name in ("query", "key", "value"):
                x = inputs[name]
                assert abs((x.mean(-2) / x.std(-2)).abs().mean() - mean) < 0.1 * mean + 0.3


class TestPoisonedCase:
    def test_is_decided_by_its_seed(self):
        assert str(cases.poisoned_case(4)) == str(cases.poisoned_case(4)) != str(cases.poisoned_case(5))

    def test_covers_every_choice(self):
        drawn = [cases.poisoned_case(seed) for seed in range(2000)]
        assert {(case.op, where) for case, where, _, _ in drawn} == {
            (op, where) for op, names in cases.ARGUMENTS.items() for where in (*names, "grad")
        }
        assert {str(value) for *_, value in drawn} == {"nan", "inf", "-inf"}

    def test_poison_where_there_should_be_none_is_found(self, monkeypatch):
        seed = next(s for s in range(100) if cases.poisoned_case(s)[0].op == "pairwise_attention")
        monkeypatch.setattr(
            dnl_ext, "pairwise_attention", lambda *x, **o: reference.pairwise_attention(*x, **o).nan_to_num()
        )
        assert any(self.fails(s) for s in range(seed, seed + 50))

    def fails(self, seed):
        try:
            accuracy.check_poisoned(seed)
        except AssertionError:
            return True
        return False


class TestDistance:
    def test_is_the_norm_of_the_difference(self):
        assert accuracy.distance(torch.tensor([4.0, 5.0]), torch.tensor([1.0, 1.0]).double()) == pytest.approx(5)

    @pytest.mark.parametrize("size", [1e-200, 1e200])
    def test_neither_overflows_nor_underflows(self, size):
        x = np.array([3.0, 4.0], dtype=np.longdouble) * size
        assert accuracy.distance(x, 0 * x) == pytest.approx(5 * size)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_is_infinite_where_a_value_is_not_finite(self, bad):
        assert accuracy.distance(torch.tensor([bad, 1.0]), torch.zeros(2, dtype=torch.float64)) == math.inf

    def test_of_nothing_is_zero(self):
        assert accuracy.distance(torch.zeros(0, 3), torch.zeros(0, 3).double()) == 0


class TestError:
    def test_passes_up_to_the_bar(self):
        assert accuracy.Error("output", 1, 2.0, 1.0, math.nan).passes
        assert not accuracy.Error("output", 1, 2.01, 1.0, math.nan).passes
        assert accuracy.Error("query", 1, 3.0, 1.0, math.nan).passes
        assert not accuracy.Error("query", 1, 3.01, 1.0, math.nan).passes

    def test_passes_below_the_model_where_the_reference_is_lucky(self):
        assert accuracy.Error("output", 1, 1e-8, 0.0, 1e-7).passes
        assert not accuracy.Error("output", 1, 2e-7, 0.0, 1e-7).passes

    def test_fails_where_something_is_not_finite(self):
        assert not accuracy.Error("output", 1, math.inf, 1.0, 1.0).passes
        assert not accuracy.Error("output", 1, math.inf, math.inf, 1.0).passes
        assert not accuracy.Error("output", 1, 1.0, math.inf, 1.0).passes
