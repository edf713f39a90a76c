"""What torch does with an operator: autograd, torch.compile, tracing, inference mode. All ops alike."""

import itertools
import warnings

import pytest
import torch
from cases import ARGUMENTS, ATTENTION
from inputs import LAYOUTS, function, lay_out, make
from torch._subclasses.fake_tensor import FakeTensorMode

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
# Tracing
# ----------------------------------------------------------------------------------------------------------------------


class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def compare(self, f, make_inputs, dynamic=None):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for inputs in make_inputs:
            ours, theirs = ([x.detach().clone().requires_grad_() for x in inputs] for _ in range(2))
            y, expected = compiled(*ours), f(*theirs)
            assert torch.equal(y, expected) and y.stride() == expected.stride()
            grads = torch.autograd.grad(y.square().sum(), ours)
            for a, b in zip(grads, torch.autograd.grad(expected.square().sum(), theirs), strict=True):
                assert torch.equal(a, b)

    @every_op
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_equals_eager(self, op, dtype):
        self.compare(function(op), [make(op, dtype=dtype)])

    @pytest.mark.parametrize("op", ["disentangled_attention", "unary_attention", "pairwise_softmax", "mean_subtract"])
    def test_dynamic_shapes(self, op):
        sizes = [{"nq": 4, "nk": 5, "dqk": 3}, {"nq": 6, "nk": 9, "dqk": 5, "dv": 7}, {"lead": (4,), "nq": 11, "nk": 2}]
        self.compare(function(op), [make(op, **size) for size in sizes], dynamic=True)

    def test_channel_first_without_mask(self):
        inputs = make("pairwise_attention", layout="channel_first")
        self.compare(lambda q, k, v: dnl_ext.disentangled_attention(q, k, v, None, scale=0.3, whiten=None), [inputs])

    def test_without_gradients(self):
        compiled = torch.compile(dnl_ext.disentangled_attention, fullgraph=True, backend="aot_eager")
        inputs = make("disentangled_attention")
        with torch.no_grad():
            assert torch.equal(compiled(*inputs), dnl_ext.disentangled_attention(*inputs))

    def test_a_wrong_shape_is_still_an_error(self):
        q, k, v, m = make("disentangled_attention")
        compiled = torch.compile(dnl_ext.disentangled_attention, fullgraph=True, backend="aot_eager")
        with pytest.raises(Exception, match="key: expected shape"):
            compiled(q, k[..., :-1], v, m)

    @pytest.mark.parametrize("op", ["disentangled_attention"])
    def test_export(self, op):
        class Net(torch.nn.Module):
            def forward(self, *x):
                return function(op)(*x)

        inputs = tuple(make(op))
        exported = torch.export.export(Net(), inputs).module()
        assert torch.equal(exported(*inputs), function(op)(*inputs))


def raw_calls(dtype=torch.float64, layout="contiguous", mask=True, lead=(2,)):
    """Valid calls of every raw operator, by name."""
    q, k, v, m = make("disentangled_attention", dtype=dtype, layout=layout, lead=lead)
    m = m if mask else None
    saved = raw.pairwise_forward(q, k, v, m, 0.5, "channel", True)
    dy = lay_out(torch.randn_like(saved[0]), layout)
    calls = {
        "mean_subtract": (q, -2),
        "softmax": (k,),
        "softmax_backward": (torch.randn_like(k), raw.softmax(k)),
        "whiten_forward": (q, "ln", 0, 1e-5),
        "whiten_backward": (torch.randn_like(q), *raw.whiten_forward(q, "ln", 0, 1e-5), "ln", 0, 1e-5),
        "pairwise_forward": (q, k, v, m, 0.5, "channel", False),
        "pairwise_backward": (dy, q, k, v, m, *saved, 0.5, None, True, True, True, mask),
        "pairwise_double_backward": (dy, q, k, v, m, q, k, v, m, 0.5, "channel", True, True, True, True, mask),
    }
    if mask:
        pooled = raw.unary_forward(m, v)
        calls["unary_forward"] = (m, v)
        calls["unary_backward"] = (torch.randn_like(pooled[0]), m, v, *pooled, True, True)
    return calls


class TestRegistration:
    @pytest.mark.parametrize("name", raw_calls())
    def test_opcheck(self, name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = torch.library.opcheck(getattr(raw, name).default, raw_calls()[name])
        assert set(result.values()) == {"SUCCESS"}

    @pytest.mark.parametrize("name", raw_calls(mask=False))
    def test_opcheck_without_mask(self, name):
        if name.startswith("pairwise"):
            torch.library.opcheck(getattr(raw, name).default, raw_calls(mask=False)[name])

    @pytest.mark.parametrize("name", raw_calls())
    @pytest.mark.parametrize("layout", [*LAYOUTS, "permuted", "expanded"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_fake_results_are_laid_out_as_real_ones(self, name, layout, dtype):
        lead = (2, 3)
        arguments = raw_calls(dtype, layout if layout in LAYOUTS else "contiguous", lead=lead)[name]

        def permute(x):
            if not isinstance(x, torch.Tensor) or x.dim() < 3:
                return x
            if layout == "permuted":
                return x.movedim(0, -1).contiguous().movedim(-1, 0)
            return x[:1].expand_as(x) if layout == "expanded" else x

        arguments = [permute(x) for x in arguments]
        actual = getattr(raw, name)(*arguments)
        mode = FakeTensorMode()
        with mode:
            fake = getattr(raw, name)(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments))
        if actual is None:
            assert fake is None
            return
        actual, fake = ((x,) if isinstance(x, torch.Tensor) else x for x in (actual, fake))
        for a, f in zip(actual, fake, strict=True):
            assert (a.shape, a.stride(), a.dtype, a.device) == (f.shape, f.stride(), f.dtype, f.device)

    def test_every_raw_operator_is_checked(self):
        names = {
            schema.name.removeprefix("dnl_ext::")
            for schema in torch._C._jit_get_all_schemas()
            if schema.name.startswith("dnl_ext::")
        }
        assert names == set(raw_calls())


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
