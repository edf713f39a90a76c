"""Third derivatives: of attention they raise, of all else they are right."""

import pytest
import torch
from cases import ARGUMENTS, ATTENTION
from inputs import function, make
from torch.autograd import gradcheck

import dnl_ext
from dnl_ext import reference

#: Whitenings that divide by a deviation.
DEVIATION = ("in", "ln", "fln")


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
