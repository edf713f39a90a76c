"""The non-local block that the public classes configure: layers, initialisation and forward, in 1, 2 and 3 dimensions.

One implementation serves them all. What the blocks in use differ in are constructor arguments; the names under which
they keep their layers, and how they initialise them, are a `style`, so that their checkpoints load as they are.
"""

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from .. import ops, reference
from ..types import Backend, BlockWhitening, Mesh, Mode, Norm, Style, SubSample, Variant, Whitening
from ._common import (
    CONV,
    MAX_POOL,
    POOL_WINDOW,
    Block,
    ConvNorm,
    check_above_zero,
    check_choice,
    check_flags,
    check_input,
    check_width,
    make_norm,
    per_position,
    positions_last_but_one,
    zero_parameters,
)
from ._inputs import AttentionInputs
from ._sharding import shard_block

torch.fx.wrap("check_input")

#: Who computes the attention. "reference" holds the N x N map.
BACKENDS: dict[Backend, Any] = {"fused": ops, "reference": reference}

#: Attribute (and state dict) name of each layer, in the order in which the original registers its parameters.
STYLES: dict[Style, dict[str, str]] = {
    "plain": {
        "query": "conv_query", "key": "conv_key", "value": "conv_value", "mask": "conv_mask",
        "out": "conv_out", "norm": "norm", "concat": "concat_project",
    },
    "official": {
        "query": "conv_query", "key": "conv_key", "value": "conv_value",
        "out": "conv_out", "norm": "out_bn", "mask": "conv_mask", "concat": "concat_project",
    },
    "mmseg": {
        "value": "g", "out": "conv_out", "query": "theta", "key": "phi", "concat": "concat_project",
        "mask": "conv_mask",
    },
}  # fmt: skip


class Terms(NamedTuple):
    """Which terms a block has: the pairwise one, whether whitened, and what gives the unary one its logits."""

    pairwise: bool
    whitened: bool
    unary: str | None  # "mask": a convolution of its own. "shared_key": the mean query times the keys.


VARIANTS: dict[Variant, Terms] = {
    "nl": Terms(True, False, None),
    "pairwise": Terms(True, True, None),
    "unary": Terms(False, False, "mask"),
    "dnl_shared_key": Terms(True, True, "shared_key"),
    "dnl": Terms(True, True, "mask"),
}

#: Whitening by layers with running statistics, beside the names of dnl_ext.reference: is the norm affine.
BATCH_NORM_WHITEN: dict[Literal["bn", "bn_affine"], bool] = {"bn": False, "bn_affine": True}
WHITEN_NAMES: tuple[BlockWhitening | None, ...] = (*reference.WHITEN_NAMES[:-1], *BATCH_NORM_WHITEN, None)

MODES: tuple[Mode, ...] = get_args(Mode)


def resolve_variant(
    variant: Variant, unary: bool | None, whiten: BlockWhitening | None
) -> tuple[Variant, BlockWhitening | None]:
    """The name of the variant and its whitening, from the three arguments that speak of them."""
    check_choice("variant", variant, tuple(VARIANTS))
    check_choice("unary", unary, (None, False, True))
    check_choice("whiten", whiten, WHITEN_NAMES)
    if unary is False and variant == "dnl":
        variant = "pairwise"
    if unary is not None and unary != (VARIANTS[variant].unary is not None):
        raise ValueError(f"unary: expected what variant={variant!r} has, or None, got {unary}")
    if not VARIANTS[variant].whitened:
        if whiten not in ("channel", None):  # "channel" is the default
            raise ValueError(f"whiten: expected None with variant={variant!r}, got {whiten!r}")
        whiten = None
    return variant, "channel" if whiten == "in_nostd" else whiten


class AttentionBlock(Block):
    """x + norm(out(attention(x))); the arguments are those of DisentangledNonLocal2d. `dims`: spatial dimensions."""

    dims: int
    #: The functions of a block whose input is one rank's slab, see :func:`dnl_ext.distributed.shard_positions`.
    sharded: Any = None

    def __init__(
        self,
        in_channels: int,
        inter_channels: int | None,
        value_channels: int | None,
        *,
        variant: Variant,
        mode: Mode,
        use_out: bool,
        norm: Norm,
        learn_gamma: bool,
        qk_bias: bool,
        value_bias: bool,
        mask_bias: bool,
        out_bias: bool | None,
        use_scale: bool,
        temperature: float | None,
        sub_sample: SubSample | None,
        unary: bool | None,
        whiten: BlockWhitening | None,
        style: Style,
        backend: Backend,
        mesh: Mesh | None,
    ) -> None:
        super().__init__()
        self.in_channels: int = check_width("in_channels", in_channels)
        self.inter_channels: int = (
            max(in_channels // 2, 1) if inter_channels is None else check_width("inter_channels", inter_channels)
        )
        if value_channels is None:
            value_channels = self.inter_channels if use_out else in_channels
        self.value_channels: int = check_width("value_channels", value_channels)
        if not use_out and value_channels != in_channels:
            raise ValueError(
                f"value_channels: expected in_channels ({in_channels}) without an out-projection, got {value_channels}"
            )
        check_flags(
            use_out=use_out, learn_gamma=learn_gamma, use_scale=use_scale, qk_bias=qk_bias, value_bias=value_bias,
            mask_bias=mask_bias,
        )  # fmt: skip
        self.variant: Variant
        self.whiten: BlockWhitening | None
        self.variant, self.whiten = resolve_variant(variant, unary, whiten)
        terms = VARIANTS[self.variant]
        self.mode: Mode = check_choice("mode", mode, MODES)
        self.use_scale = use_scale
        if temperature is None:
            temperature = 1.0 if variant == "nl" else 0.05
        self.temperature: float = check_above_zero("temperature", temperature)
        self.sub_sample: SubSample | None = check_choice("sub_sample", sub_sample, (None, "before", "after"))
        self.style: Style = check_choice("style", style, tuple(STYLES))
        self.backend: Backend = check_choice("backend", backend, tuple(BACKENDS))
        if style == "mmseg" and not use_out:
            raise ValueError("use_out: expected True with style='mmseg', whose norm belongs to conv_out, got False")
        if learn_gamma and not terms.pairwise:
            raise ValueError("learn_gamma: expected False with variant='unary', which has no pairwise term, got True")

        norm_layer = make_norm(norm, self.dims, in_channels)
        out_bias = norm_layer is None if out_bias is None else check_choice("out_bias", out_bias, (None, False, True))

        def conv(inputs: int, outputs: int, bias: bool | None) -> nn.Module:
            return CONV[self.dims](inputs, outputs, kernel_size=1, bias=bool(bias))

        embedded = terms.pairwise and mode != "gaussian"
        width = self.inter_channels if embedded else in_channels
        layers: dict[str, Any] = {
            "query": conv(in_channels, width, qk_bias) if embedded else None,
            "key": conv(in_channels, width, qk_bias) if embedded else None,
            "value": conv(in_channels, value_channels, value_bias),
            "mask": conv(in_channels, 1, mask_bias) if terms.unary == "mask" else None,
            "out": conv(value_channels, in_channels, out_bias) if use_out else None,
            "norm": norm_layer,
            # mmcv's has two spatial dimensions, positions of query and key, whatever the block's.
            "concat": ConvNorm(nn.Conv2d(2 * width, 1, 1, bias=False)) if mode == "concatenation" else None,
        }
        pool: Any = None
        if sub_sample:
            window = POOL_WINDOW[self.dims]
            pool = MAX_POOL[self.dims](window if self.dims > 1 else window[0])
        if style == "mmseg":
            layers["out"] = ConvNorm(layers["out"], layers.pop("norm"))
            for role in ("query", "key", "value"):
                if layers[role] is not None:
                    layers[role] = ConvNorm(layers[role])
            if sub_sample == "after":  # as mmcv: the layers of key and value pool
                layers["value"] = nn.Sequential(layers["value"], pool)
                if embedded:
                    layers["key"] = nn.Sequential(layers["key"], pool)
                elif terms.pairwise:
                    layers["key"] = pool
        for role, name in STYLES[style].items():
            if layers[role] is not None or style != "mmseg":
                self.add_module(name, layers[role])
        if self.whiten == "bn" or self.whiten == "bn_affine":
            for role in ("key", "query"):
                whitener = nn.BatchNorm1d(width, affine=BATCH_NORM_WHITEN[self.whiten])
                self.add_module(f"{role}_{self.whiten}", whitener)
        self.pool: nn.Module | None = pool
        self.gamma: nn.Parameter | None
        self.register_parameter("gamma", nn.Parameter(torch.zeros(1)) if learn_gamma else None)
        self._initialise()
        if mesh is not None:
            shard_block(self, mesh)

    def _functions(self) -> Any:
        return BACKENDS[self.backend] if self.sharded is None else self.sharded

    def _checked(self, x: torch.Tensor) -> torch.Tensor:
        window = (1,) * self.dims if self.pool is None else POOL_WINDOW[self.dims]
        if self.sharded is not None:
            window = (0, *window[1:])  # a slab may have no rows
        x = check_input(x, self.dims, self.in_channels, window)
        norm = None if self.sharded is None else self._out_and_norm()[1]
        if norm is None or isinstance(norm, nn.SyncBatchNorm):
            return x
        if norm.training or norm.running_mean is None:
            raise RuntimeError(
                "norm: expected evaluation mode or a SyncBatchNorm with sharded positions, got a "
                f"{type(norm).__name__} in training, whose statistics would be those of a slab"
            )
        return x

    def _layer(self, role: str) -> Any:
        """The layer of a role, or None: in "mmseg" one that the block has not is no attribute, in the others None."""
        name = STYLES[self.style].get(role)
        return None if name is None else getattr(self, name, None)

    def _initialise(self) -> None:
        """As the block of this `style` does: see the class."""
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
        if self._layer("concat") is not None:
            nn.init.kaiming_normal_(self._layer("concat").conv.weight, mode="fan_out", nonlinearity="relu")
        if self.gamma is not None:
            nn.init.zeros_(self.gamma)
        # A zero layer behind gamma = 0 with no unary term beside it would give neither of the two a gradient, ever.
        if self.style != "official" and (self.gamma is None or VARIANTS[self.variant].unary is not None):
            out, norm = self._out_and_norm()
            zero_parameters(out if norm is None else norm)  # the block starts as the identity

    def _out_and_norm(self) -> tuple[Any, nn.Module | None]:
        """The out-projection and the norm behind it, or None."""
        out = self._layer("out")
        return (out.conv, out.norm) if isinstance(out, ConvNorm) else (out, self._layer("norm"))

    def _operator_whiten(self) -> Whitening | None:
        """The whitening that is left to the attention functions: none where layers of the block do it."""
        return None if self.whiten == "bn" or self.whiten == "bn_affine" else self.whiten

    def _scale(self) -> float:
        if self.mode == "gaussian":
            return 1.0
        return 1.0 / ((math.sqrt(self.inter_channels) if self.use_scale else 1.0) * self.temperature)

    def _embed(self, x: torch.Tensor) -> tuple[Any, Any, torch.Tensor, torch.Tensor | None]:
        """Query (B, Nq, C'), key (B, Nk, C'), value (B, Nk, Dv) and mask logits (B, Nk), or None, of an input.

        Query and key are whitened where layers of the block do that, and else as the convolutions give them.
        """
        terms = VARIANTS[self.variant]
        source = x if self.pool is None or self.sub_sample != "before" else self.pool(x)

        def layer(role: str, y: Any) -> Any:
            layer = self._layer(role)
            return y if layer is None else per_position(layer, y)

        def pool(y: Any) -> Any:
            return y if self.pool is None or self.sub_sample != "after" or y is None else self.pool(y)

        query: Any = None
        key: Any = None
        value = layer("value", source)
        mask = pool(layer("mask", source) if terms.unary == "mask" else None)
        if terms.pairwise:
            query, key = layer("query", x), layer("key", source)
            if self.mode == "gaussian":
                query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast the value is narrower
        if self.style != "mmseg":  # whose layers of key and value pool
            key, value = pool(key), pool(value)
        if self.pool is not None and self.sub_sample == "after":  # autocast on a CPU pools volumes in float32
            dtype = query.dtype if terms.pairwise else value.dtype
            value = value.to(dtype)
            if terms.pairwise:
                key = key.to(dtype)
            mask = None if mask is None else mask.to(dtype)
        value, mask = positions_last_but_one(value), None if mask is None else mask.flatten(1)
        if not terms.pairwise:
            return None, None, value, mask
        query, key = positions_last_but_one(query), positions_last_but_one(key)
        if terms.unary == "shared_key":
            mask = self._functions().shared_key_logits(query, key)
        if self.whiten in BATCH_NORM_WHITEN:
            query, key = (
                getattr(self, f"{role}_{self.whiten}")(y.transpose(1, 2)).transpose(1, 2)
                for role, y in (("query", query), ("key", key))
            )
        return query, key, value, mask

    def attention_inputs(self, x: torch.Tensor) -> AttentionInputs:
        """What the attention receives for an input, see :class:`.AttentionInputs`; arguments as in :meth:`forward`.

        Raises:
            NotImplementedError: the pairwise term is no softmax (``mode``).
        """
        x = self._checked(x)
        if VARIANTS[self.variant].pairwise and self.mode not in ("embedded_gaussian", "gaussian"):
            raise NotImplementedError(f"mode: expected 'embedded_gaussian' or 'gaussian', softmaxes, got {self.mode!r}")
        query, key, value, mask = self._embed(x)
        return AttentionInputs(
            query, key, value, mask,
            scale=self._scale(),
            whiten=self._operator_whiten(),
            gain=1.0 if self.gamma is None else self.gamma,
            query_shape=tuple(x.shape[2:]),
            key_shape=tuple((x if self.pool is None else self.pool(x[:, :1])).shape[2:]),
            whitened=self.whiten in BATCH_NORM_WHITEN,
        )  # fmt: skip

    def _pairwise(self, functional: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The pairwise term (B, Nq, Dv)."""
        whiten = self._operator_whiten()
        if self.mode in ("embedded_gaussian", "gaussian"):
            return functional.pairwise_attention(query, key, value, scale=self._scale(), whiten=whiten)
        query, key = functional.whiten(query, whiten), functional.whiten(key, whiten)
        if self.mode == "dot_product":
            return functional.dot_product_attention(query, key, value)
        return functional.concatenation_attention(*self._concatenation_logits(query, key), value)

    def _concatenation_logits(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, Nq) and (B, Nk) whose sums over all pairs are what ``concat_project`` gives for query above key.

        The layer is affine: of a pair it is its value of (q_i, 0) plus that of (0, k_j) less that of (0, 0). One call
        with these Nq + Nk + 1 columns in place of Nq * Nk.
        """
        queries, keys = query.shape[1], key.shape[1]
        columns = torch.cat([F.pad(query.mT, (0, keys + 1)), F.pad(key.mT, (queries, 1))], 1)
        logits = self._layer("concat")(columns.unsqueeze(-1)).flatten(1)
        by_query, by_key, origin = logits.split([queries, keys, 1], 1)
        return by_query, by_key - origin

    def _attend(
        self,
        query: torch.Tensor | None,
        key: torch.Tensor | None,
        value: torch.Tensor,
        mask_logits: torch.Tensor | None,
    ) -> torch.Tensor:
        """gamma * sum_j P_ij v_j + sum_j u_j v_j: (B, Nq, Dv) from (B, Nq, C'), (B, Nk, C'), (B, Nk, Dv), (B, Nk).

        Without a pairwise term, that is without query and key, (B, 1, Dv).
        """
        functional = self._functions()
        if query is None or key is None:
            return functional.unary_attention(mask_logits, value).unsqueeze(-2)
        if self.gamma is None and self.mode in ("embedded_gaussian", "gaussian"):
            return functional.disentangled_attention(
                query, key, value, mask_logits, scale=self._scale(), whiten=self._operator_whiten()
            )
        pairwise = self._pairwise(functional, query, key, value)
        # Under autocast a float32 gamma would widen the whole map.
        gamma = None if self.gamma is None else self.gamma.to(pairwise.dtype)
        if mask_logits is None:
            return gamma * pairwise if gamma is not None else pairwise
        unary = functional.unary_attention(mask_logits, value).unsqueeze(-2)
        return unary + pairwise if gamma is None else torch.addcmul(unary, pairwise, gamma)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x + out(gamma * sum_j P_ij v_j + sum_j u_j v_j).

        Args:
            x: tensor ``(B, in_channels, *spatial)``, of the parameters' dtype or under autocast. B may be 0.

        Returns:
            Tensor of the shape, memory format and dtype of ``x`` (the wider dtype under autocast).

        Raises:
            TypeError: ``x`` is not a tensor.
            ValueError: its number of dimensions, its channels or its spatial sizes do not fit.
        """
        x = self._checked(x)
        y = self._attend(*self._embed(x))
        out, norm = self._layer("out"), self._layer("norm")
        # Without a pairwise term one vector for every position is projected once. A norm sees it at each of them, as
        # beside other terms, and in "mmseg" it is inside conv_out.
        if VARIANTS[self.variant].pairwise:
            y = y.transpose(1, 2).unflatten(2, x.shape[2:])
        else:
            y = y.transpose(1, 2).unflatten(2, (1,) * self.dims)
            if self.style == "mmseg":
                y = y.expand(y.shape[:2] + x.shape[2:])
        if out is not None:
            y = per_position(out, y)
        if norm is not None:
            y = norm(y.expand_as(x))
        return x + y  # x first: where the two differ in memory format, the sum takes that of x

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, inter_channels={self.inter_channels}, value_channels={self.value_channels}"]
        names = ("variant", "mode", "use_scale", "temperature", "whiten", "sub_sample")
        parts += [f"{name}={getattr(self, name)!r}" for name in names]
        parts += [f"learn_gamma={self.gamma is not None}", f"style={self.style!r}", f"backend={self.backend!r}"]
        return ", ".join(parts)
