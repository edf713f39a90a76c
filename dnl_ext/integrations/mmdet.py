"""Plug-ins and a backbone for mmdetection, and its BFP neck.

In ``plugins=`` of a ResNet: ``"dnl_ext.NonLocal2dGc"`` (the paper's detection block), ``"dnl_ext.NonLocal2d"``
(mmcv's) and ``"dnl_ext.ContextBlock"`` (GCNet's). mmdetection puts a plug-in into every bottleneck of a stage, before
the residual sum. The paper's code puts its block into some bottlenecks, after the sum: that is ``"dnl_ext.ResNet"``.
A neck: ``"dnl_ext.BFP"``. In a config::

    custom_imports = dict(imports=["dnl_ext.integrations.mmdet"], allow_failed_imports=False)
    model = dict(backbone=dict(type="dnl_ext.ResNet", nlgcb=dict(ratio=1 / 4), stage_with_nlgcb=((), (), (-2,), ())))

Names in the state dict: ``nl_gc_block`` in ResNet, as in the paper's code, and of the plug-ins ``nl_gc_block``,
``nonlocal_block`` and ``context_block``. mmengine's initialisation sets every convolution and norm of a backbone; each
block then initialises itself again, and starts as it would elsewhere. Importing this module without mmdetection raises
ImportError.
"""

import types
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils.checkpoint

from .. import modules
from ..modules._common import check_above_zero, check_width
from ..modules.non_local import check_conv_cfg, norm_of_cfg
from ..types import Backend, Variant
from ._registry import MODELS, require

_necks = require("mmdet", "mmdet.models.necks")
_resnet = require("mmdet", "mmdet.models.backbones.resnet")


class _Plugin:
    """A block that initialises itself last: mmengine calls ``init_weights`` of a module's children after its own."""

    def init_weights(self: Any) -> None:
        self.reset_parameters()


class _DisentangledNonLocal2d(_Plugin, modules.DisentangledNonLocal2d):
    """What NonLocal2dGc builds."""


@MODELS.register_module()
class NonLocal2dGc:
    """The block of the paper's detection code, as :meth:`dnl_ext.DisentangledNonLocal2d.official` builds it.

    A class with ``__new__``, since mmcv names a plug-in by its class; what it gives is a
    :class:`dnl_ext.DisentangledNonLocal2d`.

    Args:
        in_channels: given by the backbone.
        ratio: query and key are ``int(in_channels * ratio)`` wide, at least 1.
        temp: the temperature.
        options: of ``.official()``: ``downsample``, ``whiten_type``, ``with_gc``, ``use_out``, ``out_bn``, ``backend``.

    Raises:
        ValueError: an option or width that does not fit.
    """

    _abbr_ = "nl_gc_block"

    def __new__(cls, in_channels: int, ratio: float = 0.25, temp: float = 0.05, **options: Any) -> Any:
        check_width("in_channels", in_channels)
        planes = max(int(in_channels * check_above_zero("ratio", ratio)), 1)
        return _DisentangledNonLocal2d.official(in_channels, planes, temp, **options)


@MODELS.register_module()
class NonLocal2d(_Plugin, modules.NonLocal2d):
    """mmcv's NonLocal2d as a plug-in: :class:`dnl_ext.NonLocal2d`."""

    _abbr_ = "nonlocal_block"


@MODELS.register_module()
class ContextBlock(_Plugin, modules.GlobalContext2d):
    """GCNet's block as a plug-in: :class:`dnl_ext.GlobalContext2d`."""

    _abbr_ = "context_block"


class _Bottleneck(_resnet.Bottleneck):
    """mmdetection's, with an optional block between the residual sum and its ReLU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_module("nl_gc_block", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.nl_gc_block is None:
            return super().forward(x)

        def until_relu(x):
            y = self.relu(self.norm1(self.conv1(x)))
            y = self.relu(self.norm2(self.conv2(y)))
            y = self.norm3(self.conv3(y))
            return self.nl_gc_block(y + (x if self.downsample is None else self.downsample(x)))

        if self.with_cp and x.requires_grad:
            return self.relu(torch.utils.checkpoint.checkpoint(until_relu, x, use_reentrant=False))
        return self.relu(until_relu(x))


@MODELS.register_module()
class ResNet(_resnet.ResNet):
    """mmdetection's ResNet of bottlenecks, some of them with a block after their residual sum, as in the paper's code.

    Args:
        nlgcb: arguments of :class:`NonLocal2dGc` in a dict, or None for no block.
        stage_with_nlgcb: for each stage the indices of its bottlenecks with a block; negative ones count from the end.
        kwargs: those of ResNet, as there; no ``plugins`` with ``nlgcb``.

    Raises:
        ValueError: an option that does not fit, an index that the stage has not.
    """

    arch_settings = types.MappingProxyType(
        {depth: (_Bottleneck, _resnet.ResNet.arch_settings[depth][1]) for depth in (50, 101, 152)}
    )

    def __init__(
        self,
        *args: Any,
        nlgcb: dict[str, Any] | None = None,
        stage_with_nlgcb: Sequence[Sequence[int]] = ((), (), (), ()),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if nlgcb is None:
            return
        if self.plugins is not None:
            raise ValueError(f"plugins: expected None with nlgcb, got {self.plugins}")
        if len(stage_with_nlgcb) != self.num_stages:
            raise ValueError(f"stage_with_nlgcb: expected {self.num_stages} tuples of indices, got {stage_with_nlgcb}")
        for name, indices in zip(self.res_layers, stage_with_nlgcb, strict=True):
            stage = getattr(self, name)
            for index in indices:
                if not -len(stage) <= index < len(stage):
                    raise ValueError(f"stage_with_nlgcb: expected indices of {len(stage)} blocks, got {index}")
                stage[index].nl_gc_block = NonLocal2dGc(stage[index].norm3.num_features, **nlgcb)
        self._freeze_stages()


@MODELS.register_module()
class BFP(_necks.BFP):
    """mmdetection's balanced feature pyramid with :class:`dnl_ext.NonLocal2d` as its refinement.

    Args:
        kwargs: those of BFP, as there; ``refine_type="non_local"`` is the block.
        variant: None, or of the block in place of it (:meth:`dnl_ext.DisentangledNonLocal2d.mmseg`, ``"dnl"`` and the
            others), which then whitens, with ``temperature``.
        temperature: of a ``variant``.
        backend: of the block.

    Raises:
        ValueError: an option of the block that does not fit.
    """

    def __init__(
        self,
        *args: Any,
        variant: Variant | None = None,
        temperature: float = 0.05,
        backend: Backend = "fused",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if variant is not None and self.refine_type != "non_local":
            raise ValueError(f"variant: expected None with refine_type={self.refine_type!r}, got {variant!r}")
        if self.refine_type != "non_local":
            return
        if variant is None:
            self.refine = NonLocal2d(self.in_channels, False, self.conv_cfg, 1, False, self.norm_cfg, backend=backend)
            return
        check_conv_cfg(self.conv_cfg, 2)
        norm = norm_of_cfg(self.norm_cfg, 2)
        self.refine = _DisentangledNonLocal2d.mmseg(
            self.in_channels, 1, True, temperature, False, norm, variant=variant, backend=backend
        )
