"""Blocks of other code, as the analysis meets them: the attribute names of mmcv, mmsegmentation and the paper's code.

Written from their definitions; `tests/transcriptions.py` has the same blocks with a stored map for the modules' tests.
"""

import math

import torch
from torch import nn


class Conv(nn.Module):
    """mmcv's ConvModule with a convolution alone."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        return self.conv(x)


class MmcvNonLocal(nn.Module):
    """mmcv's NonLocal2d, embedded Gaussian; `dnl` adds what mmsegmentation's DisentangledNonLocal2d does."""

    def __init__(self, channels, dnl=False, sub_sample=False, use_scale=True, temperature=0.5):
        super().__init__()
        self.mode, self.use_scale, self.inter_channels = "embedded_gaussian", use_scale, channels // 2
        self.theta, self.conv_out = Conv(channels, channels // 2), Conv(channels // 2, channels)
        self.g, self.phi = Conv(channels, channels // 2), Conv(channels, channels // 2)
        if sub_sample:
            self.g, self.phi = (nn.Sequential(layer, nn.MaxPool2d(2)) for layer in (self.g, self.phi))
        if dnl:
            self.temperature, self.conv_mask = temperature, nn.Conv2d(channels, 1, 1)

    def maps(self, x):
        """Pairwise (B, Nq, Nk) as the block applies it, and unary (B, Nk) or None."""
        query, key = self.theta(x).flatten(2), self.phi(x).flatten(2)
        dnl = hasattr(self, "conv_mask")
        if dnl:
            query, key = query - query.mean(2, keepdim=True), key - key.mean(2, keepdim=True)
        logits = query.transpose(1, 2) @ key
        if self.use_scale:
            logits = logits / math.sqrt(self.inter_channels)
        if dnl:
            logits = logits / self.temperature
        return logits.softmax(2), self.conv_mask(x).flatten(1).softmax(1) if dnl else None

    def forward(self, x):
        pairwise, unary = self.maps(x)
        value = self.g(x).flatten(2).transpose(1, 2)
        y = pairwise @ value
        if unary is not None:
            y = y + unary[:, None] @ value
        return x + self.conv_out(y.transpose(1, 2).unflatten(2, x.shape[2:]))


class OfficialNonLocal(nn.Module):
    """The paper's NonLocal2d_bn."""

    def __init__(self, inplanes, planes, downsample=False, whiten_type=("channel",), temperature=0.5, with_gc=True,
                 with_unary=False):  # fmt: skip
        super().__init__()
        self.conv_query, self.conv_key = nn.Conv2d(inplanes, planes, 1), nn.Conv2d(inplanes, planes, 1)
        self.conv_value = nn.Conv2d(inplanes, inplanes, 1, bias=False)
        self.conv_out = self.out_bn = None
        if with_gc:
            self.conv_mask = nn.Conv2d(inplanes, 1, 1)
        if "bn" in whiten_type:
            self.key_bn, self.query_bn = (nn.BatchNorm1d(planes, affine=False) for _ in range(2))
        self.downsample = nn.MaxPool2d(2) if downsample else None
        self.gamma, self.scale = nn.Parameter(torch.full((1,), 0.7)), math.sqrt(planes)
        self.whiten_type, self.temperature = list(whiten_type), temperature
        self.with_gc, self.with_unary = with_gc, with_unary

    def maps(self, x):
        """Pairwise (B, Nq, Nk) and unary (B, Nk) or None."""
        source = x if self.downsample is None else self.downsample(x)
        query, key = self.conv_query(x).flatten(2), self.conv_key(source).flatten(2)
        if "channel" in self.whiten_type:
            query, key = query - query.mean(2, keepdim=True), key - key.mean(2, keepdim=True)
        if "bn" in self.whiten_type:
            query, key = self.query_bn(query), self.key_bn(key)
        unary = None
        if self.with_gc:
            unary = self.conv_mask(source).flatten(1).softmax(1)
        elif self.with_unary:
            unary = (query.mean(2, keepdim=True).transpose(1, 2) @ key)[:, 0].softmax(1)
        return (query.transpose(1, 2) @ key / self.scale / self.temperature).softmax(2), unary

    def forward(self, x):
        pairwise, unary = self.maps(x)
        value = self.conv_value(x if self.downsample is None else self.downsample(x)).flatten(2).transpose(1, 2)
        y = self.gamma * (pairwise @ value)
        if unary is not None:
            y = y + unary[:, None] @ value
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])
