"""Second derivatives of every operator: double backward and forward mode, values, errors, memory; what raises."""

import dataclasses
import itertools

import accuracy
import cases
import pytest
import test_memory
import torch
from cases import ARGUMENTS, ATTENTION
from inputs import LAYOUTS, function, make
from toolchain import needs_gpu
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import dnl_ext
from dnl_ext import reference
from dnl_ext.ops import _blocks

every_op = pytest.mark.parametrize("op", ARGUMENTS)
DEVIATION = ("in", "ln", "fln")


def masks(count):
    """Every non-empty choice of `count` things."""
    return [mask for mask in itertools.product((True, False), repeat=count) if any(mask)]


def check(f, inputs, fast_mode=True):
    """gradcheck of the gradient, in both modes, and of the tangent."""
    assert gradcheck(f, inputs, check_forward_ad=True, fast_mode=fast_mode)
    assert gradgradcheck(f, inputs, check_fwd_over_rev=True, fast_mode=fast_mode)


class TestGradgradcheck:
    @pytest.mark.parametrize(("op", "mask"), [(op, mask) for op, n in ARGUMENTS.items() for mask in masks(len(n))])
    def test_every_mask(self, op, mask):
        check(function(op), [x.requires_grad_(need) for x, need in zip(make(op), mask, strict=True)])

    @every_op
    @pytest.mark.parametrize("layout", LAYOUTS[1:])
    def test_layouts(self, op, layout):
        check(function(op), [x.requires_grad_() for x in make(op, layout=layout)])

    @pytest.mark.parametrize("op", [*ATTENTION, "pairwise_softmax"])
    @pytest.mark.parametrize("options", [{"whiten": None}, {"scale": -1.25}, {"whiten": "spatial"}, {"whiten": "ln"}])
    def test_options(self, op, options):
        check(lambda *x: function(op)(*x, **options), [x.requires_grad_() for x in make(op)])

    @pytest.mark.parametrize("name", reference.WHITEN_NAMES)
    def test_whitenings(self, name):
        check(lambda x: dnl_ext.whiten(x, name), [x.requires_grad_() for x in make("whiten")], fast_mode=False)

    @pytest.mark.parametrize("dim", [0, -1])
    def test_dimensions_of_mean_subtract(self, dim):
        check(lambda x: dnl_ext.mean_subtract(x, dim), [x.requires_grad_() for x in make("mean_subtract")])

    @every_op
    @pytest.mark.parametrize("lead", [(), (2, 1, 3)])
    def test_leading_dimensions(self, op, lead):
        check(function(op), [x.requires_grad_() for x in make(op, lead=lead)])

    @every_op
    def test_sizes_of_one(self, op):
        check(function(op), [x.requires_grad_() for x in make(op, nq=1, nk=1, dqk=1, dv=1)])

    @pytest.mark.parametrize("op", ["disentangled_attention", "unary_attention"])
    def test_every_entry(self, op):
        check(function(op), [x.requires_grad_() for x in make(op, lead=())], fast_mode=False)

    @pytest.mark.parametrize("op", ATTENTION)
    def test_of_a_tangent_by_backward(self, op):
        """Reverse over forward mode: the tangent's gradient, by inputs and by tangents."""
        inputs, tangents = make(op), make(op, seed=1)

        def tangent(*x):
            with forward_ad.dual_level():
                duals = [forward_ad.make_dual(*pair) for pair in zip(x[: len(inputs)], x[len(inputs) :], strict=True)]
                return forward_ad.unpack_dual(function(op)(*duals)).tangent

        assert gradcheck(tangent, [x.requires_grad_() for x in (*inputs, *tangents)], fast_mode=True)


def second(f, inputs, dy, cotangents, needs=None, kept=None):
    """Derivatives of <cotangents, gradients of f> by dy and the inputs that `needs` names; zero where unconnected.

    Of the gradients only those that `kept` names are used. 16-bit inputs stay so.
    """
    needs, kept = (choice or (True,) * len(inputs) for choice in (needs, kept))
    leaves = [x.detach().clone().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
    wanted = [x for x in leaves if x.requires_grad]
    dy = dy.detach().clone().requires_grad_()
    gradients = torch.autograd.grad(f(*leaves), wanted, dy, create_graph=True)
    gradients, cotangents = ([x for x, keep in zip(xs, kept, strict=False) if keep] for xs in (gradients, cotangents))
    results = torch.autograd.grad(gradients, [dy, *wanted], cotangents, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip((dy, *wanted), results, strict=True)]


class TestAgainstTheReference:
    def compare(self, op, ours, theirs, inputs, needs=None, kept=None):
        with torch.no_grad():
            dy = torch.randn_like(ours(*inputs))
        names = [x for x, need in zip(inputs, needs or (True,) * len(inputs), strict=True) if need]
        cotangents = [torch.randn_like(x) for x in names]
        actual, expected = (second(f, inputs, dy, cotangents, needs, kept) for f in (ours, theirs))
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)

    @every_op
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_every_choice_of_gradients(self, op, layout):
        """Some gradients are not used further, some inputs do not require one."""
        inputs = make(op, nq=9, nk=13, dqk=5, dv=6, layout=layout)
        for kept in masks(len(inputs)):
            self.compare(op, function(op), function(op, reference), inputs, kept=kept)
        for needs in masks(len(inputs)):
            self.compare(op, function(op), function(op, reference), inputs, needs=needs)

    @pytest.mark.parametrize("mask", [True, False])
    @pytest.mark.parametrize("whiten", ["channel", None, "ln"])
    @pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
    def test_in_blocks(self, mask, whiten, lead, monkeypatch):
        """Blocks of 1 row, of some rows of a batch element, and of some batch elements, all against one."""
        op = ATTENTION[0] if mask else ATTENTION[1]
        inputs = make(op, lead=lead, nq=7, nk=11, dqk=5, dv=6)
        for elements in (1, 3 * 11, 2 * 7 * 11 + 5):
            monkeypatch.setitem(_blocks.BLOCK, "cpu", elements)
            self.compare(
                op,
                lambda *x: function(op)(*x, whiten=whiten),
                lambda *x: function(op, reference)(*x, whiten=whiten),
                inputs,
            )

    @pytest.mark.parametrize("sizes", [(1, 5, 3), (3, 1000, 7), (6, 7, 1), (2, 0, 3), (0, 4, 3)])
    @pytest.mark.parametrize("elements", [1, 20, 50, 10**6])
    def test_blocks_cover_the_map_once(self, sizes, elements, monkeypatch):
        monkeypatch.setitem(_blocks.BLOCK, "cpu", elements)
        batches, queries, keys = sizes
        seen = torch.zeros(batches, queries)
        for batch, rows in _blocks.blocks(batches, queries, keys, "cpu"):
            seen[batch, rows] += 1
            assert seen[batch, rows].numel() * keys <= max(elements, keys)
        assert (seen == 1).all()

    @pytest.mark.parametrize("op", ATTENTION)
    @pytest.mark.parametrize("sizes", [{"lead": (0,)}, {"nq": 0}, {"dv": 0}], ids=str)
    def test_of_nothing(self, op, sizes):
        # The reference's mean of no queries is NaN, in a tensor of none.
        inputs = make(op, **sizes)
        dy = torch.randn_like(function(op)(*inputs))
        for x in second(function(op), inputs, dy, [torch.randn_like(x) for x in inputs]):
            assert x.isfinite().all()
            assert sizes == {"dv": 0} or not x.any()

    def test_gradient_of_queries_alone_is_linear_in_dy(self):
        """The double-backward trick: the derivative by dy is J t."""
        inputs = make("disentangled_attention")
        tangents = make("disentangled_attention", seed=1)
        along = torch.func.jvp(reference.disentangled_attention, tuple(inputs), tuple(tangents))[1]
        actual = second(dnl_ext.disentangled_attention, inputs, torch.zeros_like(along), tangents)[0]
        torch.testing.assert_close(actual, along, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("op", ["dot_product_attention", "shared_key_logits", "concatenation_attention"])
    def test_without_a_softmax(self, op):
        q, k, v = make("pairwise_attention", nq=6, nk=9)
        inputs = {"shared_key_logits": (q, k), "concatenation_attention": (q[..., 0], k[..., 0], v)}.get(op, (q, k, v))
        self.compare(op, function(op), function(op, reference), inputs)
        check(function(op), [x.clone().requires_grad_() for x in inputs])

    def test_results_have_the_order_of_dimensions_of_their_inputs(self):
        inputs = make("disentangled_attention", layout="channel_first")
        dy = torch.randn_like(dnl_ext.disentangled_attention(*inputs))
        cotangents = [torch.randn_like(x) for x in inputs]
        leaves = [x.requires_grad_() for x in inputs]
        gradients = torch.autograd.grad(dnl_ext.disentangled_attention(*leaves), leaves, dy, create_graph=True)
        for x, g in zip(leaves, torch.autograd.grad(gradients, leaves, cotangents), strict=True):
            assert g.stride() == x.stride()


# ----------------------------------------------------------------------------------------------------------------------
# Errors: three times that of plain PyTorch, differentiated twice in the same dtype
# ----------------------------------------------------------------------------------------------------------------------


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


# ----------------------------------------------------------------------------------------------------------------------
# Memory: a process of its own, as in test_memory.py
# ----------------------------------------------------------------------------------------------------------------------

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


# ----------------------------------------------------------------------------------------------------------------------
# Third derivatives, modules, wrong calls
# ----------------------------------------------------------------------------------------------------------------------


def third(f, inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(f(*inputs).pow(3).sum(), inputs, create_graph=True)
    gradients = torch.autograd.grad(sum(g.pow(2).sum() for g in gradients), inputs, create_graph=True)
    return torch.autograd.grad(sum(g.pow(2).sum() for g in gradients), inputs)


class TestThirdDerivatives:
    @pytest.mark.parametrize("op", ATTENTION)
    def test_of_attention_raise(self, op):
        with pytest.raises(NotImplementedError, match="third derivatives of attention"):
            third(function(op), make(op))

    @pytest.mark.parametrize("op", ATTENTION)
    def test_of_attention_raise_in_forward_mode(self, op):
        inputs = tuple(make(op))
        hessian = torch.func.jacrev(torch.func.jacrev(lambda *x: function(op)(*x).sum()))
        with pytest.raises(NotImplementedError, match="third derivatives of attention"):
            torch.func.jvp(hessian, inputs, inputs)

    @pytest.mark.parametrize("op", ATTENTION)
    def test_forward_over_forward_raises(self, op):
        inputs = tuple(make(op))

        def tangent(*x):
            return torch.func.jvp(function(op), x, inputs)[1]

        with pytest.raises(NotImplementedError, match="jacfwd of jacrev"):
            torch.func.jvp(tangent, inputs, inputs)

    @pytest.mark.parametrize("op", ATTENTION)
    def test_a_third_backward_by_the_direction_alone_is_right(self, op):
        """A double backward is linear in its direction: torch.autograd.functional.hvp differentiates it by that."""
        inputs = make(op)
        dy, cotangents = torch.randn(2, 4, 2, dtype=torch.float64), make(op, seed=1)

        def along(ops, *directions):
            leaves = [x.clone().requires_grad_() for x in inputs]
            gradients = torch.autograd.grad(function(op, ops)(*leaves), leaves, dy, create_graph=True)
            return torch.autograd.grad(gradients, leaves, directions, create_graph=True)

        assert gradcheck(lambda *x: along(dnl_ext, *x), [x.requires_grad_() for x in cotangents], check_forward_ad=True)

    @pytest.mark.parametrize("op", [op for op in ARGUMENTS if op not in ATTENTION])
    def test_of_others_are_right(self, op):
        for actual, expected in zip(*(third(function(op, ops), make(op)) for ops in (dnl_ext, reference)), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)

    @pytest.mark.parametrize("name", DEVIATION)
    def test_of_whitening_with_a_deviation_are_right(self, name):
        actual, expected = (
            third(lambda x, ops=ops: ops.whiten(x, name), make("whiten")) for ops in (dnl_ext, reference)
        )
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


class TestModules:
    BLOCKS = (
        ("mmseg", lambda backend: dnl_ext.DisentangledNonLocal2d.mmseg(4, reduction=1, backend=backend)),
        ("official", lambda backend: dnl_ext.DisentangledNonLocal2d.official(4, backend=backend)),
        ("whitened by ln", lambda backend: dnl_ext.DisentangledNonLocal2d(4, whiten="ln", norm=None, backend=backend)),
        ("shared key", lambda backend: dnl_ext.DisentangledNonLocal2d(4, variant="dnl_shared_key", backend=backend)),
        ("unary", lambda backend: dnl_ext.DisentangledNonLocal2d(4, variant="unary", norm=None, backend=backend)),
        ("concatenation", lambda backend: dnl_ext.NonLocal2d(4, reduction=1, mode="concatenation", backend=backend)),
        ("context", lambda backend: dnl_ext.GlobalContext2d(4, 1.0, backend=backend)),
    )

    @pytest.mark.parametrize(("name", "make_block"), BLOCKS, ids=[name for name, _ in BLOCKS])
    def test_a_gradient_penalty(self, name, make_block):
        """The gradient of |dy/dx|^2 by every parameter."""
        blocks = [make_block(backend).double().train() for backend in ("fused", "reference")]
        for parameter in blocks[0].parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        blocks[1].load_state_dict(blocks[0].state_dict())
        x = torch.randn(2, 4, 4, 3, dtype=torch.float64)
        for block in blocks:
            leaf = x.clone().requires_grad_()
            (g,) = torch.autograd.grad(block(leaf).square().sum(), leaf, create_graph=True)
            g.square().sum().backward()
        for (key, ours), theirs in zip(blocks[0].named_parameters(), blocks[1].parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None), key
            if ours.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-8, msg=key)

    def test_a_gradient_penalty_trains(self):
        block = dnl_ext.DisentangledNonLocal2d(4, norm=None)
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        optimizer = torch.optim.Adam(block.parameters(), 1e-2)
        x = torch.randn(2, 4, 5, 4)
        losses = []
        for _ in range(20):
            leaf = x.clone().requires_grad_()
            (g,) = torch.autograd.grad(block(leaf).square().sum(), leaf, create_graph=True)
            loss = g.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]


class TestWrongCalls:
    def call(self, **changes):
        q, k, v, m = make("disentangled_attention")
        arguments = {
            "grad_output": torch.randn(2, 4, 2, dtype=torch.float64),
            "query": q, "key": k, "value": v, "mask_logits": m,
            "tangent_query": q, "tangent_key": k, "tangent_value": v, "tangent_mask": m, "scale": 0.5,
            "whiten": "channel", "need_output": True, "need_query": True, "need_key": True, "need_value": True,
            "need_mask": True,
        }  # fmt: skip
        return torch.ops.dnl_ext.pairwise_double_backward(**{**arguments, **changes})

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"grad_output": torch.zeros(2, 4, 3).double()}, ValueError, r"^grad_output: expected shape \(2, 4, 2\)"),
            ({"grad_output": None}, ValueError, "^grad_output: expected a tensor where more"),
            ({"tangent_key": torch.zeros(2, 5, 3)}, ValueError, "^tangent_key: expected the dtype of query"),
            ({"mask_logits": None}, ValueError, "^tangent_mask: expected None without mask_logits"),
            ({"whiten": "ln"}, ValueError, "^whiten: expected one of 'channel', None, got 'ln'"),
            ({"key": torch.zeros(2, 5, 2).double()}, ValueError, "^key: expected shape"),
        ],
        ids=str,
    )
    def test_names_the_argument(self, changes, error, message):
        with pytest.raises(error, match=message):
            self.call(**changes)
