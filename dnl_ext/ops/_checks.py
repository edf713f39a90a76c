"""What a call must satisfy, in Python: for tensors without data, and for logical shapes under vmap.

The compiled operators check again (csrc/core/operator.h, csrc/ops/*/*_op.h): they can be reached without these,
and they see physical tensors. Messages name the argument, what was wanted and what came.
"""

import functools
import math
import sys
from collections.abc import Callable, Sequence

import torch

from ..reference import check_whiten_name
from ._handlers import handler_of

FLOAT_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _untraced(check: Callable[..., None]) -> Callable[..., None]:
    """Leaves a check out under torch.jit.trace: sizes are tensors there, a comparison would warn, and not be kept."""

    @functools.wraps(check)
    def run(*args):
        if not torch.jit.is_tracing():
            check(*args)

    return run


def check_tensor(name: str, x: torch.Tensor, shape: str) -> None:
    """`x` is a dense float tensor with the dimensions that `shape`, such as "(..., N, C)", names."""
    plain = type(x) is torch.Tensor and x.layout == torch.strided and not x.is_nested
    if plain and x.dtype in FLOAT_TYPES and x.dim() >= shape.count(","):
        return
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    handler_of(x)  # loaded, it knows how the operators act on `x`
    if x.is_nested or x.layout != torch.strided or x.is_quantized:
        kind = "nested" if x.is_nested else "quantized" if x.is_quantized else str(x.layout)
        raise NotImplementedError(f"{name}: expected a dense strided tensor, got a {kind} one")
    if x.is_complex():
        raise NotImplementedError(f"{name}: expected a real float tensor, got a complex one")
    if x.dtype not in FLOAT_TYPES:
        raise ValueError(f"{name}: expected float64, float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() < shape.count(","):
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")


@_untraced
def check_alike(name: str, x: torch.Tensor, other_name: str, other: torch.Tensor, shape: Sequence[int]) -> None:
    """`x` is a tensor of the dtype and device of `other`, of exactly `shape`."""
    check_tensor(name, x, "(...)")
    if x.dtype != other.dtype:
        raise ValueError(f"{name}: expected the dtype of {other_name} ({other.dtype}), got {x.dtype}")
    if x.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name} ({other.device}), got {x.device}")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}")


def check_mean(x: torch.Tensor, dim: int) -> None:
    check_tensor("x", x, "(..., N)")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim: expected an int, got {type(dim).__name__}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim: expected a value from {-x.dim()} to {x.dim() - 1}, got {dim}")


@_untraced
def check_softmax(name: str, x: torch.Tensor) -> None:
    check_tensor(name, x, "(..., N)")
    if x.shape[-1] == 0:
        raise ValueError(f"{name}: expected at least one column, got shape {tuple(x.shape)}")


@_untraced
def check_unary(mask_logits: torch.Tensor, value: torch.Tensor) -> None:
    check_tensor("value", value, "(..., Nk, Dv)")
    check_alike("mask_logits", mask_logits, "value", value, value.shape[:-1])
    if value.shape[-2] == 0:
        raise ValueError(f"value: expected at least one key, got shape {tuple(value.shape)}")


@_untraced
def check_query_key(query: torch.Tensor, key: torch.Tensor, scale: float, whiten: str | None) -> None:
    check_tensor("query", query, "(..., Nq, Dqk)")
    check_tensor("key", key, "(..., Nk, Dqk)")
    check_alike("key", key, "query", query, (*query.shape[:-2], key.shape[-2], query.shape[-1]))
    if query.shape[-1] == 0:
        raise ValueError(f"query: expected at least one channel, got shape {tuple(query.shape)}")
    if key.shape[-2] == 0:
        raise ValueError(f"key: expected at least one key, got shape {tuple(key.shape)}")
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale: expected a finite number, got {scale}")
    check_whiten_name(whiten)


@_untraced
def check_pairwise(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask_logits: torch.Tensor | None,
    scale: float,
    whiten: str | None,
) -> None:
    check_query_key(query, key, scale, whiten)
    check_tensor("value", value, "(..., Nk, Dv)")
    check_alike("value", value, "query", query, (*key.shape[:-1], value.shape[-1]))
    if mask_logits is not None:
        check_alike("mask_logits", mask_logits, "query", query, key.shape[:-1])


def check_in_operator(whiten: str | None) -> None:
    """`whiten` is one that the pairwise operators do themselves."""
    if whiten not in ("channel", None):
        raise ValueError(f"whiten: expected one of 'channel', None, got {whiten!r}")


def check_saved(name: str, x: torch.Tensor, like_name: str, like: torch.Tensor, shape: Sequence[int]) -> None:
    """`x` is what a forward returned beside its output: of the accumulate type, on the device of `like`."""
    check_tensor(name, x, "(...)")
    expected = torch.float64 if like.dtype == torch.float64 else torch.float32
    if x.dtype != expected:
        raise ValueError(f"{name}: expected {expected}, as the forward returns it, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name}: expected the device of {like_name} ({like.device}), got {x.device}")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}")


def parse_scale(query: torch.Tensor, scale: float | None) -> float:
    """A float; None means 1 / sqrt(Dqk)."""
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise TypeError(f"scale: expected a float or None, got {type(scale).__name__}")
        if isinstance(scale, int) and abs(scale) > sys.float_info.max:
            raise ValueError(f"scale: expected a finite number, got {scale}")
        return float(scale)
    return 1.0 / math.sqrt(query.shape[-1]) if query.dim() and query.shape[-1] else 1.0
