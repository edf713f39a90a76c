"""The blocks in the field in plain PyTorch with N x N maps, under their own layer names: what the modules must equal.

Written from the definitions of mmsegmentation's DNLHead (``dnl_block``) and of the paper's own segmentation and
detection code (NonLocal2d_bn, NonLocal2dGc). Each block keeps its last maps in ``pairwise_map`` (B, Nq, Nk) and
``unary_map`` (B, Nk), so that a test can assert that they are not flat.
"""

import torch
from torch import nn

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOL = {1: lambda: nn.MaxPool1d(2), 2: lambda: nn.MaxPool2d(2), 3: lambda: nn.MaxPool3d((1, 2, 2))}


def _softmax(logits):
    weights = torch.exp(logits - logits.max(-1, keepdim=True).values)
    return weights / weights.sum(-1, keepdim=True)


class _Maps(nn.Module):
    def terms(self, query, key, value, mask, divisor, whiten):
        """The pairwise term (B, Dv, *spatial) and the unary one (B, Dv, 1, ...) or None, from convolution outputs."""
        spatial = query.shape[2:]
        query, key, value = query.flatten(2), key.flatten(2), value.flatten(2)
        if whiten:
            query = query - query.mean(2, keepdim=True)
            key = key - key.mean(2, keepdim=True)
        self.pairwise_map = _softmax(torch.einsum("bci,bcj->bij", query, key) / divisor)
        pairwise = torch.einsum("bij,bcj->bci", self.pairwise_map, value)
        unary = None
        if mask is not None:
            self.unary_map = _softmax(mask.flatten(1))
            unary = torch.einsum("bj,bcj->bc", self.unary_map, value)
            unary = unary.reshape(*unary.shape, *(1 for _ in spatial))
        return pairwise.reshape(*pairwise.shape[:2], *spatial), unary


class _ConvModule(nn.Module):
    def __init__(self, conv, bn=None):
        super().__init__()
        self.conv = conv
        if bn is not None:
            self.bn = bn

    def forward(self, x):
        return self.bn(self.conv(x)) if hasattr(self, "bn") else self.conv(x)


class MmsegBlock(_Maps):
    """mmsegmentation's DisentangledNonLocal2d, embedded Gaussian.

    With `sub_sample` the original raises: its mask keeps N logits for N / 4 values. Here they are pooled as values are.
    """

    def __init__(self, in_channels, reduction=2, use_scale=True, temperature=0.05, sub_sample=False, norm=True, dims=2):
        super().__init__()
        width, conv = max(in_channels // reduction, 1), CONV[dims]
        self.g = _ConvModule(conv(in_channels, width, 1))
        norm = BATCH_NORM[dims](in_channels) if norm else None
        self.conv_out = _ConvModule(conv(width, in_channels, 1, bias=norm is None), norm)
        self.theta = _ConvModule(conv(in_channels, width, 1))
        self.phi = _ConvModule(conv(in_channels, width, 1))
        self.conv_mask = conv(in_channels, 1, 1)
        self.mask_pool = POOL[dims]() if sub_sample else nn.Identity()
        if sub_sample:
            self.g = nn.Sequential(self.g, POOL[dims]())
            self.phi = nn.Sequential(self.phi, POOL[dims]())
        self.divisor = (width**0.5 if use_scale else 1.0) * temperature

    def forward(self, x):
        mask = self.mask_pool(self.conv_mask(x))
        pairwise, unary = self.terms(self.theta(x), self.phi(x), self.g(x), mask, self.divisor, whiten=True)
        return x + self.conv_out(pairwise + unary)


class OfficialBlock(_Maps):
    """The paper's NonLocal2d_bn; with ``planes = inplanes // 4`` its NonLocal2dGc."""

    def __init__(
        self, inplanes, planes, downsample=False, use_out=False, out_bn=False, whiten_type=("channel",),
        temperature=0.05, with_gc=True, dims=2,
    ):  # fmt: skip
        super().__init__()
        conv = CONV[dims]
        self.gamma = nn.Parameter(torch.zeros(1))
        self.conv_query = conv(inplanes, planes, 1)
        self.conv_key = conv(inplanes, planes, 1)
        self.conv_value = conv(inplanes, planes if use_out else inplanes, 1, bias=use_out)
        self.conv_out = conv(planes, inplanes, 1, bias=False) if use_out else None
        self.out_bn = BATCH_NORM[dims](inplanes) if out_bn else None
        self.conv_mask = conv(inplanes, 1, 1) if with_gc else None
        self.downsample = POOL[dims]() if downsample else nn.Identity()
        self.divisor = planes**0.5 * temperature
        self.whiten = bool(whiten_type)

    def forward(self, x):
        source = self.downsample(x)
        mask = self.conv_mask(source) if self.conv_mask is not None else None
        query, key, value = self.conv_query(x), self.conv_key(source), self.conv_value(source)
        pairwise, unary = self.terms(query, key, value, mask, self.divisor, self.whiten)
        y = self.gamma * pairwise
        if unary is not None:
            y = y + unary
        if self.conv_out is not None:
            y = self.conv_out(y)
        if self.out_bn is not None:
            y = self.out_bn(y)
        return x + y
