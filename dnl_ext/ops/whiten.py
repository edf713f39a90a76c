"""Mean subtraction: the whitening of disentangled non-local attention. See :func:`mean_subtract`."""

import torch
from torch.autograd import Function

from ._checks import check_mean
from ._common import empty_like_layout, first_derivative, ops, register_batching

_mean_subtract = first_derivative(ops.mean_subtract)


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


@torch.library.register_fake("dnl_ext::mean_subtract")
def _(x, dim):
    check_mean(x, dim)
    return empty_like_layout(x, x.shape)


@register_batching("dnl_ext::mean_subtract")
def _(x, dim):
    return ops.mean_subtract(x, dim if dim < 0 else dim + 1)


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
    return MeanSubtract.apply(x, dim)
