"""Unary softmax and pooling: the term of the attention that does not depend on the query."""

import torch
from torch.autograd import Function

from ._checks import check_alike, check_saved, check_softmax, check_unary
from ._common import accumulate_type, differentiable, empty_like_layout, first_derivative, ops, register_batching

_softmax_backward = first_derivative(ops.softmax_backward)
_unary_backward = first_derivative(ops.unary_backward)


class Softmax(Function):
    """P = softmax(x) over the last dimension; dx = P * (dP - <P, dP>)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return ops.softmax(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad_output):
        (output,) = ctx.saved_tensors
        return _softmax_backward(grad_output, output)


softmax = differentiable("softmax", Softmax)


class UnaryAttention(Function):
    """y = sum_j u_j v_j, u = softmax(m); dv_j = u_j dy and dm_j = u_j (<dy, v_j> - <dy, y>)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(mask_logits, value):
        return ops.unary_forward(mask_logits, value)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(output[1])  # lse
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_pooled, _grad_lse):
        if grad_pooled is None:
            return None, None
        grad_mask, grad_value = _unary_backward(grad_pooled, *ctx.saved_tensors, *ctx.needs_input_grad)
        need_mask, need_value = ctx.needs_input_grad
        return grad_mask if need_mask else None, grad_value if need_value else None


_pool = differentiable("unary_forward", UnaryAttention)


@torch.library.register_fake("dnl_ext::softmax")
def _(x):
    check_softmax("x", x)
    return empty_like_layout(x, x.shape)


@torch.library.register_fake("dnl_ext::softmax_backward")
def _(grad_output, output):
    check_softmax("grad_output", grad_output)
    check_alike("output", output, "grad_output", grad_output, grad_output.shape)
    return empty_like_layout(output, output.shape)


@torch.library.register_fake("dnl_ext::unary_forward")
def _(mask_logits, value):
    check_unary(mask_logits, value)
    dtype = accumulate_type(value.dtype)
    pooled = value.new_empty((*value.shape[:-2], value.shape[-1]), dtype=dtype)
    return pooled, value.new_empty(value.shape[:-2], dtype=dtype)


@torch.library.register_fake("dnl_ext::unary_backward")
def _(grad_pooled, mask_logits, value, pooled, lse, need_mask, need_value):
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


def unary_softmax(mask_logits):
    """u_j = softmax_j(m_j), the unary attention map, with statistics in float32 or wider.

    Args:
        mask_logits: float tensor (..., Nk) with Nk >= 1.

    Returns:
        Tensor (..., Nk) of the dtype and dimension order of ``mask_logits``.

    Raises:
        TypeError: not a tensor. ValueError: not a float tensor, or Nk = 0.
        NotImplementedError: complex, sparse, nested or quantised input; second derivatives.

    Source: Yin et al., ECCV 2020, equation 10 (second term).
    """
    check_softmax("mask_logits", mask_logits)
    return softmax(mask_logits)


def unary_attention(mask_logits, value):
    """Pool the values with the unary map: sum_j softmax_j(m_j) v_j, one vector for all queries, in O(Nk Dv).

    Args:
        mask_logits: float tensor (..., Nk) with Nk >= 1.
        value: tensor (..., Nk, Dv) of the same dtype, device and leading dimensions; any strides.

    Returns:
        Tensor (..., Dv) of the dtype of ``value``.

    Raises:
        TypeError: not a tensor. ValueError: shape, dtype or device that does not fit.
        NotImplementedError: complex, sparse, nested or quantised input; second derivatives.

    Source: Yin et al., ECCV 2020, equation 10; the same pooling is GCNet's global context (Cao et al., 2019).
    """
    check_unary(mask_logits, value)
    return _pool(mask_logits, value)[0].to(value.dtype)
