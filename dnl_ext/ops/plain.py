"""Every operator in plain PyTorch: for devices without kernels, and for all where the kernels are left out.

They are registered for every backend at once (CompositeExplicitAutograd), where a kernel of the backend's own comes
first. Each starts with the operator's fake implementation, which checks the arguments and allocates the results, so
that errors, types and strides are those of the kernels. Whitening, softmax and the unary term are here, the pairwise
term is in `plain_pairwise.py`.

Sums, statistics and products are in the accumulate type, and results are rounded once. Means and what is one number a
row are in float64 where the device has it.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

from .._load import LEFT_OUT
from ._common import accumulate_type, sum_type, without_autocast
from .double_backward import less_mean_under
from .unary import allocate_softmax, allocate_softmax_backward, allocate_unary_backward, allocate_unary_forward
from .whiten import (
    DEVIATION,
    Group,
    allocate_mean_subtract,
    allocate_whiten_backward,
    allocate_whiten_forward,
)

_library = torch.library.Library("dnl_ext", "FRAGMENT")


def kernel(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as operator `name` on every device without a kernel of its own."""

    def register(function):
        @functools.wraps(function)
        def run(*args):
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            if not tensors:
                return function(*args)  # which says what is wrong with None
            _say_so(tensors[0].device.type)
            # Derivatives are the operator's business, and autocast would round the products.
            with torch._C._AutoDispatchBelowAutograd(), without_autocast(tensors[0]):
                return function(*args)

        _library.impl(name, run, "CompositeExplicitAutograd")
        return function

    return register


_said = LEFT_OUT.startswith("DNL_EXT_KERNELS")  # who asked for it need not be told


def _say_so(device: str) -> None:
    """One warning a process."""
    global _said
    if not _said:
        _said = True
        why = LEFT_OUT or f"there are none for {device} tensors in this build"
        warnings.warn(
            f"dnl_ext computes as plain PyTorch, linear in memory but slower than by kernels: {why}. "
            "dnl_ext.show_config() has more.",
            stacklevel=3,
        )


def mean(x: torch.Tensor, dims: int | tuple[int, ...]) -> torch.Tensor:
    """The mean of `x` over `dims`, which are kept, in :func:`sum_type`.

    What a mean is off by is the same for all positions and does not average out. Where the sum is of the type of `x`
    itself, the mean of what is left of `x` corrects it.
    """
    wide = x.to(sum_type(x))
    first = wide.mean(dims, keepdim=True)
    if wide.dtype != accumulate_type(x.dtype):
        return first
    rest = (wide - first).mean(dims, keepdim=True)
    return torch.where(rest.isfinite(), first + rest, first)


def centred(x: torch.Tensor, spoil: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` (..., N, C) less its mean over positions, and the mean (..., 1, C), in the accumulate type.

    Where centring is ours and not the caller's, an element that is not finite must not `spoil` the others.
    """
    wide = accumulate_type(x.dtype)
    of = mean(x, -2).to(wide)
    of = of if spoil else torch.where(of.isfinite(), of, 0.0)
    return x.to(wide) - of, of


@kernel("mean_subtract")
def mean_subtract(x: torch.Tensor, dim: int) -> torch.Tensor:
    output = allocate_mean_subtract(x, dim)
    wide = accumulate_type(x.dtype)
    return output.copy_(x.to(wide) - mean(x, dim).to(wide))


@kernel("whiten_forward")
def whiten_forward(x: torch.Tensor, name: str, apart: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    output, rstd = allocate_whiten_forward(x, name, apart, eps)
    if x.numel() == 0:
        return output, rstd.zero_()
    wide, group = accumulate_type(x.dtype), Group(x, name, apart)
    means = mean(x, group.dims)
    result = x.to(wide) - means.to(wide)
    if name in DEVIATION:
        second = (x.to(means.dtype) - means).square_().sum(group.dims, keepdim=True) / (group.count - 1)
        rstd.copy_((second + eps).rsqrt_().reshape(rstd.shape))
        result *= group.expand(rstd)
    return output.copy_(result), rstd


@kernel("whiten_backward")
def whiten_backward(
    grad_output: torch.Tensor, output: torch.Tensor, rstd: torch.Tensor, name: str, apart: int, eps: float
) -> torch.Tensor:
    """dx = rstd (dy - mean(dy) - y <dy, y> / (n - 1)), with <dy, y> around the mean of dy: y as rounded has one too."""
    grad = allocate_whiten_backward(grad_output, output, rstd, name, apart, eps)
    if grad.numel() == 0:
        return grad
    wide, group = accumulate_type(output.dtype), Group(output, name, apart)
    means = mean(grad_output, group.dims)
    result = grad_output.to(wide) - means.to(wide)
    if name in DEVIATION:
        products = (grad_output.to(means.dtype) - means).mul_(output)
        slope = products.sum(group.dims, keepdim=True) / (group.count - 1)
        result = (result - slope.to(wide) * output) * group.expand(rstd)
    return grad.copy_(result)


@kernel("softmax")
def softmax(x: torch.Tensor) -> torch.Tensor:
    return allocate_softmax(x).copy_(torch.softmax(x.to(accumulate_type(x.dtype)), -1))


@kernel("softmax_backward")
def softmax_backward(grad_output: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """dx = p (dp - <p, dp>)"""
    grad = allocate_softmax_backward(grad_output, output)
    wide, fine = accumulate_type(output.dtype), sum_type(output)
    dot = (grad_output.to(fine) * output).sum(-1, keepdim=True)
    return grad.copy_((grad_output.to(wide) - dot.to(wide)) * output)


@kernel("unary_forward")
def unary_forward(mask_logits: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pooled, lse = allocate_unary_forward(mask_logits, value)
    logits = mask_logits.to(sum_type(value))
    most = logits.amax(-1, keepdim=True)
    weights = torch.exp(logits - most)
    total = weights.sum(-1, keepdim=True)
    lse.copy_((most + total.log()).squeeze(-1))
    weights = (weights / total).to(pooled.dtype)
    return pooled.copy_((weights.unsqueeze(-2) @ value.to(pooled.dtype)).squeeze(-2)), lse


@kernel("unary_backward")
def unary_backward(
    grad_pooled: torch.Tensor,
    mask_logits: torch.Tensor,
    value: torch.Tensor,
    pooled: torch.Tensor,
    lse: torch.Tensor,
    need_mask: bool,
    need_value: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dv_j = u_j dy and dm_j = u_j (<dy, v_j> - <dy, y>).

    <dy, y> is made of the products at hand, for y was rounded, and of values less their mean, which cancels.
    """
    grad_mask, grad_value = allocate_unary_backward(grad_pooled, mask_logits, value, pooled, lse, need_mask, need_value)
    weights = torch.softmax(mask_logits.to(sum_type(value)), -1)
    if need_mask:
        products = (centred(value, False)[0] @ grad_pooled.unsqueeze(-1)).squeeze(-1).to(weights.dtype)
        grad_mask.copy_(weights * less_mean_under(weights, products))
    if need_value:
        grad_value.copy_(weights.to(grad_pooled.dtype).unsqueeze(-1) * grad_pooled.unsqueeze(-2))
    return grad_mask, grad_value
