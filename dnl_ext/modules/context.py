"""Global context of 1, 2 and 3 spatial dimensions: one vector for all positions, pooled by the unary operator.

See :class:`GlobalContext2d` (GCNet) and :class:`SimplifiedNonLocal2d`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch import nn

from ..types import Backend, FusionType, PoolingType
from ._block import BACKENDS
from ._common import (
    CONV,
    Block,
    check_above_zero,
    check_choice,
    check_input,
    check_width,
    positions_last_but_one,
    zero_parameters,
)
from ._inputs import AttentionInputs

torch.fx.wrap("check_input")


class _Pooling(Block):
    """A block that pools its input with the softmax of ``conv_mask``, or evenly."""

    dims: int

    def _setup(self, in_channels: int, backend: Backend) -> None:
        self.in_channels: int = check_width("in_channels", in_channels)
        self.conv_mask: Any
        self.backend: Backend = check_choice("backend", backend, ("fused", "reference"))

    def attention_inputs(self, x: torch.Tensor) -> AttentionInputs:
        """The pooling as attention: one map for all positions, of the input itself. See :class:`.AttentionInputs`."""
        x = check_input(x, self.dims, self.in_channels, (1,) * self.dims)
        mask = x.new_zeros(x.shape[0], x[0, 0].numel()) if self.conv_mask is None else self.conv_mask(x).flatten(1)
        value, shape = positions_last_but_one(x), tuple(x.shape[2:])
        return AttentionInputs(None, None, value, mask, 1.0, None, 1.0, query_shape=shape, key_shape=shape)

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        """sum_j softmax_j(conv_mask(x)) x_j, or the mean without a mask: (B, C, *spatial) to (B, C, 1, ...)."""
        x = check_input(x, self.dims, self.in_channels, (1,) * self.dims)
        if self.conv_mask is None:
            return x.mean(tuple(range(2, 2 + self.dims)), keepdim=True)
        mask = self.conv_mask(x).flatten(1)
        value = positions_last_but_one(x).to(mask.dtype)  # under autocast the mask is narrower than x
        context = BACKENDS[self.backend].unary_attention(mask, value)
        return context.unflatten(1, (self.in_channels, *(1,) * self.dims))


class _GlobalContext(_Pooling):
    """See :class:`GlobalContext2d`."""

    def __init__(
        self,
        in_channels: int,
        ratio: float = 0.25,
        pooling_type: PoolingType = "att",
        fusion_types: Sequence[FusionType] = ("channel_add",),
        *,
        backend: Backend = "fused",
    ) -> None:
        super().__init__()
        self._setup(in_channels, backend)
        self.ratio: float = check_above_zero("ratio", ratio)
        self.planes: int = max(int(in_channels * ratio), 1)
        self.pooling_type: PoolingType = check_choice("pooling_type", pooling_type, ("att", "avg"))
        if not isinstance(fusion_types, (list, tuple)) or not fusion_types:
            raise ValueError(f"fusion_types: expected a list or tuple of at least one name, got {fusion_types!r}")
        for name in fusion_types:
            check_choice("fusion_types", name, ("channel_add", "channel_mul"))
        self.fusion_types: tuple[FusionType, ...] = tuple(fusion_types)
        conv: Any = CONV[self.dims]
        self.conv_mask: Any = conv(in_channels, 1, kernel_size=1) if pooling_type == "att" else None

        def transform() -> nn.Sequential:
            return nn.Sequential(
                conv(in_channels, self.planes, kernel_size=1),
                nn.LayerNorm([self.planes, *(1,) * self.dims]),
                nn.ReLU(),  # not in place: full backward hooks on its neighbour would raise
                conv(self.planes, in_channels, kernel_size=1),
            )

        self.channel_add_conv: nn.Sequential | None = transform() if "channel_add" in fusion_types else None
        self.channel_mul_conv: nn.Sequential | None = transform() if "channel_mul" in fusion_types else None
        self._initialise()

    def _initialise(self) -> None:
        """``conv_mask`` Kaiming normal, the last convolution of each transform zero: x + 0, or x * sigmoid(0)."""
        if self.conv_mask is not None:
            nn.init.kaiming_normal_(self.conv_mask.weight, mode="fan_in", nonlinearity="relu")
            nn.init.zeros_(self.conv_mask.bias)
        for transform in (self.channel_add_conv, self.channel_mul_conv):
            if transform is not None:
                zero_parameters(transform[-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x * sigmoid(mul(c)) + add(c) for the context c of x.

        Args:
            x: tensor ``(B, in_channels, *spatial)``. B may be 0.

        Returns:
            Tensor of the shape and memory format of ``x``.

        Raises:
            TypeError: ``x`` is not a tensor.
            ValueError: its dimensions or channels do not fit.
        """
        context, y = self._pool(x), x
        if self.channel_mul_conv is not None:
            y = y * self.channel_mul_conv(context).sigmoid()
        if self.channel_add_conv is not None:
            y = y + self.channel_add_conv(context)
        return y

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, ratio={self.ratio}, pooling_type={self.pooling_type!r}, "
            f"fusion_types={self.fusion_types!r}, backend={self.backend!r}"
        )


class GlobalContext1d(_GlobalContext):
    """GCNet's global context block on (B, C, L); arguments as :class:`GlobalContext2d`.

    Example:
        >>> import torch
        >>> from dnl_ext import GlobalContext1d
        >>> GlobalContext1d(16)(torch.randn(2, 16, 50)).shape
        torch.Size([2, 16, 50])
    """

    dims = 1


class GlobalContext2d(_GlobalContext):
    """GCNet's global context block on (B, C, H, W): x * sigmoid(mul(c)) + add(c).

    c is one vector for the whole image, the context: the mean of x over positions, weighted by softmax_j(conv_mask x).

    Args:
        in_channels: channels of the input and the output.
        ratio: the transforms ``add`` and ``mul`` (convolution, LayerNorm, ReLU, convolution) are
            ``int(in_channels * ratio)`` wide, at least 1.
        pooling_type: ``"att"``, or ``"avg"``: c is the plain mean, without ``conv_mask``.
        fusion_types: ``"channel_add"``, ``"channel_mul"`` or both, in a list or tuple: which transforms there are.
        backend: ``"fused"``, or ``"reference"``: plain PyTorch.

    State dict: mmcv's ContextBlock, ``conv_mask.*``, ``channel_add_conv.{0,1,3}.*``, ``channel_mul_conv.{0,1,3}.*``.

    Raises:
        ValueError: an option or width that does not fit.

    Example:
        >>> import torch
        >>> from dnl_ext import GlobalContext2d
        >>> block = GlobalContext2d(64, ratio=1 / 16, fusion_types=("channel_add", "channel_mul"))
        >>> block(torch.randn(2, 64, 12, 16)).shape
        torch.Size([2, 64, 12, 16])

    Source: Cao et al., "GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond", 2019, equation 5.
    """

    dims = 2


class GlobalContext3d(_GlobalContext):
    """GCNet's global context block on (B, C, T, H, W); arguments as :class:`GlobalContext2d`.

    Example:
        >>> import torch
        >>> from dnl_ext import GlobalContext3d
        >>> GlobalContext3d(16)(torch.randn(2, 16, 3, 8, 8)).shape
        torch.Size([2, 16, 3, 8, 8])
    """

    dims = 3


class _SimplifiedNonLocal(_Pooling):
    """See :class:`SimplifiedNonLocal2d`."""

    def __init__(self, in_channels: int, *, backend: Backend = "fused") -> None:
        super().__init__()
        self._setup(in_channels, backend)
        conv: Any = CONV[self.dims]
        self.conv_value: Any = conv(in_channels, in_channels, kernel_size=1, bias=False)
        self.conv_mask: Any = conv(in_channels, 1, kernel_size=1)
        self._initialise()

    def _initialise(self) -> None:
        """Weights normal with deviation 0.01, the bias zero."""
        for conv in (self.conv_value, self.conv_mask):
            nn.init.normal_(conv.weight, std=0.01)
        nn.init.zeros_(self.conv_mask.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x_i + conv_value(sum_j softmax_j(conv_mask x) x_j); see :class:`GlobalContext2d` for ``x`` and errors."""
        return x + self.conv_value(self._pool(x))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, backend={self.backend!r}"


class SimplifiedNonLocal1d(_SimplifiedNonLocal):
    """GCNet's simplified non-local block on (B, C, L); arguments as :class:`SimplifiedNonLocal2d`.

    Example:
        >>> import torch
        >>> from dnl_ext import SimplifiedNonLocal1d
        >>> SimplifiedNonLocal1d(16)(torch.randn(2, 16, 50)).shape
        torch.Size([2, 16, 50])
    """

    dims = 1


class SimplifiedNonLocal2d(_SimplifiedNonLocal):
    """GCNet's simplified non-local block on (B, C, H, W): out_i = x_i + W_v sum_j softmax_j(conv_mask x) x_j.

    It is the unary term of a disentangled non-local block alone. ``conv_value`` (W_v) has no bias, so it may follow the
    pooling, where it takes C^2 multiplications in place of N C^2.

    Args:
        in_channels: channels of the input and the output.
        backend: ``"fused"``, or ``"reference"``: plain PyTorch.

    State dict: ``conv_value.weight``, ``conv_mask.{weight,bias}``.

    Raises:
        ValueError: a width that does not fit.

    Example:
        >>> import torch
        >>> from dnl_ext import SimplifiedNonLocal2d
        >>> SimplifiedNonLocal2d(64)(torch.randn(2, 64, 12, 16)).shape
        torch.Size([2, 64, 12, 16])

    Source: Cao et al., "GCNet", 2019, equation 3; the names of the paper's segmentation code (Unary2d).
    """

    dims = 2


class SimplifiedNonLocal3d(_SimplifiedNonLocal):
    """GCNet's simplified non-local block on (B, C, T, H, W); arguments as :class:`SimplifiedNonLocal2d`.

    Example:
        >>> import torch
        >>> from dnl_ext import SimplifiedNonLocal3d
        >>> SimplifiedNonLocal3d(16)(torch.randn(2, 16, 3, 8, 8)).shape
        torch.Size([2, 16, 3, 8, 8])
    """

    dims = 3
