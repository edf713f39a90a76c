"""Disentangled non-local blocks of 1, 2 and 3 spatial dimensions. See :class:`DisentangledNonLocal2d`.

One implementation serves the three. What the blocks in use differ in are constructor arguments; the names under which
they keep their layers, and how they initialise them, are a `style`, so that their checkpoints load as they are.
"""

import math

import torch
from torch import nn

from .. import ops, reference
from ._common import (
    CONV,
    MAX_POOL,
    POOL_WINDOW,
    ConvNorm,
    check_choice,
    check_input,
    check_temperature,
    check_width,
    make_norm,
    positions_last_but_one,
)
from ._inputs import AttentionInputs

#: Who computes the attention. "reference" holds the N x N map and differentiates twice.
BACKENDS = {"fused": ops, "reference": reference}

#: Attribute (and state dict) name of each layer, in the order in which the original registers its parameters.
STYLES = {
    "plain": {
        "query": "conv_query", "key": "conv_key", "value": "conv_value", "mask": "conv_mask",
        "out": "conv_out", "norm": "norm",
    },
    "official": {
        "query": "conv_query", "key": "conv_key", "value": "conv_value",
        "out": "conv_out", "norm": "out_bn", "mask": "conv_mask",
    },
    "mmseg": {"value": "g", "out": "conv_out", "query": "theta", "key": "phi", "mask": "conv_mask"},
}  # fmt: skip

#: The official code's names of the whitening that this library has; its other names raise.
OFFICIAL_WHITEN = {"channel": "channel", "in_nostd": "channel", None: None}


class _DisentangledNonLocal(nn.Module):
    """See :class:`DisentangledNonLocal2d`; `dims` is the number of spatial dimensions."""

    dims: int

    def __init__(
        self,
        in_channels,
        inter_channels=None,
        value_channels=None,
        *,
        use_out=True,
        norm="batch",
        learn_gamma=False,
        qk_bias=True,
        value_bias=True,
        mask_bias=True,
        out_bias=None,
        use_scale=True,
        temperature=0.05,
        sub_sample=None,
        unary=True,
        whiten="channel",
        style="plain",
        backend="fused",
    ):
        super().__init__()
        self.in_channels = check_width("in_channels", in_channels)
        self.inter_channels = (
            max(in_channels // 2, 1) if inter_channels is None else check_width("inter_channels", inter_channels)
        )
        if value_channels is None:
            value_channels = self.inter_channels if use_out else in_channels
        self.value_channels = check_width("value_channels", value_channels)
        if not use_out and value_channels != in_channels:
            raise ValueError(
                f"value_channels: expected in_channels ({in_channels}) without an out-projection, got {value_channels}"
            )
        for name, flag in (
            ("use_out", use_out), ("learn_gamma", learn_gamma), ("use_scale", use_scale), ("unary", unary),
            ("qk_bias", qk_bias), ("value_bias", value_bias), ("mask_bias", mask_bias),
        ):  # fmt: skip
            check_choice(name, flag, (False, True))
        self.use_scale = use_scale
        self.temperature = check_temperature(temperature)
        self.sub_sample = check_choice("sub_sample", sub_sample, (None, "before", "after"))
        self.whiten = check_choice("whiten", whiten, reference.WHITEN_NAMES)
        self.style = check_choice("style", style, tuple(STYLES))
        self.backend = check_choice("backend", backend, tuple(BACKENDS))
        if style == "mmseg" and not use_out:
            raise ValueError("use_out: expected True with style='mmseg', whose norm belongs to conv_out, got False")

        norm = make_norm(norm, self.dims, in_channels)
        out_bias = norm is None if out_bias is None else check_choice("out_bias", out_bias, (None, False, True))

        def conv(inputs, outputs, bias):
            return CONV[self.dims](inputs, outputs, kernel_size=1, bias=bias)

        layers = {
            "query": conv(in_channels, self.inter_channels, qk_bias),
            "key": conv(in_channels, self.inter_channels, qk_bias),
            "value": conv(in_channels, value_channels, value_bias),
            "mask": conv(in_channels, 1, mask_bias) if unary else None,
            "out": conv(value_channels, in_channels, out_bias) if use_out else None,
            "norm": norm,
        }
        if style == "mmseg":
            layers["out"] = ConvNorm(layers["out"], layers.pop("norm"))
            for role in ("query", "key", "value"):
                layers[role] = ConvNorm(layers[role])
                if sub_sample == "after" and role != "query":
                    layers[role] = nn.Sequential(layers[role])  # mmcv pools in the same Sequential: its key is `g.0`
        for role, name in STYLES[style].items():
            self.add_module(name, layers[role])
        self.pool = MAX_POOL[self.dims](POOL_WINDOW[self.dims]) if sub_sample else None
        self.register_parameter("gamma", nn.Parameter(torch.zeros(1)) if learn_gamma else None)
        self.reset_parameters()

    def _layer(self, role):
        name = STYLES[self.style].get(role)
        return None if name is None else getattr(self, name)

    def reset_parameters(self):
        """Initialise as the block of this `style` does: see the class."""
        for role in ("query", "key", "value", "mask", "out"):
            layer = self._layer(role)
            if layer is None or (self.style == "mmseg" and role == "mask"):
                continue
            for conv in layer.modules():
                if isinstance(conv, tuple(CONV.values())):
                    if self.style == "mmseg" and role == "out":
                        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                    else:
                        nn.init.normal_(conv.weight, std=0.01)
                    if conv.bias is not None:
                        nn.init.zeros_(conv.bias)
        if self.gamma is not None:
            nn.init.zeros_(self.gamma)
        # A zero layer behind gamma = 0 with no unary term beside it would give neither of the two a gradient, ever.
        if self.style != "official" and (self.gamma is None or self._layer("mask") is not None):
            self._zero_output()

    def _zero_output(self):
        """Make the block the identity: zero the norm after the attention, or the out-projection without one."""
        out, norm = self._layer("out"), self._layer("norm")
        if isinstance(out, ConvNorm):
            out, norm = out.conv, out.norm
        last = out if norm is None else norm
        for name in ("weight", "bias"):
            if getattr(last, name, None) is not None:
                nn.init.zeros_(getattr(last, name))

    def _scale(self):
        return 1.0 / ((math.sqrt(self.inter_channels) if self.use_scale else 1.0) * self.temperature)

    def attention_inputs(self, x):
        """What the attention receives for an input, see :class:`AttentionInputs`; arguments and errors as `forward`."""
        check_input(x, self.dims, self.in_channels, (1,) * self.dims if self.pool is None else POOL_WINDOW[self.dims])
        source = self.pool(x) if self.sub_sample == "before" else x
        mask_layer = self._layer("mask")
        query = self._layer("query")(x)
        key = self._layer("key")(source)
        value = self._layer("value")(source)
        mask = None if mask_layer is None else mask_layer(source)
        if self.sub_sample == "after":
            key, value = self.pool(key), self.pool(value)
            mask = None if mask is None else self.pool(mask)
        return AttentionInputs(
            positions_last_but_one(query),
            positions_last_but_one(key),
            positions_last_but_one(value),
            None if mask is None else mask.flatten(1),
            scale=self._scale(),
            whiten=self.whiten,
            gain=1.0 if self.gamma is None else self.gamma,
            query_shape=tuple(query.shape[2:]),
            key_shape=tuple(key.shape[2:]),
        )

    def _attend(self, query, key, value, mask_logits):
        """gamma * sum_j P_ij v_j + sum_j u_j v_j: (B, Nq, Dv) from (B, Nq, C'), (B, Nk, C'), (B, Nk, Dv), (B, Nk)."""
        functional = BACKENDS[self.backend]
        options = {"scale": self._scale(), "whiten": self.whiten}
        if self.gamma is None:
            return functional.disentangled_attention(query, key, value, mask_logits, **options)
        pairwise = functional.pairwise_attention(query, key, value, **options)
        gamma = self.gamma.to(pairwise.dtype)  # under autocast a float32 gamma would widen the whole map
        if mask_logits is None:
            return gamma * pairwise
        unary = functional.unary_attention(mask_logits, value).unsqueeze(-2)
        return torch.addcmul(unary, pairwise, gamma)

    def forward(self, x):
        """x + out(gamma * sum_j P_ij v_j + sum_j u_j v_j).

        Args:
            x: tensor (B, in_channels, *spatial), of the parameters' dtype or under autocast. B may be 0.

        Returns:
            Tensor of the shape, memory format and dtype of ``x`` (the wider dtype under autocast).

        Raises:
            TypeError: ``x`` is not a tensor.
            ValueError: its number of dimensions, its channels or its spatial sizes do not fit.
        """
        inputs = self.attention_inputs(x)
        y = self._attend(inputs.query, inputs.key, inputs.value, inputs.mask_logits)
        y = y.transpose(1, 2).unflatten(2, x.shape[2:])
        for layer in (self._layer("out"), self._layer("norm")):
            if layer is not None:
                y = layer(y)
        return x + y  # x first: where the two differ in memory format, the sum takes that of x

    def extra_repr(self):
        parts = [f"{self.in_channels}, inter_channels={self.inter_channels}, value_channels={self.value_channels}"]
        parts += [f"{name}={getattr(self, name)!r}" for name in ("use_scale", "temperature", "whiten", "sub_sample")]
        parts += [f"learn_gamma={self.gamma is not None}", f"style={self.style!r}", f"backend={self.backend!r}"]
        return ", ".join(parts)

    @classmethod
    def mmseg(
        cls,
        in_channels,
        reduction=2,
        use_scale=True,
        temperature=0.05,
        sub_sample=False,
        norm="batch",
        *,
        backend="fused",
    ):
        """The ``dnl_block`` of mmsegmentation's DNLHead (embedded Gaussian mode), with its key names.

        State dict: ``{g,theta,phi}.conv.{weight,bias}``, ``conv_out.conv.weight``, ``conv_out.bn.*`` (without a norm
        ``conv_out.conv.bias``), ``conv_mask.{weight,bias}``; with ``sub_sample`` ``g.0.conv.*`` and ``phi.0.conv.*``.

        Args:
            in_channels: channels of the input and output; the query, key and value have ``in_channels // reduction``.
            reduction, use_scale, temperature: as there.
            sub_sample: max-pool after the convolutions of key, value and mask. There it raises in the forward: the mask
                keeps one logit per position while keys and values are pooled.
            norm: after ``conv_out``: ``"batch"``, a callable ``channels -> nn.Module``, or None.
            backend: as in the class.
        """
        check_width("in_channels", in_channels)
        return cls(
            in_channels,
            max(in_channels // check_width("reduction", reduction), 1),
            norm=norm,
            use_scale=use_scale,
            temperature=temperature,
            sub_sample="after" if check_choice("sub_sample", sub_sample, (False, True)) else None,
            style="mmseg",
            backend=backend,
        )

    @classmethod
    def official(
        cls,
        in_channels,
        inter_channels=None,
        temperature=0.05,
        downsample=False,
        use_out=False,
        out_bn=False,
        whiten_type="channel",
        with_gc=True,
        *,
        use_scale=True,
        backend="fused",
    ):
        """The block of the paper's segmentation (NonLocal2d_bn) and detection (NonLocal2dGc) code, with its key names.

        State dict: ``gamma``, ``conv_query.*``, ``conv_key.*``, ``conv_value.weight``, ``conv_mask.*``; with
        ``use_out`` ``conv_value.bias`` and ``conv_out.weight``; with ``out_bn`` ``out_bn.*``.

        Args:
            in_channels: there ``inplanes``.
            inter_channels: there ``planes``, or in detection ``int(inplanes * ratio)``; default ``in_channels // 2``.
            temperature, use_out, out_bn: as there.
            downsample: keys, values and the mask see the max-pooled input, so there are as many mask logits as keys.
            whiten_type: ``"channel"`` or its other name ``"in_nostd"``, alone or in a list, or None or an empty list
                for none. Any other name raises; there, names that it does not know whiten nothing.
            with_gc: the unary term.
            use_scale, backend: as in the class.

        In 1-d and 3-d the original works without the unary term only; here it means the same as in 2-d.
        """
        if isinstance(whiten_type, (list, tuple)) and len(whiten_type) < 2:
            whiten_type = whiten_type[0] if whiten_type else None
        check_choice("whiten_type", whiten_type, tuple(OFFICIAL_WHITEN))
        return cls(
            in_channels,
            inter_channels,
            use_out=use_out,
            norm="batch" if check_choice("out_bn", out_bn, (False, True)) else None,
            learn_gamma=True,
            value_bias=use_out,
            out_bias=False,
            use_scale=use_scale,
            temperature=temperature,
            sub_sample="before" if check_choice("downsample", downsample, (False, True)) else None,
            unary=with_gc,
            whiten=OFFICIAL_WHITEN[whiten_type],
            style="official",
            backend=backend,
        )


class DisentangledNonLocal1d(_DisentangledNonLocal):
    """Disentangled non-local block on (B, C, L); arguments as :class:`DisentangledNonLocal2d`, sub-sampling by 2."""

    dims = 1


class DisentangledNonLocal2d(_DisentangledNonLocal):
    """Disentangled non-local block on (B, C, H, W), in memory linear in the number of positions N = H W.

    out_i = x_i + norm(conv_out(gamma * sum_j P_ij v_j + sum_j u_j v_j)), with q, k, v, m 1x1 convolutions of x,
    P_ij = softmax_j(<q_i - mean(q), k_j - mean(k)> / (sqrt(inter_channels) * temperature)) and u_j = softmax_j(m_j).

    Args:
        in_channels: channels C of the input and the output.
        inter_channels: width of query and key; default ``in_channels // 2``.
        value_channels: width of the value; default ``inter_channels``, or ``in_channels`` without an out-projection,
            which then is the only width that fits.
        use_out: the out-projection ``conv_out``.
        norm: after it: ``"batch"``, a callable ``channels -> nn.Module`` such as ``functools.partial(nn.GroupNorm,
            32)``, or None.
        learn_gamma: multiply the pairwise term (not the unary one) by a learned scalar ``gamma`` that starts at 0;
            False is the constant 1, in one fused call.
        qk_bias, value_bias, mask_bias: biases of the convolutions. The mask's changes nothing, nor with whitening do
            those of query and key: their gradients are zero. Checkpoints have them.
        out_bias: bias of ``conv_out``; None means: where no norm follows.
        use_scale: divide the logits by ``sqrt(inter_channels)``.
        temperature: divide the logits by this number above 0; the paper's is 0.05.
        sub_sample: max-pool by 2 in H and W ``"before"`` the convolutions of key, value and mask (the official code),
            ``"after"`` them (mmcv), or None. All three are pooled, since every key needs its own value and mask logit;
            queries are not, and the output keeps its size.
        unary: the unary term and its ``conv_mask``.
        whiten: ``"channel"`` (the paper's) or None (a standard non-local block).
        style: names of the layers in the state dict, and their initialisation: ``"plain"`` (``conv_query``,
            ``conv_key``, ``conv_value``, ``conv_mask``, ``conv_out``, ``norm``, ``gamma``), ``"mmseg"`` or
            ``"official"``.
        backend: ``"fused"``, or ``"reference"``: plain PyTorch with the N x N map, which can be differentiated twice.

    Initialisation: convolutions normal with deviation 0.01 and zero bias; the norm's weight (``conv_out`` where there
    is no norm) zero, so that the block starts as the identity, except where a learned gamma without a unary term does
    that alone. ``"mmseg"``: ``conv_out`` Kaiming normal and ``conv_mask`` PyTorch's default. ``"official"``: nothing is
    zero but gamma, so its unary term acts from the start.

    Raises:
        ValueError: an option or width that does not fit.

    Source: Yin et al., "Disentangled Non-Local Neural Networks", ECCV 2020, equation 10. See :meth:`mmseg` and
    :meth:`official` for the two blocks in use.
    """

    dims = 2


class DisentangledNonLocal3d(_DisentangledNonLocal):
    """Disentangled non-local block on (B, C, T, H, W); arguments as :class:`DisentangledNonLocal2d`.

    Attention is over all T H W positions. Sub-sampling pools H and W by 2 and leaves T alone.
    """

    dims = 3
