"""What is computed: the sizes of a case, its inputs and the operations that are counted for it."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

#: "training" is forward + backward with gradients for every input.
DIRECTIONS = ("forward", "training")
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

#: Deviation of the logits: a softmax that is far from flat, as a trained network has it.
LOGIT_DEVIATION = 4.0
#: Mean of every channel of query and key, in deviations, so that whitening has something to take away.
MEAN_DEVIATION = 1.0


def forward_flops(queries: int, keys: int, width: int, channels: int) -> int:
    """Floating-point operations of the forward's two products, S = q k^T and y = P v, at 2 for a multiply-add.

    Args:
        queries, keys: Nq and Nk. width: Dqk. channels: Dv.

    Example:
        >>> from dnl_ext.benchmark import forward_flops
        >>> forward_flops(queries=1024, keys=1024, width=256, channels=512)
        1610612736
    """
    return 2 * queries * keys * (width + channels)


def training_flops(queries: int, keys: int, width: int, channels: int) -> int:
    """Floating-point operations of forward and backward, counted as seven products.

    The backward makes S again, then dP, dV, dQ and dK. That is what a method of linear memory must run. One that keeps
    its N x N map runs six; it is counted as seven too, so that every figure of a case is the same count over a time: a
    speed.

    Args:
        queries, keys: Nq and Nk. width: Dqk. channels: Dv.

    Example:
        >>> from dnl_ext.benchmark import training_flops
        >>> training_flops(queries=1024, keys=1024, width=256, channels=512)
        5368709120
    """
    return forward_flops(queries, keys, width, channels) + 2 * queries * keys * (3 * width + 2 * channels)


@dataclass(frozen=True)
class Case:
    """One problem of the benchmark.

    Attributes:
        width, channels: Dqk and Dv. queries, keys: Nq and Nk.
        dtype: "fp64", "fp32", "bf16" or "fp16".
        direction: "forward", or "training", which is forward and backward with gradients for every input.
        device: as torch names it.
        batch, heads: leading dimensions of every tensor.
        whiten: whether query and key lose their means. unary: whether there is a unary term.

    Example:
        >>> from dnl_ext.benchmark import Case
        >>> case = Case(width=256, channels=512, queries=1024, keys=1024)
        >>> print(case.describe())
        (256, 512) N=1024 fp32 forward
        >>> case.map_bytes
        4194304
    """

    width: int
    channels: int
    queries: int
    keys: int
    dtype: str = "fp32"
    direction: str = "forward"
    device: str = "cpu"
    batch: int = 1
    heads: int = 1
    whiten: bool = True
    unary: bool = False

    @property
    def training(self) -> bool:
        return self.direction == "training"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def scale(self) -> float:
        """Factor of the logits that gives them LOGIT_DEVIATION on the inputs of :func:`make_inputs`."""
        return LOGIT_DEVIATION / math.sqrt(self.width)

    @property
    def flops(self) -> int:
        """Counted operations of one call, batch and heads included; the same for every method."""
        count = training_flops if self.training else forward_flops
        return self.batch * self.heads * count(self.queries, self.keys, self.width, self.channels)

    @property
    def map_bytes(self) -> int:
        """Size of one N x N map in the dtype of the case."""
        return self.batch * self.heads * self.queries * self.keys * self.torch_dtype.itemsize

    def describe(self) -> str:
        return f"({self.width}, {self.channels}) N={self.keys} {self.dtype} {self.direction}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"scale": self.scale, "flops": self.flops, "map_bytes": self.map_bytes}


@dataclass
class Inputs:
    """Tensors of a case. All are channel-first views, as a convolution leaves them."""

    query: torch.Tensor  # (batch, heads, Nq, Dqk), positions adjacent in memory
    key: torch.Tensor  # (batch, heads, Nk, Dqk)
    value: torch.Tensor  # (batch, heads, Nk, Dv)
    mask_logits: torch.Tensor | None  # (batch, heads, Nk)
    leaves: list[torch.Tensor] = field(default_factory=list)  # those that want a gradient

    def __iter__(self) -> Iterator[Any]:
        return iter((self.query, self.key, self.value, self.mask_logits))


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Inputs of `case`: normal values with a mean per channel in query and key; gradients wanted if it is training."""
    generator = torch.Generator().manual_seed(seed)

    def conv_output(positions, channels, mean):
        x = torch.randn(case.batch, case.heads, channels, positions, generator=generator)
        x += mean * torch.randn(1, case.heads, channels, 1, generator=generator)
        return x.to(case.device, case.torch_dtype).transpose(-1, -2)

    query = conv_output(case.queries, case.width, MEAN_DEVIATION)
    key = conv_output(case.keys, case.width, MEAN_DEVIATION)
    value = conv_output(case.keys, case.channels, 0.0)
    mask = None
    if case.unary:
        mask = torch.randn(case.batch, case.heads, case.keys, generator=generator).to(case.device, case.torch_dtype)
    leaves = [x for x in (query, key, value, mask) if x is not None] if case.training else []
    for x in leaves:
        x.requires_grad_()
    return Inputs(query, key, value, mask, leaves)
