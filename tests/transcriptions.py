"""The blocks in the field in plain PyTorch with N x N maps, under their own layer names: what the modules must equal.

Written from the definitions of mmsegmentation's DNLHead (``dnl_block``), of mmcv's NonLocalNd, and of the paper's own
segmentation and detection code (NonLocal2d_bn, NonLocal2d_nowd, NonLocal2dGc). Each block keeps its last maps in
``pairwise_map`` (B, Nq, Nk) and ``unary_map`` (B, Nk), so that a test can assert that they are not flat.
"""

import torch
from torch import nn

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOL = {1: lambda: nn.MaxPool1d(2), 2: lambda: nn.MaxPool2d(2), 3: lambda: nn.MaxPool3d((1, 2, 2))}


def _softmax(logits):
    weights = torch.exp(logits - logits.max(-1, keepdim=True).values)
    return weights / weights.sum(-1, keepdim=True)


def whitened(x, name, eps=1e-5):
    """(B, C, N) less its mean, over its deviation for "in", "ln" and "fln", by the names of the paper's code."""
    if name is None:
        return x
    dims = {
        "channel": (2,), "in_nostd": (2,), "in": (2,), "spatial": (1,), "ln_nostd": (1, 2), "ln": (1, 2),
        "fln_nostd": (0, 1, 2), "fln": (0, 1, 2),
    }[name]  # fmt: skip
    count = 1
    for dim in dims:
        count *= x.shape[dim]
    centred = x - x.sum(dims, keepdim=True) / count
    if name not in ("in", "ln", "fln"):
        return centred
    variance = centred.square().sum(dims, keepdim=True) / (count - 1)
    return centred / (variance + eps) ** 0.5


class _Maps(nn.Module):
    def weigh(self, query, key, mode, divisor):
        """The pairwise weights (B, Nq, Nk) of query and key (B, C', N), already whitened."""
        if mode == "concatenation":
            pairs = torch.cat(
                [query[..., None].expand(-1, -1, -1, key.shape[2]), key[:, :, None].expand(-1, -1, query.shape[2], -1)],
                1,
            )
            return torch.relu(self.concat_project.conv(pairs))[:, 0] / key.shape[2]
        logits = torch.einsum("bci,bcj->bij", query, key)
        return logits / key.shape[2] if mode == "dot_product" else _softmax(logits / divisor)

    def terms(self, query, key, value, mask, divisor, whiten, mode="embedded_gaussian"):
        """The pairwise term (B, Dv, *spatial) and the unary one (B, Dv, 1, ...) or None, from convolution outputs.

        `mask`: logits of the unary term, "shared_key" for those of the mean query, or None.
        """
        spatial = query.shape[2:]
        query, key, value = query.flatten(2), key.flatten(2), value.flatten(2)
        if isinstance(mask, str):
            mask = torch.einsum("bc,bcj->bj", query.mean(2), key)
        query, key = self.whiten_pair(query, key, whiten)
        self.pairwise_map = self.weigh(query, key, mode, divisor)
        pairwise = torch.einsum("bij,bcj->bci", self.pairwise_map, value)
        return pairwise.reshape(*pairwise.shape[:2], *spatial), self.unary_term(mask, value, len(spatial))

    def whiten_pair(self, query, key, whiten):
        if whiten in ("bn", "bn_affine"):
            return getattr(self, f"query_{whiten}")(query), getattr(self, f"key_{whiten}")(key)
        return whitened(query, whiten), whitened(key, whiten)

    def unary_term(self, mask, value, dims):
        if mask is None:
            return None
        self.unary_map = _softmax(mask.flatten(1))
        unary = torch.einsum("bj,bcj->bc", self.unary_map, value.flatten(2))
        return unary.reshape(*unary.shape, *(1,) * dims)


class _ConvModule(nn.Module):
    def __init__(self, conv, bn=None):
        super().__init__()
        self.conv = conv
        if bn is not None:
            self.bn = bn

    def forward(self, x):
        return self.bn(self.conv(x)) if hasattr(self, "bn") else self.conv(x)


class MmcvBlock(_Maps):
    """mmcv's NonLocal1d / 2d / 3d; with `before` the pool comes before the convolutions, as video-nonlocal-net's."""

    temperature, whiten, has_mask = 1.0, None, False

    def __init__(
        self, in_channels, reduction=2, use_scale=True, sub_sample=False, norm=False, dims=2, mode="embedded_gaussian",
        before=False,
    ):  # fmt: skip
        super().__init__()
        width, conv = max(in_channels // reduction, 1), CONV[dims]
        self.mode = mode
        self.g = _ConvModule(conv(in_channels, width, 1))
        norm = BATCH_NORM[dims](in_channels) if norm else None
        self.conv_out = _ConvModule(conv(width, in_channels, 1, bias=norm is None), norm)
        self.before = POOL[dims]() if before else nn.Identity()
        self.theta, self.phi = nn.Identity(), nn.Identity()
        if mode != "gaussian":
            self.theta = _ConvModule(conv(in_channels, width, 1))
            self.phi = _ConvModule(conv(in_channels, width, 1))
        if mode == "concatenation":
            self.concat_project = _ConvModule(nn.Conv2d(2 * width, 1, 1, bias=False))
        if self.has_mask:
            self.conv_mask = conv(in_channels, 1, 1)
        self.mask_pool = POOL[dims]() if sub_sample else nn.Identity()
        if sub_sample:
            self.g = nn.Sequential(self.g, POOL[dims]())
            self.phi = nn.Sequential(self.phi, POOL[dims]())
        self.divisor = (width**0.5 if use_scale else 1.0) * self.temperature
        if mode == "gaussian":
            self.divisor = 1.0

    def forward(self, x):
        source = self.before(x)
        mask = self.mask_pool(self.conv_mask(source)) if self.has_mask else None
        pairwise, unary = self.terms(
            self.theta(x), self.phi(source), self.g(source), mask, self.divisor, self.whiten, self.mode
        )
        return x + self.conv_out(pairwise if unary is None else pairwise + unary)


class MmsegBlock(MmcvBlock):
    """mmsegmentation's DisentangledNonLocal2d.

    With `sub_sample` the original raises: its mask keeps N logits for N / 4 values. Here they are pooled as values are.
    Its gaussian mode subtracts the means from its input in place; here from a copy.
    """

    whiten, has_mask = "channel", True

    def __init__(
        self, in_channels, reduction=2, use_scale=True, temperature=0.05, sub_sample=False, norm=True, dims=2,
        mode="embedded_gaussian",
    ):  # fmt: skip
        self.temperature = temperature
        super().__init__(in_channels, reduction, use_scale, sub_sample, norm, dims, mode)


class OfficialBlock(_Maps):
    """The paper's NonLocal2d_bn; with ``planes = inplanes // 4`` its NonLocal2dGc.

    `with_nl=False` is its Unary2d, with `out_bn` seeing the unary vector at every position.
    """

    def __init__(
        self, inplanes, planes, downsample=False, use_out=False, out_bn=False, whiten_type="channel",
        temperature=0.05, with_gc=True, dims=2, with_unary=False, with_nl=True,
    ):  # fmt: skip
        super().__init__()
        conv = CONV[dims]
        if with_nl:
            self.gamma = nn.Parameter(torch.zeros(1))
            self.conv_query = conv(inplanes, planes, 1)
            self.conv_key = conv(inplanes, planes, 1)
        self.conv_value = conv(inplanes, planes if use_out else inplanes, 1, bias=use_out)
        self.conv_out = conv(planes, inplanes, 1, bias=False) if use_out else None
        self.out_bn = BATCH_NORM[dims](inplanes) if out_bn else None
        self.conv_mask = conv(inplanes, 1, 1) if with_gc else None
        self.downsample = POOL[dims]() if downsample else nn.Identity()
        if whiten_type in ("bn", "bn_affine"):
            for role in ("key", "query"):
                setattr(self, f"{role}_{whiten_type}", nn.BatchNorm1d(planes, affine=whiten_type == "bn_affine"))
        self.divisor = planes**0.5 * temperature
        self.whiten, self.with_unary, self.with_nl = whiten_type, with_unary, with_nl

    def forward(self, x):
        source = self.downsample(x)
        mask = self.conv_mask(source) if self.conv_mask is not None else "shared_key" if self.with_unary else None
        value = self.conv_value(source)
        if self.with_nl:
            pairwise, unary = self.terms(
                self.conv_query(x), self.conv_key(source), value, mask, self.divisor, self.whiten
            )
            y = self.gamma * pairwise if unary is None else self.gamma * pairwise + unary
        else:
            y = self.unary_term(mask, value, x.dim() - 2).expand(*value.shape[:2], *x.shape[2:])
        if self.conv_out is not None:
            y = self.conv_out(y)
        if self.out_bn is not None:
            y = self.out_bn(y)
        return x + y
