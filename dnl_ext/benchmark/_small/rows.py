"""The rows: every operator and block at small sizes, and the methods that compute it."""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from dnl_ext import modules, ops
from dnl_ext.modules._block import BACKENDS

from ..runner import OWN
from .peers import ATTENTION, DOT_PRODUCT, PEERS, POOLING, Function, functions


@dataclass
class Job:
    """A row in one dtype: inputs, and the methods that compute it, dnl_ext first; and the type they were made in."""

    inputs: list[torch.Tensor]
    methods: dict[str, Function]
    rounded: torch.dtype | None = None

    def double(self) -> "Job":
        """The same in float64, from the values as they were rounded."""

        def widened(method: Function) -> Function:
            return copy.deepcopy(method).double() if isinstance(method, nn.Module) else method

        inputs = [x.detach().double() for x in self.inputs]
        methods = {name: widened(method) for name, method in self.methods.items()}
        return Job(inputs, methods, self.inputs[0].dtype)

    def leaves(self, name: str, training: bool) -> list[torch.Tensor]:
        """What wants a gradient of a method: its inputs, and its parameters where it is a block."""
        method = self.methods[name]
        parameters = list(method.parameters()) if isinstance(method, nn.Module) else []
        leaves = [x for x in self.inputs if x.is_floating_point()]
        for x in (*leaves, *parameters):
            x.requires_grad_(training)
        return [*leaves, *parameters] if training else []


@dataclass(frozen=True)
class Row:
    """An operator or a block at one size.

    Attributes:
        what: its name. sizes: on what, in words. make: function of a dtype that returns the Job.
    """

    what: str
    sizes: str
    make: Callable[[torch.dtype], Job] = field(repr=False)


def _tensor(sizes: Sequence[int], dtype: torch.dtype, layout: str, seed: int) -> torch.Tensor:
    """(..., N, C): "rows", channels adjacent; "maps", positions adjacent, as a convolution leaves them; "heads", a view
    (B, H, N, C) of (B, N, H C), as a projection leaves them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*sizes, generator=generator)
    if len(sizes) > 1:
        x += torch.randn(*sizes[:-2], 1, sizes[-1], generator=generator)
    x = x.to(dtype)
    if layout == "maps":
        return x.mT.contiguous().mT
    return x.transpose(-3, -2).contiguous().transpose(-3, -2) if layout == "heads" else x.contiguous()


def call_row(
    name: str, layout: str, *shapes: Sequence[int], argument: Any = None, label: str = "", **options: Any
) -> Row:
    """A function on tensors of `shapes` and an `argument` behind them."""

    def make(dtype: torch.dtype) -> Job:
        more = () if argument is None else (argument,)
        most = max(map(len, shapes))  # what has fewer dimensions has no channels
        inputs = [_tensor(shape, dtype, layout if len(shape) == most else "rows", i) for i, shape in enumerate(shapes)]
        functions = {OWN: getattr(ops, name)} | PEERS[name]
        return Job(
            inputs,
            {who: functools.partial(_call, function, more, options) for who, function in functions.items()},
        )

    sizes = " ".join("x".join(map(str, shape)) for shape in shapes)
    return Row(name, " ".join(filter(None, (label, sizes, layout))), make)


def _call(function: Function, more: tuple[Any, ...], options: dict[str, Any], *inputs: torch.Tensor) -> torch.Tensor:
    return function(*inputs, *more, **options)


class _Attention(nn.Module):
    """A multi-head attention as a function of (query, memory): its output alone."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, query: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        memory = query if memory is None else memory
        return self.attention(query, memory, memory, need_weights=False)[0]


def attention_row(label: str, width: int, heads: int, *shapes: Sequence[int], **options: Any) -> Row:
    """Multi-head attention; without the library's terms its first peer is torch's module."""

    def make(dtype: torch.dtype) -> Job:
        torch.manual_seed(0)
        own = modules.DisentangledMultiheadAttention(width, heads, batch_first=True, **options)
        methods = _on_peers(own, ATTENTION)
        if not own.unary and own.whiten is None:
            theirs = nn.MultiheadAttention(width, heads, batch_first=True)
            theirs.load_state_dict(own.state_dict())
            methods["nn.MultiheadAttention"] = theirs
        inputs = [_tensor(shape, dtype, "rows", i) for i, shape in enumerate(shapes)]
        return Job(inputs, {name: _Attention(module).to(dtype).eval() for name, module in methods.items()})

    sizes = " ".join("x".join(map(str, shape)) for shape in shapes)
    return Row("DisentangledMultiheadAttention", f"{label} {sizes}, {heads} heads", make)


def block_row(
    block: type[nn.Module], sizes: Sequence[int], label: str = "", peers: Sequence[str] = ATTENTION, **options: Any
) -> Row:
    """A block on a contiguous (B, C, *spatial)."""

    def make(dtype: torch.dtype) -> Job:
        torch.manual_seed(0)
        own = block(sizes[1], **options)
        for parameter in own.parameters():  # a block starts as the identity
            nn.init.normal_(parameter, std=0.05)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(*sizes, generator=generator).to(dtype)
        return Job([x], {name: module.to(dtype).eval() for name, module in _on_peers(own, peers).items()})

    return Row(block.__name__, " ".join(filter(None, (label, "x".join(map(str, sizes))))), make)


def _on_peers(own: nn.Module, peers: Sequence[str]) -> dict[str, nn.Module]:
    """The block, and copies of it whose attention is a peer's."""
    backends = cast("dict[str, Any]", BACKENDS)
    result = {OWN: own}
    for name in peers:
        backends[name] = functions(name)
        result[name] = copy.deepcopy(own)
        result[name].backend = name  # type: ignore[assignment]
    return result


def rows() -> list[Row]:
    """All rows: what the library has but RelationModule, which is plain PyTorch with or without it."""
    return [
        call_row("mean_subtract", "rows", (64, 64)),
        call_row("mean_subtract", "maps", (2, 256, 64)),
        call_row("mean_subtract", "rows", (8, 1024, 64)),
        call_row("mean_subtract", "maps", (1, 1024, 256)),
        *(
            call_row("whiten", "maps", shape, argument=name, label=name)
            for name in ("channel", "spatial", "ln_nostd", "fln_nostd", "in", "ln", "fln")
            for shape in ((2, 256, 64), (1, 1024, 256))
        ),
        call_row("unary_softmax", "rows", (8, 1024)),
        call_row("unary_softmax", "rows", (64, 256)),
        call_row("unary_softmax", "rows", (1, 4096)),
        call_row("pairwise_softmax", "heads", (2, 3, 49, 32), (2, 3, 49, 32)),
        call_row("pairwise_softmax", "maps", (2, 256, 64), (2, 256, 64)),
        call_row("unary_attention", "rows", (8, 1024), (8, 1024, 64)),
        call_row("unary_attention", "maps", (8, 1024), (8, 1024, 64)),
        call_row("unary_attention", "maps", (2, 196), (2, 196, 256)),
        call_row("unary_attention", "rows", (1, 4096), (1, 4096, 64)),
        call_row("unary_attention", "rows", (16, 49), (16, 49, 32)),
        call_row("unary_attention", "rows", (64,), (64, 16)),
        *(
            call_row("pairwise_attention", "heads", query, key, key, whiten=None, label="standard")
            for query, key in (
                ((1, 4, 8, 8), (1, 4, 8, 8)),
                ((4, 3, 49, 32), (4, 3, 49, 32)),
                ((1, 4, 256, 64), (1, 4, 256, 64)),
                ((1, 8, 1, 32), (1, 8, 4096, 32)),
                ((1, 8, 16, 64), (1, 8, 1024, 64)),
                ((1, 8, 100, 32), (1, 8, 1024, 32)),
            )
        ),
        call_row("pairwise_attention", "maps", *[(1, 64, 32)] * 3),
        call_row("pairwise_attention", "maps", *[(1, 256, 256)] * 2, (1, 256, 512)),
        call_row("pairwise_attention", "maps", *[(1, 1024, 64)] * 3),
        call_row("disentangled_attention", "maps", *[(1, 64, 16)] * 3, (1, 64)),
        call_row("disentangled_attention", "maps", *[(2, 196, 64)] * 3, (2, 196)),
        call_row("disentangled_attention", "maps", *[(1, 256, 256)] * 2, (1, 256, 512), (1, 256)),
        call_row("disentangled_attention", "heads", *[(2, 8, 100, 32)] * 3, (2, 8, 100)),
        call_row("disentangled_attention", "maps", *[(1, 1024, 64)] * 2, (1, 1024, 128), (1, 1024)),
        call_row("shared_key_logits", "maps", *[(1, 64, 32)] * 2),
        call_row("shared_key_logits", "maps", *[(2, 1024, 64)] * 2),
        call_row("dot_product_attention", "maps", *[(1, 64, 32)] * 3),
        call_row("dot_product_attention", "maps", *[(2, 256, 64)] * 3),
        call_row("concatenation_attention", "maps", (1, 64), (1, 64), (1, 64, 32)),
        call_row("concatenation_attention", "maps", (2, 256), (2, 256), (2, 256, 64)),
        attention_row("standard", 256, 8, (1, 1, 256), (1, 4096, 256), unary=False, whiten=None),
        attention_row("standard", 256, 8, (1, 100, 256), unary=False, whiten=None),
        attention_row("standard", 96, 3, (4, 49, 96), unary=False, whiten=None),
        attention_row("disentangled", 96, 3, (4, 49, 96)),
        attention_row("disentangled", 256, 8, (1, 196, 256)),
        block_row(modules.NonLocal1d, (2, 32, 100)),
        block_row(modules.NonLocal2d, (1, 64, 8, 8)),
        block_row(modules.NonLocal2d, (2, 64, 16, 16)),
        block_row(modules.NonLocal2d, (2, 64, 16, 16), "gaussian", mode="gaussian"),
        block_row(modules.NonLocal2d, (2, 64, 16, 16), "dot product", DOT_PRODUCT, mode="dot_product"),
        block_row(modules.NonLocal2d, (2, 64, 16, 16), "concatenation", ("eager",), mode="concatenation"),
        block_row(modules.NonLocal2d, (2, 64, 16, 16), "pooled", sub_sample=True),
        block_row(modules.NonLocal3d, (1, 32, 4, 8, 8)),
        block_row(modules.DisentangledNonLocal1d, (2, 32, 100)),
        block_row(modules.DisentangledNonLocal2d, (1, 64, 8, 8)),
        block_row(modules.DisentangledNonLocal2d, (2, 64, 16, 16)),
        block_row(modules.DisentangledNonLocal2d, (1, 256, 16, 16)),
        block_row(modules.DisentangledNonLocal2d, (2, 64, 16, 16), "shared key", variant="dnl_shared_key"),
        block_row(modules.DisentangledNonLocal2d, (2, 64, 16, 16), "unary", POOLING, variant="unary"),
        block_row(modules.DisentangledNonLocal2d, (2, 64, 16, 16), "in", whiten="in"),
        block_row(modules.DisentangledNonLocal3d, (1, 32, 4, 8, 8)),
        block_row(modules.GlobalContext1d, (2, 32, 100), peers=POOLING),
        block_row(modules.GlobalContext2d, (2, 64, 16, 16), peers=POOLING),
        block_row(modules.GlobalContext2d, (2, 256, 14, 14), peers=POOLING),
        block_row(modules.GlobalContext3d, (1, 32, 4, 8, 8), peers=POOLING),
        block_row(modules.SimplifiedNonLocal1d, (2, 32, 100), peers=POOLING),
        block_row(modules.SimplifiedNonLocal2d, (2, 64, 16, 16), peers=POOLING),
        block_row(modules.SimplifiedNonLocal3d, (1, 32, 4, 8, 8), peers=POOLING),
    ]
