"""Whitening of query and key. See :func:`mean_subtract`, the paper's, and :func:`whiten`, every one in use."""

import torch
from torch.autograd import Function

from ..reference import check_whiten_name
from ._checks import check_alike, check_mean, check_saved, check_tensor
from ._common import accumulate_type, differentiable, empty_like_layout, first_derivative, ops, register_batching

_mean_subtract = first_derivative(ops.mean_subtract)
_whiten_backward = first_derivative(ops.whiten_backward)

#: Names whose result is divided by a deviation.
DEVIATION = ("in", "ln", "fln")


class MeanSubtract(Function):
    """y = x - mean(x). The map is a symmetric projection, so the gradient is the same map: dx = dy - mean(dy)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, dim):
        return ops.mean_subtract(x, dim)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dim = inputs[1]

    @staticmethod
    def backward(ctx, grad_output):
        return _mean_subtract(grad_output, ctx.dim), None  # dim


_centre = differentiable("mean_subtract", MeanSubtract)


class Whiten(Function):
    """y = (x - mean) rstd over n elements; dx = rstd (dy - mean(dy) - y <dy, y> / (n - 1)), the last term and rstd with
    a deviation only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, name, apart, eps):
        return ops.whiten_forward(x, name, apart, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.name, ctx.apart, ctx.eps = inputs
        ctx.save_for_backward(*output)
        ctx.mark_non_differentiable(output[1])  # rstd
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_output, _grad_rstd):
        if grad_output is None:
            return (None,) * 4
        grad = _whiten_backward(grad_output, *ctx.saved_tensors, ctx.name, ctx.apart, ctx.eps)
        return grad, None, None, None  # name, apart, eps


_standardise = differentiable("whiten_forward", Whiten)


def _check_whiten(x, name, apart, eps):
    check_tensor("x", x, "(..., N, C)")
    check_whiten_name(name, "name")
    if not 0 <= apart <= x.dim() - 2:
        raise ValueError(f"apart: expected a value from 0 to {x.dim() - 2}, got {apart}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")


def _rstd_shape(x, name, apart):
    if name not in DEVIATION:
        return (*x.shape[:-2], 0)
    return {"in": (*x.shape[:-2], x.shape[-1]), "ln": x.shape[:-2], "fln": x.shape[:apart]}[name]


@torch.library.register_fake("dnl_ext::mean_subtract")
def _(x, dim):
    check_mean(x, dim)
    return empty_like_layout(x, x.shape)


@torch.library.register_fake("dnl_ext::whiten_forward")
def _(x, name, apart, eps):
    _check_whiten(x, name, apart, eps)
    return empty_like_layout(x, x.shape), x.new_empty(_rstd_shape(x, name, apart), dtype=accumulate_type(x.dtype))


@torch.library.register_fake("dnl_ext::whiten_backward")
def _(grad_output, output, rstd, name, apart, eps):
    check_tensor("grad_output", grad_output, "(..., N, C)")
    _check_whiten(grad_output, name, apart, eps)
    check_alike("output", output, "grad_output", grad_output, grad_output.shape)
    check_saved("rstd", rstd, "grad_output", grad_output, _rstd_shape(grad_output, name, apart))
    return empty_like_layout(output, output.shape)


@register_batching("dnl_ext::mean_subtract")
def _(x, dim):
    return ops.mean_subtract(x, dim if dim < 0 else dim + 1)


@register_batching("dnl_ext::whiten_forward")
def _(x, name, apart, eps):
    return ops.whiten_forward(x, name, apart + 1, eps)


@register_batching("dnl_ext::whiten_backward")
def _(grad_output, output, rstd, name, apart, eps):
    return ops.whiten_backward(grad_output, output, rstd, name, apart + 1, eps)


def mean_subtract(x, dim=-2):
    """Subtract the mean over one dimension: ``x - x.mean(dim, keepdim=True)``, with sums in float32 or wider.

    Args:
        x: float tensor of any shape and strides with at least one dimension.
        dim: the dimension of the positions. -2 fits (..., N, C), the layout of the attention functions.

    Returns:
        A tensor of the shape, dtype and dimension order of ``x``.

    Raises:
        TypeError: ``x`` is not a tensor or ``dim`` not an int.
        ValueError: ``x`` is not a float tensor or has no dimension ``dim``.
        NotImplementedError: complex, sparse, nested or quantised ``x``; second derivatives.

    Source: Yin et al., "Disentangled Non-Local Neural Networks", ECCV 2020, equation 8 (whitened pairwise term).
    """
    check_mean(x, dim)
    return _centre(x, dim)


def whiten(x, name="channel", *, eps=1e-5):
    """Whiten query or key before their inner products, with sums in float64.

    ===================  =====================  ===========================
    mean over            ``x - mean``           and ``/ sqrt(var + eps)``
    ===================  =====================  ===========================
    positions            channel, in_nostd      in
    channels             spatial
    both, of a sample    ln_nostd               ln
    the whole tensor     fln_nostd              fln
    ===================  =====================  ===========================

    Args:
        x: float tensor (..., N, C) of any strides.
        name: one of the names above; the variance is unbiased, so a mean over one element gives NaN with a deviation.
            None returns ``x`` itself. Under vmap a "whole tensor" is one of the mapped ones.
        eps: added to the variance.

    Returns:
        A tensor of the shape, dtype and dimension order of ``x``.

    Raises:
        TypeError: ``x`` is not a tensor or ``name`` not a string. ValueError: an unknown name, a dtype or shape that
        does not fit, a negative ``eps``. NotImplementedError: complex, sparse, nested or quantised ``x``; second
        derivatives.

    Source: the names and formulae of the paper's segmentation code (NonLocal2d_bn and NonLocal2d_nowd).
    """
    check_tensor("x", x, "(..., N, C)")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: expected a float, got {type(eps).__name__}")
    _check_whiten(x, name, 0, eps)
    if name is None:
        return x
    return _standardise(x, name, 0, float(eps))[0]
