"""Standard non-local blocks of 1, 2 and 3 spatial dimensions, as mmcv has them. See :class:`NonLocal2d`."""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from ..types import Backend, Mesh, Mode, SubSample
from ._block import AttentionBlock
from ._common import BATCH_NORM, CONV, check_choice, check_flags, check_width, is_number


def norm_of_cfg(norm_cfg: dict[str, Any] | None, dims: int) -> Callable[[int], nn.Module] | None:
    """The ``norm`` argument of the blocks for an mmcv ``norm_cfg``: None, or a callable of the number of channels."""
    if norm_cfg is None:
        return None
    if not isinstance(norm_cfg, dict) or "type" not in norm_cfg:
        raise ValueError(f"norm_cfg: expected None or a dict with the key 'type', got {norm_cfg!r}")
    options = dict(norm_cfg)
    kind, requires_grad = options.pop("type"), options.pop("requires_grad", True)
    instance = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
    layers = {"BN": BATCH_NORM[dims], f"BN{dims}d": BATCH_NORM[dims], "SyncBN": nn.SyncBatchNorm, "IN": instance[dims]}
    layers[f"IN{dims}d"] = instance[dims]
    if kind == "GN":
        if "num_groups" not in options:
            raise ValueError(f"norm_cfg: expected the key 'num_groups' with type 'GN', got {norm_cfg!r}")
        groups = options.pop("num_groups")
        layer = functools.partial(nn.GroupNorm, groups)
    elif kind in layers:
        layer = layers[kind]
    else:
        raise ValueError(f"norm_cfg: expected type {', '.join(map(repr, [*layers, 'GN']))}, got {kind!r}")

    def make(channels: int) -> nn.Module:
        norm = layer(channels, **options)
        return norm.requires_grad_(requires_grad)

    return make


def check_conv_cfg(conv_cfg: dict[str, Any] | None, dims: int) -> None:
    """Raise ValueError unless an mmcv ``conv_cfg`` asks for the plain convolution that the block has anyway."""
    name = CONV[dims].__name__
    if conv_cfg not in (None, {"type": name}):
        raise ValueError(f"conv_cfg: expected None or {{'type': {name!r}}}, got {conv_cfg!r}")


class _NonLocal(AttentionBlock):
    """See :class:`NonLocal2d`."""

    def __init__(
        self,
        in_channels: int,
        sub_sample: bool | SubSample = False,
        conv_cfg: dict[str, Any] | None = None,
        reduction: int = 2,
        use_scale: bool = True,
        norm_cfg: dict[str, Any] | None = None,
        mode: Mode = "embedded_gaussian",
        std: float = 0.01,
        zeros_init: bool = True,
        *,
        backend: Backend = "fused",
        mesh: Mesh | None = None,
    ) -> None:
        check_conv_cfg(conv_cfg, self.dims)
        check_choice("sub_sample", sub_sample, (False, True, "before", "after"))
        check_flags(zeros_init=zeros_init)
        if not is_number(std) or std < 0:
            raise ValueError(f"std: expected a finite number of at least 0, got {std!r}")
        self.std: float = std
        self.zeros_init: bool = zeros_init
        check_width("in_channels", in_channels)
        super().__init__(
            in_channels, max(in_channels // check_width("reduction", reduction), 1), None, variant="nl", mode=mode,
            use_out=True, norm=norm_of_cfg(norm_cfg, self.dims), learn_gamma=False, qk_bias=True, value_bias=True,
            mask_bias=True, out_bias=None, use_scale=use_scale, temperature=1.0,
            sub_sample="after" if sub_sample is True else sub_sample or None, unary=None, whiten=None,
            style="mmseg", backend=backend, mesh=mesh,
        )  # fmt: skip

    def _initialise(self) -> None:
        """As mmcv: theta, phi and g normal with deviation ``std``, the last layer zero or normal."""
        super()._initialise()
        out, norm = self._out_and_norm()
        last = out if norm is None else norm
        layers = [self._layer(role) for role in ("query", "key", "value")]
        convs = [m for layer in layers if layer is not None for m in layer.modules() if hasattr(m, "weight")]
        for layer in convs if self.zeros_init else [*convs, last]:
            if layer.weight is not None:  # a norm may be without
                nn.init.normal_(layer.weight, std=self.std)


class NonLocal1d(_NonLocal):
    """Non-local block on (B, C, L); arguments as :class:`NonLocal2d`, sub-sampling by 2.

    Example:
        >>> import torch
        >>> from dnl_ext import NonLocal1d
        >>> NonLocal1d(16)(torch.randn(2, 16, 50)).shape
        torch.Size([2, 16, 50])
    """

    dims = 1


class NonLocal2d(_NonLocal):
    """Non-local block on (B, C, H, W), in memory linear in the number of positions N = H W, under mmcv's names.

    It adds to each position a weighted sum of all positions: out_i = x_i + norm(conv_out(sum_j A_ij g_j)). theta, phi
    and g (query, key and value) are 1x1 convolutions of the input x with C' channels, and ``mode`` says what the
    weights are:

    * ``"embedded_gaussian"``: A_ij = softmax_j(<theta_i, phi_j> / sqrt(C'))
    * ``"gaussian"``: A_ij = softmax_j <x_i, x_j>
    * ``"dot_product"``: A_ij = <theta_i, phi_j> / N, computed as theta (phi^T g) / N
    * ``"concatenation"``: A_ij = relu(w_theta . theta_i + w_phi . phi_j) / N, computed by sorting: trainable, and
      without an N x N map

    Args:
        in_channels: channels of the input and the output.
        sub_sample: max-pool keys and values by 2 in H and W. True or ``"after"`` their convolutions, as mmcv, or
            ``"before"`` them, as video-nonlocal-net and the paper's code.
        conv_cfg: None or ``{"type": "Conv2d"}``; any other layer is refused.
        reduction: C' = in_channels // reduction, at least 1.
        use_scale: whether the logits of ``"embedded_gaussian"`` are divided by sqrt(C').
        norm_cfg: of the norm after ``conv_out``: None, or a dict with ``type`` ``"BN"``, ``"BN2d"``, ``"SyncBN"``,
            ``"IN"``, ``"IN2d"`` or ``"GN"`` (with ``num_groups``), ``requires_grad`` and arguments of the layer.
        mode: above.
        std: deviation of the normal distribution from which the weights of g, theta and phi are drawn.
        zeros_init: whether the norm after ``conv_out``, or ``conv_out`` without one, starts at zero, so that the block
            starts as the identity. Otherwise it is drawn as the others.
        backend: ``"fused"``, or ``"reference"``: plain PyTorch with the N x N map.
        mesh: as in :class:`dnl_ext.DisentangledNonLocal2d`.

    State dict: mmcv's, ``{g,theta,phi}.conv.*``, ``conv_out.conv.*``, ``conv_out.bn.*``,
    ``concat_project.conv.weight``; with ``sub_sample`` ``g.0.conv.*`` and ``phi.0.conv.*``.

    Raises:
        ValueError: an option or width that does not fit.
        NotImplementedError: with a mesh, an option that mixes positions in a way that does not shard.

    Example:
        >>> import torch
        >>> from dnl_ext import NonLocal2d
        >>> block = NonLocal2d(64, norm_cfg={"type": "BN"})
        >>> features = torch.randn(2, 64, 12, 16)
        >>> torch.equal(block(features), features)  # the identity, until it is trained
        True

    Source: Wang et al., "Non-local Neural Networks", CVPR 2018; arguments and names of mmcv's NonLocal2d. There the
    backward of ``"concatenation"`` raises, and float16 overflows.
    """

    dims = 2


class NonLocal3d(_NonLocal):
    """Non-local block on (B, C, T, H, W); arguments as :class:`NonLocal2d`. Sub-sampling leaves T alone.

    Example:
        >>> import torch
        >>> from dnl_ext import NonLocal3d
        >>> NonLocal3d(16)(torch.randn(2, 16, 3, 8, 8)).shape
        torch.Size([2, 16, 3, 8, 8])
    """

    dims = 3
