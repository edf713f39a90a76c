"""Unary softmax and pooling: the term of the attention that does not depend on the query."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import Function

from ._checks import check_alike, check_saved, check_softmax, check_unary
from ._common import (
    REFUSED,
    Differentiable,
    accumulate_type,
    add,
    at_once,
    empty_like_layout,
    gradient_by,
    mark_constant,
    ops,
    register_batching,
    save,
)
from .double_backward import unary_double_backward


class Softmax(Function):
    """P = softmax(x) over the last dimension; dx = P (dP - <P, dP>), and the same map takes dx to dP (forward mode)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return ops.softmax(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        save(ctx, output)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> torch.Tensor:
        (output,) = ctx.saved_tensors
        return _softmax_gradient(grad_output, output)

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor) -> torch.Tensor:
        return SoftmaxGradient.apply(tangent, *ctx.saved_tensors)


class SoftmaxGradient(Function):
    """dx = P (dP - <P, dP>) as a function of dP, in which it is linear and symmetric, and of P.

    By P, where dx meets t: t (dP - <P, dP>) - dP <P, t>. It can be differentiated any number of times.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(grad_output: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return ops.softmax_backward(grad_output, output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        save(ctx, *inputs)

    @staticmethod
    def backward(ctx: Any, tangent: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        grad_output, output = ctx.saved_tensors
        by_output = None
        if ctx.needs_input_grad[1]:
            g, p, t = (x.to(accumulate_type(x.dtype)) for x in (grad_output, output, tangent))
            by_output = (t * (g - (p * g).sum(-1, keepdim=True)) - g * (p * t).sum(-1, keepdim=True)).to(output.dtype)
        return SoftmaxGradient.apply(tangent, output) if ctx.needs_input_grad[0] else None, by_output

    @staticmethod
    def jvp(ctx: Any, tangent_grad: torch.Tensor, tangent_output: torch.Tensor) -> torch.Tensor:
        grad_output, output = ctx.saved_tensors
        g, p, t = (x.to(accumulate_type(x.dtype)) for x in (grad_output, output, tangent_output))
        by_output = t * (g - (p * g).sum(-1, keepdim=True)) - p * (t * g).sum(-1, keepdim=True)
        return SoftmaxGradient.apply(tangent_grad, output) + by_output.to(output.dtype)


_softmax_gradient = gradient_by("softmax_backward", SoftmaxGradient)
softmax: Differentiable = Differentiable("softmax", Softmax)


class UnaryAttention(Function):
    """y = sum_j u_j v_j, u = softmax(m); dv_j = u_j dy and dm_j = u_j (<dy, v_j> - <dy, y>)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(mask_logits: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.unary_forward(mask_logits, value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        save(ctx, *inputs, *output)
        mark_constant(ctx, output[1])  # lse
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad_pooled: torch.Tensor | None, _grad_lse: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if grad_pooled is None:
            return None, None
        need_mask, need_value = ctx.needs_input_grad
        grad_mask, grad_value = _gradient(grad_pooled, *ctx.saved_tensors, need_mask, need_value)
        return grad_mask if need_mask else None, grad_value if need_value else None

    @staticmethod
    def jvp(
        ctx: Any, tangent_mask: torch.Tensor | None, tangent_value: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mask_logits, value, _, lse = ctx.saved_tensors
        return unary_double_backward(None, mask_logits, value, tangent_mask, tangent_value)[0], torch.zeros_like(lse)


class UnaryGradient(Function):
    """(dm, dv) as functions of dy, m and v. It can be differentiated any number of times.

    pooled and lse are functions of m and v, accounted for in the derivatives by those, and get none.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_pooled: torch.Tensor,
        mask_logits: torch.Tensor,
        value: torch.Tensor,
        pooled: torch.Tensor,
        lse: torch.Tensor,
        need_mask: bool,
        need_value: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.unary_backward(grad_pooled, mask_logits, value, pooled, lse, need_mask, need_value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        save(ctx, *inputs[:5])
        ctx.wanted = inputs[5:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, tangent_mask: torch.Tensor | None, tangent_value: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        if tangent_mask is None and tangent_value is None:
            return (None,) * 7
        grad_pooled, mask_logits, value, *_ = ctx.saved_tensors
        grads: Any = unary_double_backward(grad_pooled, mask_logits, value, tangent_mask, tangent_value)
        grads = [x.to(y.dtype) for x, y in zip(grads, (grad_pooled, mask_logits, value), strict=True)]
        return *(x if need else None for x, need in zip(grads, ctx.needs_input_grad, strict=False)), *(None,) * 4

    @staticmethod
    def jvp(
        ctx: Any,
        tangent_grad: torch.Tensor | None,
        tangent_mask: torch.Tensor | None,
        tangent_value: torch.Tensor | None,
        *_: Any,
    ) -> Sequence[torch.Tensor] | None:
        saved = ctx.saved_tensors
        first = second = None
        if tangent_grad is not None:
            first = UnaryGradient.apply(tangent_grad, *saved[1:], *ctx.wanted)
        if first is None or tangent_mask is not None or tangent_value is not None:
            grad_pooled, mask_logits, value = saved[:3]
            absent = value.new_zeros((*value.shape[:-2], 0))  # as the operator returns what is not wanted
            second: Any = unary_double_backward(grad_pooled, mask_logits, value, tangent_mask, tangent_value)[1:]
            second = tuple(
                x.to(value.dtype) if wanted else absent for x, wanted in zip(second, ctx.wanted, strict=True)
            )
        return add(first, second)


_gradient = gradient_by("unary_backward", UnaryGradient)
_pool = Differentiable("unary_forward", UnaryAttention, constants=True)


@torch.library.register_fake("dnl_ext::softmax")
def allocate_softmax(x: torch.Tensor) -> torch.Tensor:
    check_softmax("x", x)
    return empty_like_layout(x, x.shape)


@torch.library.register_fake("dnl_ext::softmax_backward")
def allocate_softmax_backward(grad_output: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    check_softmax("grad_output", grad_output)
    check_alike("output", output, "grad_output", grad_output, grad_output.shape)
    return empty_like_layout(output, output.shape)


@torch.library.register_fake("dnl_ext::unary_forward")
def allocate_unary_forward(mask_logits: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    check_unary(mask_logits, value)
    dtype = accumulate_type(value.dtype)
    pooled = value.new_empty((*value.shape[:-2], value.shape[-1]), dtype=dtype)
    return pooled, value.new_empty(value.shape[:-2], dtype=dtype)


@torch.library.register_fake("dnl_ext::unary_backward")
def allocate_unary_backward(
    grad_pooled: torch.Tensor,
    mask_logits: torch.Tensor,
    value: torch.Tensor,
    pooled: torch.Tensor,
    lse: torch.Tensor,
    need_mask: bool,
    need_value: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_unary(mask_logits, value)
    lead = value.shape[:-2]
    check_saved("grad_pooled", grad_pooled, "value", value, (*lead, value.shape[-1]))
    check_saved("pooled", pooled, "value", value, (*lead, value.shape[-1]))
    check_saved("lse", lse, "value", value, lead)
    return (
        empty_like_layout(mask_logits, mask_logits.shape) if need_mask else value.new_empty((*value.shape[:-2], 0)),
        empty_like_layout(value, value.shape) if need_value else value.new_empty((*value.shape[:-2], 0)),
    )


register_batching("dnl_ext::softmax")(ops.softmax)
register_batching("dnl_ext::softmax_backward")(ops.softmax_backward)
register_batching("dnl_ext::unary_forward")(ops.unary_forward)
register_batching("dnl_ext::unary_backward")(ops.unary_backward)


def unary_softmax(mask_logits: torch.Tensor) -> torch.Tensor:
    """The unary attention weights u_j = softmax_j(m_j), with sums in float32 or wider.

    Args:
        mask_logits: m, tensor (..., Nk) with Nk >= 1, float64, float32, bfloat16 or float16.

    Returns:
        Tensor (..., Nk) of the dtype and dimension order of ``mask_logits``.

    Raises:
        TypeError: the argument is not a tensor.
        ValueError: it is not of a float type, or Nk is 0.
        NotImplementedError: complex, sparse, nested or quantised input.

    Example:
        >>> import torch
        >>> from dnl_ext import unary_softmax
        >>> unary_softmax(torch.tensor([0.0, 0.0, 0.0, 0.0]))
        tensor([0.2500, 0.2500, 0.2500, 0.2500])

    Source: Yin et al., ECCV 2020, equation 10 (second term).
    """
    if at_once(mask_logits):
        try:
            return softmax.direct(torch.is_grad_enabled() and mask_logits.requires_grad, mask_logits)
        except REFUSED:
            pass  # as in disentangled_attention
    check_softmax("mask_logits", mask_logits)
    return softmax(mask_logits)


def unary_attention(mask_logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Pool the values with the unary attention weights: sum_j softmax_j(m_j) v_j, one vector for all queries.

    It takes O(Nk Dv) operations.

    Args:
        mask_logits: m, tensor (..., Nk) with Nk >= 1, float64, float32, bfloat16 or float16.
        value: tensor (..., Nk, Dv) of the same dtype, device and leading dimensions; any strides.

    Returns:
        Tensor (..., Dv) of the dtype of ``value``.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype or device that does not fit.
        NotImplementedError: complex, sparse, nested or quantised input.

    Example:
        >>> import torch
        >>> from dnl_ext import unary_attention
        >>> features = torch.randn(2, 64, 12, 16)  # of a convolution, (B, C, H, W)
        >>> mask_logits = torch.randn(2, 12, 16)
        >>> unary_attention(mask_logits.flatten(1), features.flatten(2).transpose(1, 2)).shape
        torch.Size([2, 64])

    Source: Yin et al., ECCV 2020, equation 10; the same pooling is GCNet's global context (Cao et al., 2019).
    """
    if at_once(mask_logits, value):
        try:
            differentiated = torch.is_grad_enabled() and (mask_logits.requires_grad or value.requires_grad)
            pooled = _pool.direct(differentiated, mask_logits, value)
            return pooled if pooled.dtype == value.dtype else pooled.to(value.dtype)
        except REFUSED:
            pass  # as in disentangled_attention
    check_unary(mask_logits, value)
    return _pool(mask_logits, value)[0].to(value.dtype)
