"""Second derivatives and forward mode by every road that torch has to them: equal to those of the reference.

What raises instead is in test_second.py, accuracy in test_second_accuracy.py.
"""

import pytest
import torch

import dnl_ext
from dnl_ext import reference

VALUE_OF = {
    "disentangled_attention": lambda ops, x, o: ops.disentangled_attention(x, o["key"], o["value"], o["mask_logits"]),
    "attention by value": lambda ops, x, o: ops.disentangled_attention(o["query"], x.mT @ x, x.mT, o["mask"]),
    "pairwise_attention": lambda ops, x, o: ops.pairwise_attention(x, o["key"], o["value"], whiten=None),
    "pairwise_softmax": lambda ops, x, o: ops.pairwise_softmax(x, o["key"]),
    "unary_attention": lambda ops, x, o: ops.unary_attention(x[..., 0], x),
    "unary_softmax": lambda ops, x, o: ops.unary_softmax(x),
    "mean_subtract": lambda ops, x, o: ops.mean_subtract(x),
}
# Of a sum, whose gradient does not depend on the inputs, and of a square, whose gradient does.
LOSSES = {"sum": lambda y: y.sum(), "square": lambda y: (y**2).sum()}


def gradient_penalty(f, x):
    """The gradient of |df/dx|^2 + |x|^3, as a gradient penalty takes it."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad((g**2).sum() + (x.abs() ** 3).sum(), x)[0]


def gradient_penalty_by_backward(f, x):
    x = x.clone().requires_grad_()
    f(x).backward(create_graph=True)
    penalty = (x.grad**2).sum() + (x.abs() ** 3).sum()
    x.grad = None
    penalty.backward()
    return x.grad


def func_grad_twice(f, x):
    def penalty(x):
        return (torch.func.grad(f)(x) ** 2).sum() + (x.abs() ** 3).sum()

    return torch.func.grad(penalty)(x)


def with_cube(f):
    return lambda x: f(x) + (x.abs() ** 3).sum()


def forward_mode(f, x):
    return torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]


def dual_numbers(f, x):
    with torch.autograd.forward_ad.dual_level():
        y = f(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        return torch.autograd.forward_ad.unpack_dual(y).tangent


SECOND = {
    "create_graph": gradient_penalty,
    "backward(create_graph)": gradient_penalty_by_backward,
    "func.grad of func.grad": func_grad_twice,
    "autograd.functional.hessian": lambda f, x: torch.autograd.functional.hessian(with_cube(f), x),
    "func.hessian": lambda f, x: torch.func.hessian(with_cube(f))(x),
    "jacrev of jacrev": lambda f, x: torch.func.jacrev(torch.func.jacrev(with_cube(f)))(x),
    "autograd.functional.hvp": lambda f, x: torch.autograd.functional.hvp(with_cube(f), x, torch.ones_like(x))[1],
    "autograd.functional.jvp": lambda f, x: torch.autograd.functional.jvp(with_cube(f), x, torch.ones_like(x))[1],
    "func.jvp": forward_mode,
    "dual numbers": dual_numbers,
}


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("name", VALUE_OF)
@pytest.mark.parametrize("loss", LOSSES)
class TestSecondDerivatives:
    def inputs(self):
        generator = torch.Generator().manual_seed(0)
        shapes = {"query": (5, 4), "key": (7, 4), "value": (7, 3), "mask_logits": (7,), "mask": (4,)}
        others = {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}
        return torch.randn(5, 4, generator=generator, dtype=torch.float64), others

    def functions(self, name, loss):
        x, others = self.inputs()
        return x, *(lambda x, ops=ops: LOSSES[loss](VALUE_OF[name](ops, x, others)) for ops in (dnl_ext, reference))

    @pytest.mark.parametrize("method", SECOND)
    def test_are_right(self, name, loss, method):
        x, ours, theirs = self.functions(name, loss)
        torch.testing.assert_close(SECOND[method](ours, x), SECOND[method](theirs, x), rtol=1e-8, atol=1e-8)

    def test_first_derivative_is_right_with_create_graph(self, name, loss):
        x, ours, theirs = self.functions(name, loss)
        x.requires_grad_()
        (actual,) = torch.autograd.grad(ours(x), x, create_graph=True)
        (expected,) = torch.autograd.grad(theirs(x), x)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)

    def test_second_derivative_by_the_output_gradient_is_right(self, name, loss):
        """The double-backward trick: the gradient is linear in dy, and its derivative by dy is the Jacobian."""
        x, others = self.inputs()

        def jvp(ops):
            leaf = x.clone().requires_grad_()
            y = VALUE_OF[name](ops, leaf, others)
            dy = torch.zeros_like(y).requires_grad_()
            (g,) = torch.autograd.grad(y, leaf, dy, create_graph=True)
            return torch.autograd.grad(g, dy, torch.ones_like(g))[0]

        torch.testing.assert_close(jvp(dnl_ext), jvp(reference), rtol=1e-9, atol=1e-9)
