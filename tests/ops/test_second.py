"""Second derivatives of every operator and block: double backward and forward mode, values, and calls that raise.

Their accuracy and memory is in test_second_accuracy.py, third derivatives are in test_third.py.
"""

import itertools

import pytest
import torch
from cases import ARGUMENTS, ATTENTION
from inputs import LAYOUTS, function, make
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import dnl_ext
from dnl_ext import reference
from dnl_ext.ops import _blocks

every_op = pytest.mark.parametrize("op", ARGUMENTS)


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
