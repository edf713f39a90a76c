"""Layers, checks and layout rules shared by the blocks of 1, 2 and 3 spatial dimensions."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeGuard, TypeVar

import torch
import torch.fx
from torch import nn

from ..types import Norm

Choice = TypeVar("Choice")

CONV: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAX_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}

#: Window and stride of the sub-sampling: space by 2, time (the first dimension of three) not at all.
POOL_WINDOW = {1: (2,), 2: (2, 2), 3: (1, 2, 2)}

#: mmcv's names of norm layers: a word of the class name and the attribute under which the layer is kept.
_NORM_KEYS = (("instance", "in"), ("batch", "bn"), ("group", "gn"), ("layer", "ln"))


class Block(nn.Module):
    """What every block is."""

    def __prepare_scriptable__(self) -> NoReturn:  # torch.jit.script calls it, of a block inside a model too
        raise NotImplementedError(
            f"torch.jit.script: {type(self).__name__} is not supported; torch.compile and torch.export are"
        )

    def reset_parameters(self) -> None:
        """Initialise every layer as PyTorch does, running statistics too, then as the block does: see its class."""
        for child in self.children():
            child.apply(_reset)
        self._initialise()

    def _initialise(self) -> None:
        """What a block's constructor does to layers as PyTorch made them."""


def _reset(layer: nn.Module) -> None:
    reset: Any = getattr(layer, "reset_parameters", None)
    if reset is not None:
        reset()


class ConvNorm(nn.Module):
    """A convolution and an optional norm under the key names of mmcv's ConvModule: ``conv``, ``bn`` / ``gn`` / ..."""

    def __init__(self, conv: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = conv
        self.norm_key = None
        if norm is not None:
            self.norm_key = _norm_key(norm)
            self.add_module(self.norm_key, norm)

    @property
    def norm(self) -> nn.Module | None:
        return None if self.norm_key is None else getattr(self, self.norm_key)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = per_position(self.conv, x)
        return x if self.norm is None else self.norm(x)


def _norm_key(norm: nn.Module) -> str:
    name = type(norm).__name__.lower()
    return next((key for word, key in _NORM_KEYS if word in name), "norm_layer")


def zero_parameters(layer: nn.Module) -> None:
    """Zero the weight and the bias of a layer, where it has them."""
    for name in ("weight", "bias"):
        if getattr(layer, name, None) is not None:
            nn.init.zeros_(getattr(layer, name))


def make_norm(norm: Norm, dims: int, channels: int) -> nn.Module | None:
    """The norm layer for `channels` channels: ``"batch"``, a callable ``channels -> nn.Module``, or None for none."""
    if norm is None:
        return None
    if isinstance(norm, str) and norm == "batch":
        return BATCH_NORM[dims](channels)
    if isinstance(norm, nn.Module) or not callable(norm):
        raise ValueError(f"norm: expected 'batch', None or a callable that takes the number of channels, got {norm!r}")
    layer = norm(channels)
    if not isinstance(layer, nn.Module):
        raise ValueError(f"norm: expected a callable that returns an nn.Module, got a {type(layer).__name__} from it")
    return layer


def check_choice(name: str, value: object, choices: Sequence[Choice]) -> Choice:
    """Raise ValueError unless `value` is one of `choices` (by type too: True is not 1)."""
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return choice
    raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_flags(**flags: object) -> None:
    """Raise ValueError unless every value is True or False."""
    for name, value in flags.items():
        check_choice(name, value, (False, True))


def check_width(name: str, value: object) -> int:
    """Raise ValueError unless `value` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected a positive int, got {value!r}")
    return value


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a number that a float can be; an int may be too large for one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_above_zero(name: str, value: object) -> float:
    """Raise ValueError unless `value` is a finite number above 0."""
    if not is_number(value) or not value > 0:
        raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")
    return float(value)


def check_input(x: torch.Tensor, dims: int, channels: int, window: Sequence[int]) -> torch.Tensor:
    """A block's input (B, channels, *spatial), checked; `window` is the smallest spatial size of each dimension.

    Not under torch.jit.trace, where sizes are tensors: a comparison would warn, and not be kept. In a graph of torch.fx
    it is one call, whose result is used so that nothing takes it for dead code.
    """
    if torch.jit.is_tracing():
        return x
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"input: expected a torch.Tensor, got {type(x).__name__}")
    if x.dim() != dims + 2:
        axes = ", ".join(("B", "C", *("T", "H", "W")[3 - dims :])) if dims > 1 else "B, C, L"
        raise ValueError(f"input: expected {dims + 2} dimensions ({axes}), got shape {tuple(x.shape)}")
    if x.shape[1] != channels:
        raise ValueError(f"input: expected {channels} channels in dimension 1, got shape {tuple(x.shape)}")
    if any(size < least for size, least in zip(x.shape[2:], window, strict=True)):
        raise ValueError(f"input: expected spatial sizes of at least {tuple(window)}, got shape {tuple(x.shape)}")
    return x


def per_position(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """layer(x) for 1x1 convolutions, which torch refuses for no rows at all: there, of a row that is cut off again.

    A ConvNorm does that itself: its norm must not count the row. Graphs (torch.jit.trace, torch.fx) do without.
    """
    if torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy) or x.shape[2] or isinstance(layer, ConvNorm):
        return layer(x)
    row = x.new_zeros((*x.shape[:2], 1, *x.shape[3:]))
    return layer(torch.cat((x, row), 2)).narrow(2, 0, 0)  # of x and not of zeros alone: the backward must pass here


def positions_last_but_one(x: torch.Tensor) -> torch.Tensor:
    """(B, C, *spatial) as (B, N, C): a view of a contiguous or channels-last tensor, which the operators read."""
    return x.flatten(2).transpose(1, 2)
