"""Disentangled attention's gradient and its tangent (forward mode), as functions that autograd differentiates in turn.

Their derivatives are the gradient again and halves of one product with a Hessian: see `double_backward.py`.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch.autograd import Function

from . import double_backward as _registers_the_operator  # noqa: F401
from ._common import add, last_derivative, ops, save


def _wanted(results: Any, needs: Iterable[bool]) -> tuple[torch.Tensor | None, ...]:
    return tuple(x if need else None for x, need in zip(results, needs, strict=True))


#: Its inputs; a derivative by them raises.
_no_third_derivative = last_derivative(
    lambda *inputs: tuple(x.view_as(x) for x in inputs), "third derivatives of attention"
)


class AttentionDoubleBackward(Function):
    """`dnl_ext::pairwise_double_backward`: (J t, H t) with H, the Hessian of <dy, y> by x, symmetric.

    It is linear in t: where its results meet (c, d), t gets J^T c + H d, the gradient and H again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, ...]:
        """dy, q, k, v, m; what the forward returned, 5 tensors; tq, tk, tv, tm; scale, whiten; what is wanted, 5."""
        return ops.pairwise_double_backward(*inputs[:5], *inputs[10:])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        save(ctx, *inputs[:14])
        ctx.options, ctx.wanted = inputs[14:16], inputs[16:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad_tangent: torch.Tensor | None, *grads: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad
        first = second = None
        if grad_tangent is not None:
            first = AttentionGradient.apply(grad_tangent, *saved[1:10], *ctx.options, *needs[10:14])
        if first is None or any(g is not None for g in grads):
            second = _double_backward(*saved[:10], *grads, *ctx.options, False, *needs[10:14])[1:]
        # Something must reach _no_third_derivative, if anybody asks.
        zeros = (x.new_zeros(()).expand(x.shape) if need else None for x, need in zip(saved[:5], needs, strict=False))
        by_tangents = _wanted(add(first, second), needs[10:14])
        return *zeros, *(None,) * 5, *by_tangents, *(None,) * 7  # scale, whiten, need_*

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        return _double_backward(*ctx.saved_tensors[:10], *tangents[10:14], *ctx.options, *ctx.wanted)


def _double_backward(*inputs: Any) -> tuple[torch.Tensor, ...]:
    """AttentionDoubleBackward, which cannot be differentiated by dy, q, k, v and m."""
    held = iter(_no_third_derivative(*(x for x in inputs[:5] if x is not None)))
    return AttentionDoubleBackward.apply(*(None if x is None else next(held) for x in inputs[:5]), *inputs[5:])


class AttentionGradient(Function):
    """(dq, dk, dv, dm) as functions of dy, q, k, v and m.

    What the forward saved beside its inputs is a function of them, accounted for in their derivatives, and gets none.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, ...]:
        """dy, q, k, v, m; what the forward returned, 5 tensors; scale, whiten; which of the results are wanted."""
        return ops.pairwise_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        save(ctx, *inputs[:10])
        ctx.options, ctx.wanted = inputs[10:12], inputs[12:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *tangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        needs = ctx.needs_input_grad[:5]
        if all(t is None for t in tangents) or not any(needs):
            return (None,) * 16
        grads = _double_backward(*ctx.saved_tensors, *tangents, *ctx.options, *needs)
        return *_wanted(grads, needs), *(None,) * 11  # what the forward saved, scale, whiten, need_*

    @staticmethod
    def jvp(
        ctx: Any, tangent_grad: torch.Tensor | None, *tangents: torch.Tensor | None
    ) -> Sequence[torch.Tensor] | None:
        saved, tangents = ctx.saved_tensors, tangents[:4]
        first = second = None
        if tangent_grad is not None:
            first = AttentionGradient.apply(tangent_grad, *saved[1:], *ctx.options, *ctx.wanted)
        if first is None or any(t is not None for t in tangents):
            second = _double_backward(*saved, *tangents, *ctx.options, False, *ctx.wanted)[1:]
        return add(first, second)


class AttentionTangent(Function):
    """The derivative of y along (tq, tk, tv, tm), each a tensor of its input's shape or None for zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> torch.Tensor:
        """q, k, v, m; what the forward returned, 5 tensors; tq, tk, tv, tm; scale, whiten."""
        needs = (True, False, False, False, False)
        return ops.pairwise_double_backward(None, *inputs[:4], *inputs[9:], *needs)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        save(ctx, *inputs[:13])
        ctx.options = inputs[13:]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad
        of_inputs = of_tangents = (None,) * 4
        if any(needs[:4]):
            grads = _double_backward(grad, *saved, *ctx.options, False, *needs[:4])
            of_inputs = _wanted(grads[1:], needs[:4])
        if any(needs[9:13]):
            grads = AttentionGradient.apply(grad, *saved[:9], *ctx.options, *needs[9:13])
            of_tangents = _wanted(grads, needs[9:13])
        return *of_inputs, *(None,) * 5, *of_tangents, None, None  # scale, whiten

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> NoReturn:
        raise NotImplementedError(
            "dnl_ext: forward mode over forward mode is not implemented for attention; take jacfwd of jacrev"
        )
