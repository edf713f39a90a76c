"""The transcribed blocks under the class names, and with the attributes, that the originals have.

That is what dnl_ext.integrations.convert goes by. The attributes are those of mmcv 2.1, mmsegmentation 1.2, GCNet, and
the paper's segmentation and detection code.
"""

import test_context
import torch
from torch import nn
from transcriptions import POOL, MmcvBlock, MmsegBlock, OfficialBlock


class _Mmcv:
    """Attributes of mmcv's NonLocalNd, for a transcription behind it in the bases."""

    dims = 2

    def __init__(self, in_channels, reduction=2, use_scale=True, sub_sample=False, mode="embedded_gaussian", **options):
        super().__init__(in_channels, reduction, use_scale, sub_sample=sub_sample, mode=mode, dims=self.dims, **options)
        self.in_channels, self.reduction, self.use_scale = in_channels, reduction, use_scale
        self.inter_channels, self.sub_sample = max(in_channels // reduction, 1), sub_sample
        if mode == "gaussian" and sub_sample:
            self.phi = POOL[self.dims]()


class NonLocal1d(_Mmcv, MmcvBlock):
    dims = 1


class NonLocal2d(_Mmcv, MmcvBlock):
    pass


class NonLocal3d(_Mmcv, MmcvBlock):
    dims = 3


class NonLocal2D(_Mmcv, MmcvBlock):
    """mmdetection's, before mmcv had it."""


class ForkedNonLocal2D(_Mmcv, MmcvBlock):
    """Its copy in the paper's detection code: without `fixbug` it multiplies by the scale."""

    def __init__(self, in_channels, fixbug=False, temp=1.0, downsample=False, **options):
        super().__init__(in_channels, before=downsample, **options)
        del self.sub_sample
        self.fixbug, self.temp, self.downsample = fixbug, temp, self.before if downsample else None
        self.whiten_type, self.gc_block, self.gcb, self.learn_t = None, None, None, False
        scale = self.inter_channels ** (0.5 if fixbug else -0.5) if self.use_scale else 1.0
        self.divisor = scale * temp


ForkedNonLocal2D.__name__ = "NonLocal2D"


class DisentangledNonLocal2d(_Mmcv, MmsegBlock):
    def __init__(self, in_channels, temperature=0.05, **options):
        super().__init__(in_channels, temperature=temperature, **options)


class NonLocal2d_bn(OfficialBlock):
    """`whiten_type` is a list of names; the first known one counts here, and unknown ones do nothing, as there."""

    known = ("channel", "spatial", "bn_affine", "bn", "ln_nostd")

    def __init__(self, inplanes, planes, whiten_type=("channel",), temperature=0.05, with_gc=True, **options):
        name = next((name for name in whiten_type if name in self.known), None)
        super().__init__(inplanes, planes, whiten_type=name, temperature=temperature, with_gc=with_gc, **options)
        self.whiten_type, self.temperature, self.with_gc = list(whiten_type), temperature, with_gc


class NonLocal2dGc(NonLocal2d_bn):
    def __init__(self, inplanes, ratio=1 / 4, with_2fc=False, **options):
        super().__init__(inplanes, int(inplanes * ratio), **options)
        self.with_2fc = with_2fc


class NonLocal2d_nowd(OfficialBlock):
    """Scale and temperature are left out with "nl" in `nowd`; gamma is there without a pairwise term too."""

    def __init__(self, inplanes, planes, whiten_type=("in_nostd",), nowd=("nl",), eps=1e-5, with_gc=True, **options):
        name = next(iter(whiten_type), None)
        super().__init__(inplanes, planes, whiten_type=name, temperature=1.0, with_gc=with_gc, **options)
        if not self.with_nl:
            self.gamma = nn.Parameter(torch.zeros(1))
        if "nl" in nowd:
            self.divisor = 1.0
        self.whiten_type, self.nowd, self.eps, self.with_gc = list(whiten_type), list(nowd), eps, with_gc


class Unary2d(OfficialBlock):
    def __init__(self, inplanes, planes, **options):
        super().__init__(inplanes, planes, with_nl=False, **options)


class ContextBlock(test_context.ContextBlock):
    def __init__(self, channels, ratio=1 / 4, pooling_type="att", fusion_types=("channel_add",)):
        super().__init__(channels, ratio, pooling_type, fusion_types, 2)
        self.ratio, self.pooling_type, self.fusion_types = ratio, pooling_type, fusion_types


class SimpleContextBlock(test_context.SimplifiedBlock):
    """ContextBlock(simple=True) of the paper's detection code."""

    def __init__(self, channels):
        super().__init__(channels, 2)
        self.ratio, self.pooling_type, self.fusion_types, self.simple = 1 / 4, "att", ("channel_add",), True


SimpleContextBlock.__name__ = "ContextBlock"
