"""torch.func with every operator and with modules: vmap, grad, per-sample gradients, Jacobians, Hessians, jvp."""

import weakref

import pytest
import torch
from cases import ARGUMENTS, ATTENTION
from inputs import function, make
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import dnl_ext
from dnl_ext import reference

every_op = pytest.mark.parametrize("op", ARGUMENTS)
BATCH = 3


def mapped_inputs(op, in_dims, seed=0):
    """Inputs with a dimension of size BATCH where `in_dims` says, none where it says None."""
    inputs = []
    for i, (x, dim) in enumerate(zip(make(op, seed=seed), in_dims, strict=True)):
        if dim is None:
            inputs.append(x)
        else:
            more = torch.randn(BATCH, *x.shape, generator=torch.Generator().manual_seed(i), dtype=x.dtype)
            inputs.append(more.movedim(0, dim))
    return inputs


def loop(f, inputs, in_dims):
    pick = [
        [x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)] for i in range(BATCH)
    ]
    return [f(*x) for x in pick]


def in_dims_of(op):
    """All mapped, each alone, each left out, and mapped dimensions in the middle and at the end."""
    count = len(ARGUMENTS[op])
    choices = {(0,) * count, (1,) * count, (-1,) * count}
    for i in range(count):
        choices.add(tuple(0 if i == j else None for j in range(count)))
        choices.add(tuple(None if i == j else j % 2 for j in range(count)))
    return sorted((c for c in choices if any(dim is not None for dim in c)), key=str)


MAPPED = [(op, in_dims) for op in ARGUMENTS for in_dims in in_dims_of(op)]


class TestVmap:
    @pytest.mark.parametrize(("op", "in_dims"), MAPPED)
    def test_equals_a_loop(self, op, in_dims):
        inputs = mapped_inputs(op, in_dims)
        actual = vmap(function(op), in_dims)(*inputs)
        torch.testing.assert_close(actual, torch.stack(loop(function(op), inputs, in_dims)), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize(("op", "in_dims"), MAPPED)
    def test_gradient_equals_a_loop(self, op, in_dims):
        inputs = mapped_inputs(op, in_dims)
        count = len(inputs)

        def gradient(*x):
            return grad(lambda *x: function(op)(*x).square().sum(), tuple(range(count)))(*x)

        actual = vmap(gradient, in_dims)(*inputs)
        expected = loop(gradient, inputs, in_dims)
        for i in range(count):
            torch.testing.assert_close(actual[i], torch.stack([e[i] for e in expected]), rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize(("op", "in_dims"), MAPPED)
    def test_gradient_through_equals_a_loop(self, op, in_dims):
        """The gradient of a sum of mapped results: inputs that were not mapped collect from all."""
        first, second = ([x.requires_grad_() for x in mapped_inputs(op, in_dims)] for _ in range(2))
        vmap(function(op), in_dims)(*first).square().sum().backward()
        torch.stack(loop(function(op), second, in_dims)).square().sum().backward()
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-11)

    def test_without_mask_logits(self):
        q, k, v = mapped_inputs("pairwise_attention", (0, None, 1))
        actual = vmap(lambda *x: dnl_ext.disentangled_attention(*x, None), (0, None, 1))(q, k, v)
        expected = loop(dnl_ext.pairwise_attention, (q, k, v), (0, None, 1))
        torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-12, atol=1e-12)

    @every_op
    def test_nested(self, op):
        inputs = [torch.stack([torch.stack([x, x + 1]), torch.stack([x + 2, x * 3])]) for x in make(op)]
        actual = vmap(vmap(function(op)))(*inputs)
        expected = function(op)(*inputs)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)

    @every_op
    @pytest.mark.parametrize("dim", [0, 1, -1])
    def test_out_dims(self, op, dim):
        in_dims = (0,) * len(ARGUMENTS[op])
        inputs = mapped_inputs(op, in_dims)
        actual = vmap(function(op), in_dims, dim)(*inputs)
        torch.testing.assert_close(
            actual, torch.stack(loop(function(op), inputs, in_dims), dim), rtol=1e-12, atol=1e-12
        )

    @pytest.mark.parametrize("dim", [0, 1, -1, -2])
    def test_dimensions_of_mean_subtract(self, dim):
        x = torch.randn(3, 4, 5, dtype=torch.float64)
        actual = vmap(lambda x: dnl_ext.mean_subtract(x, dim))(x)
        torch.testing.assert_close(actual, torch.stack([reference.mean_subtract(row, dim) for row in x]))


# ----------------------------------------------------------------------------------------------------------------------
# Jacobians, Hessians and forward mode
# ----------------------------------------------------------------------------------------------------------------------


def assert_alike(actual, expected, tolerance=1e-9):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


class TestTransforms:
    @every_op
    @pytest.mark.parametrize("transform", [jacrev, jacfwd])
    def test_jacobian(self, op, transform):
        inputs = make(op, lead=())
        argnums = tuple(range(len(inputs)))
        assert_alike(transform(function(op), argnums)(*inputs), transform(function(op, reference), argnums)(*inputs))

    @every_op
    @pytest.mark.parametrize(
        "transform", [hessian, lambda f, n: jacrev(jacrev(f, n), n), lambda f, n: jacrev(jacfwd(f, n), n)],
        ids=["jacfwd(jacrev)", "jacrev(jacrev)", "jacrev(jacfwd)"],
    )  # fmt: skip
    def test_hessian(self, op, transform):
        """Of every pair of inputs."""
        inputs = make(op, lead=(), nq=3, nk=4, dqk=2, dv=2)
        argnums = tuple(range(len(inputs)))

        def blocks(ops):
            return transform(lambda *x: function(op, ops)(*x).pow(3).sum(), argnums)(*inputs)

        for actual, expected in zip(blocks(dnl_ext), blocks(reference), strict=True):
            assert_alike(actual, expected)

    @every_op
    def test_jvp(self, op):
        inputs, tangents = tuple(make(op)), tuple(make(op, seed=1))
        assert_alike(jvp(function(op), inputs, tangents), jvp(function(op, reference), inputs, tangents))

    @pytest.mark.parametrize("op", ATTENTION)
    @pytest.mark.parametrize("which", range(4))
    def test_jvp_of_one_input(self, op, which):
        inputs, tangents = make(op, layout="channel_first"), make(op, seed=1)
        if which == len(inputs):
            return

        def along(ops):
            def f(x):
                return function(op, ops)(*inputs[:which], x, *inputs[which + 1 :])

            return jvp(f, (inputs[which],), (tangents[which],))

        assert_alike(along(dnl_ext), along(reference))

    @every_op
    def test_jvp_under_vmap_and_vmap_under_jvp(self, op):
        inputs, tangents = tuple(make(op)), tuple(make(op, seed=1))
        expected = jvp(function(op), inputs, tangents)
        assert_alike(vmap(lambda x, t: jvp(function(op), x, t))(inputs, tangents), expected)
        assert_alike(jvp(vmap(function(op)), inputs, tangents), expected)

    @every_op
    def test_vjp(self, op):
        inputs = make(op)
        y, pull = vjp(function(op), *inputs)
        expected, pull_reference = vjp(function(op, reference), *inputs)
        dy = torch.randn_like(y)
        assert_alike((y, *pull(dy)), (expected, *pull_reference(dy)))

    @every_op
    def test_gradient_penalty_of_each_sample(self, op):
        """vmap over grad over grad."""
        inputs = tuple(make(op, lead=(3,)))

        def penalty(ops):
            def of_one(*x):
                gradients = grad(lambda *x: function(op, ops)(*x).pow(3).sum(), tuple(range(len(x))))(*x)
                return sum(g.pow(2).sum() for g in gradients)

            return vmap(grad(of_one, tuple(range(len(inputs)))))(*inputs)

        assert_alike(penalty(dnl_ext), penalty(reference))

    @pytest.mark.parametrize("op", ["dot_product_attention", "shared_key_logits"])
    def test_without_a_softmax(self, op):
        q, k, v = make("pairwise_attention", nq=3, nk=4)
        inputs = (q, k) if op == "shared_key_logits" else (q, k, v)
        for f in (
            vmap(function(op)),
            vmap(grad(lambda *x: function(op)(*x).pow(3).sum())),
            hessian(lambda *x: function(op)(*x).pow(3).sum()),
        ):
            f(*inputs)
        actual, expected = (
            hessian(lambda *x, ops=ops: function(op, ops)(*x).pow(3).sum())(*inputs) for ops in (dnl_ext, reference)
        )
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)

    def test_concatenation_attention(self):
        q, k, v = make("pairwise_attention", nq=3, nk=4)
        inputs = (q[..., 0], k[..., 0], v)

        def each(ops, transform):
            return transform(lambda *x: ops.concatenation_attention(*x).pow(3).sum())(*inputs)

        for transform in (hessian, jacrev, lambda f: vmap(grad(f))):
            torch.testing.assert_close(each(dnl_ext, transform), each(reference, transform), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_jvp_keeps_the_dtype_and_the_order_of_dimensions(self, dtype):
        inputs = tuple(make("disentangled_attention", dtype=dtype, layout="channel_first"))
        y, along = jvp(dnl_ext.disentangled_attention, inputs, inputs)
        assert along.dtype == dtype and along.stride() == y.stride() and along.stride()[-2] == 1


class TestModules:
    def block(self, **options):
        block = dnl_ext.DisentangledNonLocal2d.mmseg(4, reduction=2, **options).double().eval()
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter)
        return block, {name: p.detach() for name, p in block.named_parameters()}, dict(block.named_buffers())

    def test_per_sample_gradients(self):
        """What vmap of grad is for."""
        block, parameters, buffers = self.block()
        x = torch.randn(3, 4, 3, 2, dtype=torch.float64)

        def loss(parameters, x):
            return functional_call(block, {**buffers, **parameters}, (x.unsqueeze(0),)).square().sum()

        actual = vmap(grad(loss), (None, 0))(parameters, x)
        for i in range(3):
            for name, expected in grad(loss)(parameters, x[i]).items():
                torch.testing.assert_close(actual[name][i], expected, rtol=1e-9, atol=1e-9)

    def test_an_ensemble(self):
        """vmap over stacked parameters."""
        blocks = [self.block()[0] for _ in range(3)]
        parameters, buffers = torch.func.stack_module_state(blocks)
        x = torch.randn(2, 4, 3, 2, dtype=torch.float64)
        actual = vmap(lambda p, b: functional_call(blocks[0], (p, b), (x,)))(parameters, buffers)
        torch.testing.assert_close(actual, torch.stack([block(x) for block in blocks]), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian])
    def test_of_the_input(self, transform):
        block, *_ = self.block()
        plain = dnl_ext.DisentangledNonLocal2d.mmseg(4, reduction=2, backend="reference").double().eval()
        plain.load_state_dict(block.state_dict())
        x = torch.randn(1, 4, 2, 2, dtype=torch.float64)
        of = [transform(lambda x, f=f: f(x).square().mean())(x) for f in (block, plain)]
        torch.testing.assert_close(*of, rtol=1e-9, atol=1e-9)

    def test_jvp_of_the_parameters(self):
        block, parameters, buffers = self.block()
        x = torch.randn(1, 4, 2, 3, dtype=torch.float64)
        tangents = {name: torch.randn_like(p) for name, p in parameters.items()}

        def loss(p):
            return functional_call(block, {**buffers, **p}, (x,)).square().mean()

        _, along = jvp(loss, (parameters,), (tangents,))
        gradients = grad(loss)(parameters)
        torch.testing.assert_close(along, sum((gradients[name] * t).sum() for name, t in tangents.items()))

    def test_linearize(self):
        block, *_ = self.block()
        x = torch.randn(1, 4, 3, 2, dtype=torch.float64)
        _, push = linearize(block, x)
        torch.testing.assert_close(push(torch.ones_like(x)), jvp(block, (x,), (torch.ones_like(x),))[1])


@every_op
def test_what_is_saved_for_forward_mode_is_gone_with_the_call(op):
    """Else a graph would hold its inputs after its backward has freed them."""
    leaves = [x.requires_grad_() for x in make(op)]
    copies = [x * 1 for x in leaves]
    alive = [weakref.ref(x) for x in copies]
    y = function(op)(*copies)
    y.sum().backward()
    del copies
    assert y.grad_fn is not None and all(x() is None for x in alive)
