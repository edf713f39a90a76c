"""Small calls: every operator and block at sizes where a call's own cost shows, against the best plain PyTorch.

A row is an operator or a block at one size, a cell is a row in one dtype, direction and number of threads. A method's
values are checked against float64 before it is timed. A cell's figure is the time of the fastest peer over that of
dnl_ext: for each peer the median over rounds of the ratio within a round, and of these the least. Below 1 we lose.
"""

import copy
import datetime
import functools
import json
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import nn

from dnl_ext import modules, ops, reference
from dnl_ext.analysis.tables import markdown_lines
from dnl_ext.config import show_config
from dnl_ext.modules._block import BACKENDS

from .case import DIRECTIONS, DTYPES
from .check import USUAL_FLOOR
from .runner import OWN, describe_device
from .timing import failure_text

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

#: Version of the layout of a document of small calls.
SMALL_SCHEMA = 1
#: Seconds of one sample: so many calls in a row that it takes this long.
SAMPLE_SECONDS = 1e-3
#: Multiple of plain PyTorch's error from which a method counts as wrong. torch's attention reaches 10 in float32.
WRONG = 30.0
#: Calls before the first sample.
WARM_UP = 3

Function: TypeAlias = Callable[..., torch.Tensor]


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


# What a user would write. Functions have the names and arguments of the operators; those of `SDPA` take precedence.


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


def _functions(peer: str) -> SimpleNamespace:
    """All functions under their names: a peer's own where it has one, else those of "eager"."""
    return SimpleNamespace(**{name: by.get(peer, by["eager"]) for name, by in PEERS.items()})


#: Peers of a block that attends, pools, or multiplies without a softmax: the block itself on their functions.
ATTENTION = ("eager", "sdpa_views", "sdpa_contiguous")
POOLING = ("eager", "eager_sum")
DOT_PRODUCT = ("eager", "eager_keys")


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
        inputs = [_tensor(shape, dtype, layout if len(shape) > 1 else "rows", i) for i, shape in enumerate(shapes)]
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
        backends[name] = _functions(name)
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


# Checking and timing one cell.


def _bound(job: Job, name: str, training: bool) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A call of a method without arguments: its output, or its gradients by everything that wants one."""
    method, leaves = job.methods[name], job.leaves(name, training)
    if not training:

        def forward() -> tuple[torch.Tensor, ...]:
            with torch.no_grad():
                return (method(*job.inputs),)

        return forward
    output = method(*job.inputs)
    values = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    grad_output = torch.empty_like(output).copy_(values.to(job.rounded or output.dtype))
    return lambda: torch.autograd.grad(method(*job.inputs), leaves, grad_output)


def _error(results: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    """The largest relative error. A gradient of zero, as that of the bias of a whitened key, has none of its own."""
    norms = [torch.linalg.vector_norm(t).item() for t in truth]
    least = 1e-3 * max(norms)
    return max(
        torch.linalg.vector_norm(x.double() - t).item() / max(norm, least, 1e-300)
        for x, t, norm in zip(results, truth, norms, strict=True)
    )


def _checked(job: Job, training: bool) -> tuple[dict[str, Callable[[], tuple[torch.Tensor, ...]]], dict[str, str]]:
    """Calls of the methods that give what plain PyTorch gives in float64, and why others do not."""
    calls, failures = {}, {}
    truth = _bound(job.double(), "eager", training)()
    bar = max(USUAL_FLOOR * torch.finfo(job.inputs[0].dtype).eps, _error(_bound(job, "eager", training)(), truth))
    for name in job.methods:
        try:
            call = _bound(job, name, training)
            ratio = _error(call(), truth) / bar
        except Exception as raised:
            failures[name] = failure_text(raised)
            continue
        if ratio <= WRONG:
            calls[name] = call
        else:  # NaN is wrong too
            failures[name] = f"wrong: {ratio:.1f} times plain PyTorch's error (allowed: {WRONG:g})"
    return calls, failures


def _times(
    calls: Mapping[str, Callable[[], object]], clock: Callable[[], float], rounds: int
) -> dict[str, list[float]]:
    """Seconds of one call of each method, once a round, in shuffled order. A sample is many calls."""

    def sample(call: Callable[[], object], count: int) -> float:
        start = clock()
        for _ in range(count):
            call()
        return (clock() - start) / count

    counts = {}
    for name, call in calls.items():
        for _ in range(WARM_UP):
            call()
        counts[name] = max(1, round(SAMPLE_SECONDS / max(sample(call, 2), 1e-7)))
    order, samples = random.Random(0), {name: [] for name in calls}
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            samples[name].append(sample(calls[name], counts[name]))
    return samples


def run_cell(row: Row, dtype: str, direction: str, rounds: int) -> dict[str, Any]:
    """One cell: what each method took, and the figure. On one thread the clock is that thread's own."""
    threads = torch.get_num_threads()
    cell: dict[str, Any] = {"what": row.what, "sizes": row.sizes, "dtype": dtype, "direction": direction}
    cell |= {"threads": threads, "methods": {}, "failures": {}, "best_peer": None, "ratio": None}
    calls, cell["failures"] = _checked(row.make(DTYPES[dtype]), direction == "training")
    times = _times(calls, time.thread_time if threads == 1 else time.perf_counter, rounds)
    for name, samples in times.items():
        cell["methods"][name] = {"median_s": statistics.median(samples), "best_s": min(samples)}
    if OWN not in times:
        return cell
    for name, samples in times.items():
        ratios = sorted(peer / own for peer, own in zip(samples, times[OWN], strict=True))
        quarter = len(ratios) // 4
        quartiles = [ratios[quarter], ratios[-1 - quarter]]
        cell["methods"][name] |= {"ratio": statistics.median(ratios), "quartiles": quartiles}
    peers = [name for name in times if name != OWN]
    cell["best_peer"] = min(peers, key=lambda name: cell["methods"][name]["ratio"], default=None)
    if peers:
        cell["ratio"] = cell["methods"][cell["best_peer"]]["ratio"]
    return cell


@dataclass
class SmallOptions:
    """What a sweep over small calls covers.

    Attributes:
        dtypes, directions: as in :class:`Case`. threads: numbers of threads, each for the whole sweep.
        rounds: samples of every method in every cell. only: rows whose name or sizes contain this.

    Example:
        >>> from dnl_ext.benchmark import SmallOptions
        >>> len(SmallOptions().selected()) >= 60
        True
        >>> [row.sizes for row in SmallOptions(only="GlobalContext3d").selected()]
        ['1x32x4x8x8']
    """

    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")
    directions: tuple[str, ...] = DIRECTIONS
    threads: tuple[int, ...] = (1,)
    rounds: int = 15
    only: str = ""

    def selected(self) -> list[Row]:
        return [row for row in rows() if self.only in f"{row.what} {row.sizes}"]

    def cells(self) -> Iterator[tuple[int, Row, str, str]]:
        for threads in self.threads:
            for row in self.selected():
                for dtype in self.dtypes:
                    for direction in self.directions:
                        yield threads, row, dtype, direction


def run_small(
    options: SmallOptions,
    save: Callable[[dict[str, Any]], object] | None = None,
    progress: Callable[[str, int, int], object] | None = None,
) -> dict[str, Any]:
    """Time small calls of every operator and block against plain PyTorch.

    Args:
        options: :class:`SmallOptions`.
        save: function of the document, called after every row (an interrupted run keeps what it has).
        progress: function of (row in words, number of cells done, of all), called before every cell.

    Returns:
        dict: the document, see benchmarks/README.md. ``document["cells"]`` has one entry per row, dtype, direction and
        number of threads.

    Example:
        >>> from dnl_ext.benchmark import SmallOptions, run_small
        >>> options = SmallOptions(dtypes=("fp32",), directions=("forward",), rounds=3, only="mean_subtract 64x64")
        >>> cell = run_small(options)["cells"][0]
        >>> cell["best_peer"], cell["ratio"] > 0
        ('eager', True)
    """
    document: dict[str, Any] = {
        "small_schema": SMALL_SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": describe_device("cpu"),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "config": dict(show_config()),
        "rounds": options.rounds,
        "convention": {
            "ratio": "time of the fastest peer over that of dnl_ext: for each peer the median over rounds of the ratio "
            "within a round, and of these the least; quartiles likewise",
            "clock": "CPU time of the thread on one thread, else the wall's",
            "training": "forward and backward, gradients for every input and parameter",
        },
        "cells": [],
    }
    cells = list(options.cells())
    before = torch.get_num_threads()
    try:
        for number, (threads, row, dtype, direction) in enumerate(cells):
            if progress:
                progress(f"{row.what} {row.sizes} {dtype} {direction}", number, len(cells))
            torch.set_num_threads(threads)
            document["cells"].append(run_cell(row, dtype, direction, options.rounds))
            if save and (number + 1 == len(cells) or cells[number + 1][1] is not row):
                save(document)
    finally:
        torch.set_num_threads(before)
    return document


# The document as text.


def load_small(path: str | Path) -> dict[str, Any]:
    """Read a document of :func:`run_small` that :func:`save_json` wrote.

    Raises:
        ValueError: not such a document.
        OSError: it cannot be read.

    Example:
        >>> import pathlib, tempfile
        >>> from dnl_ext.benchmark import load_small, save_json
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_json(f"{folder}/small.json")({"small_schema": 1, "cells": []})
        ...     load_small(f"{folder}/small.json")["cells"]
        []
    """
    try:
        document = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not is_small(document) or document["small_schema"] != SMALL_SCHEMA or "cells" not in document:
        raise ValueError(f"{path}: expected a document of small calls of schema {SMALL_SCHEMA}")
    return document


def is_small(document: object) -> bool:
    """Whether a JSON document is one of small calls, of any schema.

    Example:
        >>> from dnl_ext.benchmark import is_small
        >>> is_small({"small_schema": 1}), is_small({"schema": 1})
        (True, False)
    """
    return isinstance(document, dict) and "small_schema" in document


def _grid(document: dict[str, Any], threads: int) -> tuple[list[tuple[str, str]], dict[tuple[str, str], Any]]:
    """Columns (dtype, direction), and for each row (what, sizes) its cells by column."""
    columns, table = {}, {}
    for cell in document["cells"]:
        if cell["threads"] == threads:
            column = cell["dtype"], cell["direction"]
            columns[column] = None
            table.setdefault((cell["what"], cell["sizes"]), {})[column] = cell
    return list(columns), table


def _figure(cell: dict[str, Any] | None, mark: str) -> str:
    """A cell's figure and its peer; `mark` around those below 1."""
    if cell is None:
        return ""
    if cell["ratio"] is None:
        return "failed"
    text = f"{cell['ratio']:.2f}"
    return f"{mark}{text}{mark} {cell['best_peer']}" if cell["ratio"] < 1 else text


def _head(columns: Sequence[tuple[str, str]]) -> list[str]:
    titles = [f"{dtype} {'forward' if direction == 'forward' else '+ backward'}" for dtype, direction in columns]
    return ["operator or block", "sizes", *titles]


def _figures(
    columns: Sequence[tuple[str, str]], table: Mapping[tuple[str, str], Any], mark: str
) -> Iterator[list[str]]:
    """The lines of a table: a row's name, its sizes, and the figures of its cells."""
    for (what, sizes), cells in table.items():
        yield [what, sizes, *(_figure(cells.get(column), mark) for column in columns)]


def _threads(document: dict[str, Any]) -> list[int]:
    return list(dict.fromkeys(cell["threads"] for cell in document["cells"]))


def _count(document: dict[str, Any], threads: int) -> str:
    cells = [cell for cell in document["cells"] if cell["threads"] == threads]
    losing = sum(cell["ratio"] is None or cell["ratio"] < 1 for cell in cells)
    clearly = sum(
        cell["ratio"] is not None and cell["methods"][cell["best_peer"]]["quartiles"][1] < 1 for cell in cells
    )
    rows_of = {(cell["what"], cell["sizes"]) for cell in cells}
    return (
        f"{threads} thread{'s' if threads > 1 else ''}: {len(cells)} cells of {len(rows_of)} rows, {losing} below 1.0, "
        f"of {clearly} three quarters of the rounds"
    )


def small_tables(document: dict[str, Any]) -> "Iterator[Table | Text]":
    """A document of :func:`run_small` as tables for the terminal, every cell of it, and how many are below 1.

    Example:
        >>> from dnl_ext.benchmark import small_tables
        >>> list(small_tables({"cells": []}))
        []
    """
    from rich.table import Table
    from rich.text import Text

    for threads in _threads(document):
        columns, table = _grid(document, threads)
        shown = Table(
            title=f"Time of the best peer over that of dnl_ext, {threads} thread{'s' if threads > 1 else ''}; "
            "* below 1, and to whom",
            title_justify="left",
            header_style="bold",
        )
        for title in _head(columns):
            shown.add_column(title)
        for figures in _figures(columns, table, "*"):
            shown.add_row(*figures)
        yield shown
        yield Text(_count(document, threads), style="bold")
    for cell in document["cells"]:
        if OWN in cell["failures"]:
            where = f"{cell['what']} {cell['sizes']} {cell['dtype']} {cell['direction']}"
            yield Text(f"- {where}: {cell['failures'][OWN]}", style="bold red")


def small_markdown(document: dict[str, Any]) -> str:
    """The same as Markdown.

    Example:
        >>> from dnl_ext.benchmark import small_markdown
        >>> small_markdown({"cells": []})
        ''
    """
    lines: list[str] = []
    for threads in _threads(document):
        columns, table = _grid(document, threads)
        lines += [f"{_count(document, threads)}.", ""]
        lines += [*markdown_lines(_head(columns), _figures(columns, table, "**")), ""]
    return "\n".join(lines).rstrip()
