"""What a user would write in plain PyTorch for each operator: functions of the operators' names and arguments."""

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from dnl_ext import reference

Function: TypeAlias = Callable[..., torch.Tensor]


def whiten(x: torch.Tensor, name: str | None = "channel", *, eps: float = 1e-5) -> torch.Tensor:
    if name is None:
        return x
    dims: Any = {"spatial": -1, "ln": (-2, -1), "fln": tuple(range(x.dim()))}.get(name.removesuffix("_nostd"), -2)
    if name not in ("in", "ln", "fln"):
        return x - x.mean(dims, keepdim=True)
    variance, mean = torch.var_mean(x, dims, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + eps)


def _operands(
    query: torch.Tensor, key: torch.Tensor, scale: float | None, name: str | None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    if name in ("channel", "in_nostd"):  # the mean of the keys changes no weight
        return query - query.mean(-2, keepdim=True), key, scale
    return whiten(query, name), whiten(key, name), scale


def pairwise_softmax(
    query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None, whiten: str | None = "channel"
) -> torch.Tensor:
    query, key, scale = _operands(query, key, scale, whiten)
    return torch.softmax((query * scale) @ key.transpose(-2, -1), -1)


def pairwise_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    whiten: str | None = "channel",
) -> torch.Tensor:
    return pairwise_softmax(query, key, scale=scale, whiten=whiten) @ value


def sdpa_views(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    whiten: str | None = "channel",
) -> torch.Tensor:
    query, key, scale = _operands(query, key, scale, whiten)
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def sdpa_contiguous(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    whiten: str | None = "channel",
) -> torch.Tensor:
    query, key, scale = _operands(query, key, scale, whiten)
    return F.scaled_dot_product_attention(query.contiguous(), key.contiguous(), value.contiguous(), scale=scale)


def unary_by_sum(mask_logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return (torch.softmax(mask_logits, -1).unsqueeze(-1) * value).sum(-2)


def with_unary(pairwise: Function) -> Function:
    """disentangled_attention whose pairwise term is `pairwise`."""

    @functools.wraps(pairwise)
    def run(query, key, value, mask_logits=None, **options):
        output = pairwise(query, key, value, **options)
        return output if mask_logits is None else output + torch.softmax(mask_logits, -1).unsqueeze(-2) @ value

    return run


def dot_product_by_keys(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return query @ (key.transpose(-2, -1) @ value / key.shape[-2])


#: Peers of a function, by their names.
PEERS: dict[str, dict[str, Function]] = {
    "mean_subtract": {"eager": reference.mean_subtract},
    "whiten": {"eager": whiten},
    "unary_softmax": {"eager": reference.unary_softmax},
    "pairwise_softmax": {"eager": pairwise_softmax},
    "unary_attention": {"eager": reference.unary_attention, "eager_sum": unary_by_sum},
    "pairwise_attention": {
        "eager": pairwise_attention,
        "sdpa_views": sdpa_views,
        "sdpa_contiguous": sdpa_contiguous,
    },
    "disentangled_attention": {
        "eager": with_unary(pairwise_attention),
        "sdpa_views": with_unary(sdpa_views),
        "sdpa_contiguous": with_unary(sdpa_contiguous),
    },
    "shared_key_logits": {"eager": reference.shared_key_logits},
    "dot_product_attention": {"eager": reference.dot_product_attention, "eager_keys": dot_product_by_keys},
    "concatenation_attention": {"eager": reference.concatenation_attention},
}


def functions(peer: str) -> SimpleNamespace:
    """All functions under their names: a peer's own where it has one, else those of "eager"."""
    return SimpleNamespace(**{name: by.get(peer, by["eager"]) for name, by in PEERS.items()})


#: Peers of a block that attends, pools, or multiplies without a softmax: the block itself on their functions.
ATTENTION = ("eager", "sdpa_views", "sdpa_contiguous")
POOLING = ("eager", "eager_sum")
DOT_PRODUCT = ("eager", "eager_keys")
