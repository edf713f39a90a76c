"""What torch does with an operator: autograd, inference mode, kinds of tensors. All ops alike.

Second derivatives: test_second.py, third ones: test_third.py; transforms: test_func.py; test_autocast.py. Compilers and
tracers: test_compile.py, test_export.py, test_trace.py. Registrations: test_registration.py.
"""

import itertools

import pytest
import torch
from cases import ARGUMENTS, ATTENTION
from inputs import LAYOUTS, function, make

import dnl_ext
from dnl_ext import reference

raw = torch.ops.dnl_ext
every_op = pytest.mark.parametrize("op", ARGUMENTS)


def masks(count):
    """Every choice of which inputs require grad, but none."""
    return [mask for mask in itertools.product((True, False), repeat=count) if any(mask)]


GRADCHECKS = [(op, layout, mask) for op, names in ARGUMENTS.items() for layout in LAYOUTS for mask in masks(len(names))]


class TestGradcheck:
    @pytest.mark.parametrize(("op", "layout", "mask"), GRADCHECKS)
    def test_every_mask_and_layout(self, op, layout, mask):
        inputs = [x.requires_grad_(need) for x, need in zip(make(op, layout=layout), mask, strict=True)]
        assert torch.autograd.gradcheck(function(op), inputs, fast_mode=len(inputs) > 2)

    @pytest.mark.parametrize("op", [*ATTENTION, "pairwise_softmax"])
    @pytest.mark.parametrize("options", [{"whiten": None}, {"scale": -1.25}, {"scale": 1.25, "whiten": None}], ids=str)
    def test_options(self, op, options):
        inputs = [x.requires_grad_() for x in make(op)]
        assert torch.autograd.gradcheck(lambda *x: function(op)(*x, **options), inputs)

    @pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
    def test_dimensions_of_mean_subtract(self, dim):
        (x,) = make("mean_subtract")
        assert torch.autograd.gradcheck(lambda x: dnl_ext.mean_subtract(x, dim), [x.requires_grad_()])

    @every_op
    @pytest.mark.parametrize("lead", [(), (1,), (2, 1, 3)])
    def test_leading_dimensions(self, op, lead):
        inputs = [x.requires_grad_() for x in make(op, lead=lead)]
        assert torch.autograd.gradcheck(function(op), inputs, fast_mode=True)

    @every_op
    def test_sizes_of_one(self, op):
        inputs = [x.requires_grad_() for x in make(op, nq=1, nk=1, dqk=1, dv=1)]
        assert torch.autograd.gradcheck(function(op), inputs)

    @every_op
    def test_more_than_one_tile(self, op):
        inputs = [x.requires_grad_() for x in make(op, lead=(), nq=230, nk=420, dqk=5, dv=4)]
        assert torch.autograd.gradcheck(function(op), inputs, fast_mode=True)

    @every_op
    def test_batched_gradients(self, op):
        inputs = [x.requires_grad_() for x in make(op)]
        assert torch.autograd.gradcheck(function(op), inputs, fast_mode=True, check_batched_grad=True)


class TestWhatIsComputed:
    @every_op
    def test_inputs_that_need_no_gradient_get_none(self, op):
        count = len(ARGUMENTS[op])
        for mask in masks(count):
            inputs = [x.requires_grad_(need) for x, need in zip(make(op), mask, strict=True)]
            function(op)(*inputs).sum().backward()
            assert [x.grad is not None for x in inputs] == list(mask)

    @every_op
    def test_without_any_there_is_no_graph(self, op):
        assert not function(op)(*make(op)).requires_grad
        inputs = [x.requires_grad_() for x in make(op)]
        with torch.no_grad():
            assert not function(op)(*inputs).requires_grad

    @pytest.mark.parametrize("need", range(4))
    def test_raw_backward_leaves_out_what_nobody_needs(self, need):
        q, k, v, m = make("disentangled_attention")
        saved = raw.pairwise_forward(q, k, v, m, 0.5, "channel", True)
        needs = [i == need for i in range(4)]
        grads = raw.pairwise_backward(torch.ones_like(saved[0]), q, k, v, m, *saved, 0.5, "channel", *needs)
        everything = raw.pairwise_backward(
            torch.ones_like(saved[0]), q, k, v, m, *saved, 0.5, "channel", True, True, True, True
        )
        for i, x in enumerate((q, k, v, m)):
            assert grads[i].numel() == (x.numel() if i == need else 0)
        assert torch.equal(grads[need], everything[need])
        saved = raw.unary_forward(m, v)
        grads = raw.unary_backward(torch.ones_like(saved[0]), m, v, *saved, need == 0, need == 1)
        assert [grad.numel() > 0 for grad in grads] == [need == 0, need == 1]

    @every_op
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_a_gradient_is_the_same_whoever_else_needs_one(self, op, dtype):
        inputs = make(op, nq=21, nk=33, dqk=9, dv=7, dtype=dtype)
        leaves = [x.clone().requires_grad_() for x in inputs]
        dy = torch.randn_like(function(op)(*inputs))
        everything = torch.autograd.grad(function(op)(*leaves), leaves, dy)
        for i in range(len(inputs)):
            alone = [x.clone().requires_grad_(i == j) for j, x in enumerate(inputs)]
            assert torch.equal(torch.autograd.grad(function(op)(*alone), alone[i], dy)[0], everything[i])

    @pytest.mark.parametrize("op", [op for op in ARGUMENTS if op != "pairwise_softmax"])  # which is composed of others
    def test_gradients_have_the_order_of_dimensions_of_their_inputs(self, op):
        inputs = [x.requires_grad_() for x in make(op, layout="channel_first")]
        grads = torch.autograd.grad(function(op)(*inputs).square().sum(), inputs)
        for x, dx in zip(inputs, grads, strict=True):
            assert dx.stride() == x.stride()

    @every_op
    def test_inputs_and_gradients_are_not_written_to(self, op):
        inputs = make(op)
        copies = [x.clone() for x in inputs]
        leaves = [x.requires_grad_() for x in inputs]
        y = function(op)(*leaves)
        dy = torch.randn_like(y)
        dy_copy, version = dy.clone(), y._version
        torch.autograd.grad(y, leaves, dy)
        assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))
        assert torch.equal(dy, dy_copy) and y._version == version

    @every_op
    def test_backward_twice_gives_the_same(self, op):
        inputs = [x.requires_grad_() for x in make(op)]
        y = function(op)(*inputs).sum()
        first = torch.autograd.grad(y, inputs, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(y, inputs), strict=True))

    @every_op
    def test_changing_a_saved_input_in_place_is_noticed(self, op):
        if op == "mean_subtract":
            pytest.skip("its backward needs nothing of the forward")
        inputs = [x.requires_grad_() for x in make(op)]
        copies = [x * 1 for x in inputs]
        y = function(op)(*copies)
        copies[0].mul_(2)
        if op in ("unary_softmax", "pairwise_softmax", "whiten"):
            y.mul_(2)  # only the output is saved
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_changing_the_output_of_attention_in_place_is_noticed(self):
        """It is saved too; torch's message names the operator, as docs/pytorch.md says."""
        y = dnl_ext.disentangled_attention(*(x.requires_grad_() for x in make("disentangled_attention")))
        y.relu_()
        with pytest.raises(RuntimeError, match="dnl_ext_pairwise_forward"):
            y.sum().backward()

    @every_op
    def test_one_tensor_for_every_argument(self, op):
        """The same leaf as query, key and value: gradients add up."""
        x = torch.randn(3, 4, 4, dtype=torch.float64)
        names = ARGUMENTS[op]

        def apply(ops, x):
            return function(op, ops)(*(x[..., 0] if name == "mask_logits" else x for name in names))

        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        apply(dnl_ext, ours).square().sum().backward()
        apply(reference, theirs).square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


class TestNonLeafViews:
    @pytest.mark.parametrize("ops", [dnl_ext], ids=["fused"])
    def test_slices_of_one_convolution(self, ops):
        """query, key and value as views of one tensor, as a fused projection makes them."""
        x = torch.randn(2, 11, 3, 4, dtype=torch.float64)

        def apply(ops, x):
            q, k, v, m = (part.flatten(2).transpose(1, 2) for part in (x * 2).split([4, 4, 2, 1], 1))
            return ops.disentangled_attention(q, k, v, m.squeeze(-1))

        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        apply(ops, ours).square().sum().backward()
        apply(reference, theirs).square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)

    @every_op
    def test_expanded_inputs(self, op):
        """The gradient of an expanded tensor is summed over what was expanded."""
        inputs = make(op, lead=(1,))
        ours, theirs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
        for ops, leaves in ((dnl_ext, ours), (reference, theirs)):
            function(op, ops)(*(x.expand(3, *x.shape[1:]) for x in leaves)).square().sum().backward()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)

    @every_op
    @pytest.mark.parametrize("form", ["summed", "cat", "transposed", "zero"])
    def test_gradients_as_autograd_hands_them_over(self, op, form):
        losses = {
            "summed": lambda y: y.sum(),
            "cat": lambda y: (torch.cat([y, y * 3], -1) ** 2).sum(),
            "transposed": lambda y: (y.transpose(-1, -2).contiguous() ** 2).sum(),
            "zero": lambda y: (y * 0).sum(),
        }
        ours, theirs = ([x.requires_grad_() for x in make(op)] for _ in range(2))
        losses[form](function(op)(*ours)).backward()
        losses[form](function(op, reference)(*theirs)).backward()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# Modes
# ----------------------------------------------------------------------------------------------------------------------


class TestInferenceMode:
    @every_op
    def test_equals_ordinary_mode(self, op):
        inputs = [x.requires_grad_() for x in make(op)]
        expected = function(op)(*inputs).detach()
        with torch.inference_mode():
            actual = function(op)(*inputs)
        assert actual.is_inference() and torch.equal(actual, expected)

    @every_op
    def test_of_tensors_made_in_it(self, op):
        with torch.inference_mode():
            inputs = make(op)
            torch.testing.assert_close(function(op)(*inputs), function(op, reference)(*inputs))

    def test_keeps_no_residual_of_a_16_bit_output(self):
        """What rounding took from the output is for the backward alone."""
        q, k, v, m = make("disentangled_attention", dtype=torch.bfloat16)
        assert raw.pairwise_forward(q, k, v, m, 0.5, "channel", False)[2].numel() == 0
        assert raw.pairwise_forward(q, k, v, m, 0.5, "channel", True)[2].numel() == 2 * 4 * 2


class TestTensorKinds:
    @every_op
    def test_parameters_and_subclasses(self, op):
        class Named(torch.Tensor):
            pass

        expected = function(op)(*make(op))
        assert torch.equal(function(op)(*(torch.nn.Parameter(x) for x in make(op))), expected)
        result = function(op)(*(x.as_subclass(Named) for x in make(op)))
        assert torch.equal(result.as_subclass(torch.Tensor), expected)

    @every_op
    def test_negated_views(self, op):
        """A tensor with the negative bit is a view that must be resolved before its memory is read."""
        inputs = [torch._neg_view(x) for x in make(op)]
        assert inputs[0].is_neg()
        torch.testing.assert_close(function(op)(*inputs), function(op)(*(x.resolve_neg() for x in inputs)))

    @every_op
    def test_imaginary_parts(self, op):
        """Real views of complex memory: stride 2, and the negative bit where it is conjugated."""
        inputs = [torch.complex(torch.full_like(x, torch.nan), x).conj().imag for x in make(op)]
        torch.testing.assert_close(function(op)(*inputs), function(op)(*(-x for x in make(op))))
