"""Whitening of query and key. See :func:`mean_subtract`, the paper's, and :func:`whiten`, every one in use."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import Function

from ..reference import check_whiten_name
from ..types import Whitening
from ._checks import check_alike, check_mean, check_saved, check_tensor
from ._common import (
    REFUSED,
    Differentiable,
    accumulate_type,
    at_once,
    empty_like_layout,
    gradient_by,
    ops,
    register_batching,
    save,
)

#: Names whose result is divided by a deviation.
DEVIATION = ("in", "ln", "fln")


class MeanSubtract(Function):
    """y = x - mean(x). The map is a symmetric projection: it takes dy to dx, and a tangent of x to that of y."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, dim: int) -> torch.Tensor:
        return ops.mean_subtract(x, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.dim = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _centre_gradient(grad_output, ctx.dim), None  # dim

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, _: Any) -> torch.Tensor:
        return MeanSubtract.apply(tangent, ctx.dim)


_centre_gradient = gradient_by("mean_subtract", MeanSubtract)
_centre = Differentiable("mean_subtract", MeanSubtract)


class Whiten(Function):
    """y = (x - mean) rstd over n elements; dx = rstd (dy - mean(dy) - y <dy, y> / (n - 1)), the last term and rstd with
    a deviation only. The same map takes a tangent of x to that of y. d rstd / dx = -rstd^2 y / (n - 1)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, name: str, apart: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.whiten_forward(x, name, apart, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        ctx.options = inputs[1:]
        save(ctx, *output)
        if torch.compiler.is_compiling():  # elsewhere WhitenGradient differentiates rstd
            ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad_output: torch.Tensor | None, grad_rstd: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, None, None, None]:
        output, rstd = ctx.saved_tensors
        grad = None
        if grad_output is not None:
            grad = _gradient(grad_output, output, rstd, *ctx.options)
        if grad_rstd is not None and ctx.options[0] in DEVIATION and not torch.compiler.is_compiling():
            group = Group(output, *ctx.options[:2])
            through = (-output * group.expand(grad_rstd * rstd**2) / (group.count - 1)).to(output.dtype)
            grad = through if grad is None else grad + through
        return grad, None, None, None  # name, apart, eps

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        output, rstd = ctx.saved_tensors
        along = torch.zeros_like(rstd)
        if ctx.options[0] in DEVIATION:
            group = Group(output, *ctx.options[:2])
            along = -(rstd**2) * group.covariance(group.centred(tangent), output).reshape(rstd.shape)
        return WhitenGradient.apply(tangent, output, rstd, *ctx.options), along


class WhitenGradient(Function):
    """dx as a function of dy, in which it is linear and symmetric, and with a deviation of y and rstd.

    With s = <dy, y> / (n - 1), r = rstd and where dx meets t: by y, -r (t s + dy <t, y> / (n - 1)); by r,
    <t, dy - mean(dy) - y s>. It can be differentiated any number of times.

    t and dy lose their means first. That changes nothing, for the backward of y takes a mean from what comes by y, but
    that their products with y no longer feel that y, rounded to 16 bits, does not quite sum to zero.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_output: torch.Tensor, output: torch.Tensor, rstd: torch.Tensor, name: str, apart: int, eps: float
    ) -> torch.Tensor:
        return ops.whiten_backward(grad_output, output, rstd, name, apart, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        save(ctx, *inputs[:3])
        ctx.options = inputs[3:]

    @staticmethod
    def backward(ctx: Any, tangent: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_output, output, rstd = ctx.saved_tensors
        need_grad, *need_others = ctx.needs_input_grad[:3]
        by_grad = WhitenGradient.apply(tangent, output, rstd, *ctx.options) if need_grad else None
        by_output = by_rstd = None
        if ctx.options[0] in DEVIATION and any(need_others):
            group = Group(output, *ctx.options[:2])
            g, y, t = group.centred(grad_output), group.wide(output), group.centred(tangent)
            s = group.covariance(g, y)
            by_output = (-group.expand(rstd) * (t * s + g * group.covariance(t, y))).to(output.dtype)
            by_rstd = group.sum(t * (g - y * s)).reshape(rstd.shape)
        return by_grad, by_output, by_rstd, None, None, None  # name, apart, eps

    @staticmethod
    def jvp(
        ctx: Any, tangent_grad: torch.Tensor, tangent_output: torch.Tensor, tangent_rstd: torch.Tensor, *_: Any
    ) -> torch.Tensor:
        grad_output, output, rstd = ctx.saved_tensors
        total = WhitenGradient.apply(tangent_grad, output, rstd, *ctx.options)
        if ctx.options[0] not in DEVIATION:
            return total
        group = Group(output, *ctx.options[:2])
        g, y, t = group.centred(grad_output), group.wide(output), group.wide(tangent_output)
        s = group.covariance(g, y)
        by_output = -group.expand(rstd) * (t * s + y * group.covariance(g, t))
        by_rstd = group.expand(tangent_rstd) * (g - y * s)
        return total + (by_output + by_rstd).to(output.dtype)


class Group:
    """The elements of x (..., N, C) that share a mean under a name: sums over them, in the accumulate type."""

    def __init__(self, x: torch.Tensor, name: str, apart: int) -> None:
        everything = tuple(range(apart - x.dim(), 0))
        dims = {"spatial": (-1,), "ln_nostd": (-2, -1), "ln": (-2, -1), "fln_nostd": everything, "fln": everything}
        self.dims: tuple[int, ...] = dims.get(name, (-2,))
        self.count: int = math.prod(x.shape[dim] for dim in self.dims)
        self.shape: list[int] = [1 if i - x.dim() in self.dims else n for i, n in enumerate(x.shape)]

    @staticmethod
    def wide(x: torch.Tensor) -> torch.Tensor:
        return x.to(accumulate_type(x.dtype))

    def expand(self, rstd: torch.Tensor) -> torch.Tensor:
        """rstd, one number a group, as it multiplies x."""
        return rstd.reshape(self.shape)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(x).sum(self.dims, keepdim=True)

    def centred(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(x) - self.sum(x) / self.count

    def covariance(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """<x, y> / (n - 1) of two whose means are zero, as the unbiased variance divides."""
        return self.sum(self.wide(x) * self.wide(y)) / (self.count - 1)


_gradient = gradient_by("whiten_backward", WhitenGradient)
_standardise = Differentiable("whiten_forward", Whiten)


def _check_whiten(x: torch.Tensor, name: str | None, apart: int, eps: float) -> None:
    check_tensor("x", x, "(..., N, C)")
    check_whiten_name(name, "name")
    if not 0 <= apart <= x.dim() - 2:
        raise ValueError(f"apart: expected a value from 0 to {x.dim() - 2}, got {apart}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")


def _rstd_shape(x: torch.Tensor, name: str, apart: int) -> Sequence[int]:
    if name not in DEVIATION:
        return (*x.shape[:-2], 0)
    return {"in": (*x.shape[:-2], x.shape[-1]), "ln": x.shape[:-2], "fln": x.shape[:apart]}[name]


@torch.library.register_fake("dnl_ext::mean_subtract")
def allocate_mean_subtract(x: torch.Tensor, dim: int) -> torch.Tensor:
    check_mean(x, dim)
    return empty_like_layout(x, x.shape)


@torch.library.register_fake("dnl_ext::whiten_forward")
def allocate_whiten_forward(x: torch.Tensor, name: str, apart: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    _check_whiten(x, name, apart, eps)
    return empty_like_layout(x, x.shape), x.new_empty(_rstd_shape(x, name, apart), dtype=accumulate_type(x.dtype))


@torch.library.register_fake("dnl_ext::whiten_backward")
def allocate_whiten_backward(
    grad_output: torch.Tensor, output: torch.Tensor, rstd: torch.Tensor, name: str, apart: int, eps: float
) -> torch.Tensor:
    check_tensor("grad_output", grad_output, "(..., N, C)")
    _check_whiten(grad_output, name, apart, eps)
    check_alike("output", output, "grad_output", grad_output, grad_output.shape)
    check_saved("rstd", rstd, "grad_output", grad_output, _rstd_shape(grad_output, name, apart))
    return empty_like_layout(output, output.shape)


@register_batching("dnl_ext::mean_subtract")
def _(x: torch.Tensor, dim: int) -> torch.Tensor:
    return ops.mean_subtract(x, dim if dim < 0 else dim + 1)


@register_batching("dnl_ext::whiten_forward")
def _(x: torch.Tensor, name: str, apart: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.whiten_forward(x, name, apart + 1, eps)


@register_batching("dnl_ext::whiten_backward")
def _(
    grad_output: torch.Tensor, output: torch.Tensor, rstd: torch.Tensor, name: str, apart: int, eps: float
) -> torch.Tensor:
    return ops.whiten_backward(grad_output, output, rstd, name, apart + 1, eps)


def mean_subtract(x: torch.Tensor, dim: int = -2) -> torch.Tensor:
    """Subtract the mean over one dimension: ``x - x.mean(dim, keepdim=True)``, with sums in float32 or wider.

    Args:
        x: float64, float32, bfloat16 or float16 tensor of any shape and strides with at least one dimension.
        dim: the dimension of the positions. -2 fits (..., N, C), the layout of the attention functions.

    Returns:
        A tensor of the shape, dtype and dimension order of ``x``.

    Raises:
        TypeError: ``x`` is not a tensor or ``dim`` not an int.
        ValueError: ``x`` is not of a float type or has no dimension ``dim``.
        NotImplementedError: complex, sparse, nested or quantised ``x``.

    Example:
        >>> import torch
        >>> from dnl_ext import mean_subtract
        >>> mean_subtract(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))  # two positions of two channels
        tensor([[ -1., -10.],
                [  1.,  10.]])

    Source: Yin et al., "Disentangled Non-Local Neural Networks", ECCV 2020, equation 8 (whitened pairwise term).
    """
    if type(dim) is int and at_once(x):
        try:
            return _centre.direct(torch.is_grad_enabled() and x.requires_grad, x, dim)
        except REFUSED:
            pass  # as in disentangled_attention
    check_mean(x, dim)
    return _centre(x, dim)


def whiten(x: torch.Tensor, name: Whitening | None = "channel", *, eps: float = 1e-5) -> torch.Tensor:
    """Whiten query or key before their inner products: subtract a mean and, for some names, divide by the deviation.

    What a mean, and a variance, are taken over is in the name:

    ===================  =====================  ===========================
    mean over            ``x - mean``           and ``/ sqrt(var + eps)``
    ===================  =====================  ===========================
    positions            channel, in_nostd      in
    channels             spatial
    both, of a sample    ln_nostd               ln
    the whole tensor     fln_nostd              fln
    ===================  =====================  ===========================

    Sums are float64.

    Args:
        x: float64, float32, bfloat16 or float16 tensor (..., N, C) of N positions and C channels, any strides.
        name: one of the names above; ``"channel"`` and ``"in_nostd"`` are the same. None returns ``x`` itself. The
            variance is unbiased, so the three names that divide by a deviation give NaN over a single element. Under
            torch.func.vmap "the whole tensor" is one of the mapped ones.
        eps: added to the variance.

    Returns:
        A tensor of the shape, dtype and dimension order of ``x``.

    Raises:
        TypeError: ``x`` is not a tensor, ``name`` not a string or ``eps`` not a number.
        ValueError: an unknown name, a dtype or shape that does not fit, a negative ``eps``.
        NotImplementedError: complex, sparse, nested or quantised ``x``.

    Example:
        >>> import torch
        >>> from dnl_ext import whiten
        >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])  # two positions of two channels
        >>> whiten(x, "spatial")
        tensor([[ -4.5000,   4.5000],
                [-13.5000,  13.5000]])
        >>> whiten(x, "in")
        tensor([[-0.7071, -0.7071],
                [ 0.7071,  0.7071]])

    Source: the names and formulae of the paper's segmentation code (NonLocal2d_bn and NonLocal2d_nowd).
    """
    if type(eps) is float and eps >= 0 and type(name) is str and at_once(x):
        try:
            differentiated = torch.is_grad_enabled() and x.requires_grad
            return _standardise.direct(differentiated, x, name, 0, eps)[0]
        except REFUSED:
            pass  # as in disentangled_attention
    check_tensor("x", x, "(..., N, C)")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: expected a float, got {type(eps).__name__}")
    _check_whiten(x, name, 0, eps)
    if name is None:
        return x
    return _standardise(x, name, 0, float(eps))[0]
