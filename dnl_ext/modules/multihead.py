"""Multi-head attention over tokens with disentangled terms. See :class:`DisentangledMultiheadAttention`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from .. import reference
from ..types import Backend, Whitening
from ._block import BACKENDS
from ._common import Block, check_above_zero, check_choice, check_flags, check_width


@torch.fx.wrap
def batch_first_inputs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, widths: Sequence[int], batch_first: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value checked, as (B, length, width); unbatched ones are a batch of one."""
    if not torch.jit.is_tracing():  # as in check_input
        for name, width, x in zip(("query", "key", "value"), widths, (query, key, value), strict=True):
            if not isinstance(x, torch.Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
            if x.dim() not in (2, 3) or x.shape[-1] != width:
                order = "(B, length, " if batch_first else "(length, B, "
                raise ValueError(f"{name}: expected shape {order}{width}) or (length, {width}), got {tuple(x.shape)}")
        batch = 0 if batch_first else 1
        if key.dim() != query.dim() or (key.dim() == 3 and key.shape[batch] != query.shape[batch]):
            raise ValueError(f"key: expected the batch of query {tuple(query.shape)}, got {tuple(key.shape)}")
        if value.shape[:-1] != key.shape[:-1]:
            raise ValueError(f"value: expected length and batch of key {tuple(key.shape)}, got {tuple(value.shape)}")
    if query.dim() == 2:
        return query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
    return (query, key, value) if batch_first else (query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1))


@torch.fx.wrap
def as_given(
    output: torch.Tensor, weights: torch.Tensor | None, query: torch.Tensor, batch_first: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output (B, L, E) and weights (B, ..., L, S) or None, in the layout of a `query`."""
    if query.dim() == 2:
        return output.squeeze(0), None if weights is None else weights.squeeze(0)
    return output if batch_first else output.transpose(0, 1), weights


def _additive(name: str, mask: torch.Tensor, dtype: torch.dtype, *shapes: tuple[int, ...]) -> torch.Tensor:
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(mask).__name__}")
    if tuple(mask.shape) not in shapes:
        raise ValueError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got {tuple(mask.shape)}")
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
    if not mask.is_floating_point():
        raise ValueError(f"{name}: expected bool or a float type, got {mask.dtype}")
    return mask.to(dtype)


@torch.fx.wrap
def merged_mask(
    key_padding_mask: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    query: torch.Tensor,
    query_heads: torch.Tensor,
    key_heads: torch.Tensor,
    *,
    unary: bool,
    whiten: Whitening | None,
) -> torch.Tensor | None:
    """Both masks as what is added to the logits, or None: it broadcasts to (B, heads, L, S).

    Masks and `query` are as the module was given them, (B, heads, L, d) and (B, heads, S, d) projected.
    """
    if is_causal and attn_mask is None:
        raise ValueError("attn_mask: expected a mask with is_causal=True, got None")
    (batch, heads, length), source, dtype = query_heads.shape[:3], key_heads.shape[2], query_heads.dtype
    padding = None
    if key_padding_mask is not None:
        shape = (batch, source) if query.dim() == 3 else (source,)
        padding = _additive("key_padding_mask", key_padding_mask, dtype, shape).view(batch, 1, 1, source)
        if whiten not in ("channel", "in_nostd", "spatial", None):
            raise ValueError(f"key_padding_mask: expected None with whiten={whiten!r}, got a mask")
        if attn_mask is None:
            return padding
    if attn_mask is None:
        return None
    if unary:
        raise ValueError("attn_mask: expected None with unary=True, whose weights know no query, got a mask")
    attn_mask = _additive("attn_mask", attn_mask, dtype, (length, source), (batch * heads, length, source))
    if attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, (batch, heads))
    return attn_mask if padding is None else attn_mask + padding


def _map(
    functional: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    mask_logits: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    whiten: Whitening | None,
) -> torch.Tensor:
    """P_ij + u_j of every head, (B, heads, L, S)."""
    if mask is None:
        pairwise = functional.pairwise_softmax(query, key, scale=scale, whiten=whiten)
    else:
        query, key = functional.whiten(query, whiten), functional.whiten(key, whiten)
        pairwise = torch.softmax((query * scale) @ key.transpose(-2, -1) + mask, -1)
    if mask_logits is None:
        return pairwise
    if mask is not None:
        mask_logits = mask_logits + mask.squeeze(-2)
    return pairwise + functional.unary_softmax(mask_logits).unsqueeze(-2)


@torch.fx.wrap
def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask_logits: torch.Tensor | None,
    mask: torch.Tensor | None,
    need_weights: bool,
    average_weights: bool,
    *,
    backend: Backend,
    scale: float,
    whiten: Whitening | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output (B, L, heads * d) and weights (B, L, S), not averaged (B, heads, L, S), or None, of projected inputs."""
    functional = BACKENDS[backend]
    if mask is None and not need_weights:
        output = functional.disentangled_attention(query, key, value, mask_logits, scale=scale, whiten=whiten)
        return output.transpose(1, 2).flatten(2), None
    no_keys = None
    if mask is not None and not need_weights:
        no_keys = (mask == -math.inf).all(-1, keepdim=True)
        mask = mask.masked_fill(no_keys, 0.0)  # a softmax over nothing is NaN, and so would be all gradients
    weights = _map(functional, query, key, mask_logits, mask, scale, whiten)
    output = weights @ value
    if no_keys is not None:
        output = output.masked_fill(no_keys, 0.0)
    if not need_weights:
        weights = None
    elif average_weights:
        weights = weights.mean(1)
    return output.transpose(1, 2).flatten(2), weights


class DisentangledMultiheadAttention(Block):
    """``nn.MultiheadAttention`` whose heads may whiten their pairwise term and add a unary one.

    A head computes, for query i of d channels::

        y_i = sum_j (P_ij + u_j) v_j
        P_ij = softmax_j(<q'_i, k'_j> / (sqrt(d) * temperature)), q' and k' whitened
        u_j = softmax_j(m_j), m = mask_proj(key), one logit per head

    Without the unary term and with ``whiten=None`` it is ``nn.MultiheadAttention``.

    Memory is linear in the sequence lengths with ``need_weights=False`` and without masks. Otherwise the L x S map of
    every head is built, in plain PyTorch: ``need_weights=True`` (the default, as in torch) returns it anyway.

    Args:
        embed_dim: width of query and output. This and the arguments down to ``dtype`` are those of
            ``nn.MultiheadAttention``.
        num_heads: number of heads.
        dropout: 0; anything else raises, since the fused attention has none.
        bias: whether the projections have biases.
        add_bias_kv: False; anything else raises.
        add_zero_attn: False; anything else raises.
        kdim: width of the key; None is ``embed_dim``.
        vdim: width of the value; None is ``embed_dim``.
        batch_first: whether tensors are (B, L, channels), not (L, B, channels).
        device: of the parameters.
        dtype: of the parameters.
        unary: whether there is a unary term, and with it ``mask_proj``, a linear layer of ``kdim`` inputs.
        whiten: a name of :func:`dnl_ext.whiten` or None, for each head; means are over all positions of a sequence.
        temperature: divides the pairwise logits, above 0.
        backend: ``"fused"``, or ``"reference"``: plain PyTorch.

    State dict: that of ``nn.MultiheadAttention``, and ``mask_proj.*`` with the unary term.

    Raises:
        ValueError: an option that does not fit.
        NotImplementedError: dropout, add_bias_kv, add_zero_attn.

    Example:
        >>> import torch
        >>> from dnl_ext import DisentangledMultiheadAttention
        >>> attention = DisentangledMultiheadAttention(64, num_heads=4, batch_first=True)
        >>> tokens = torch.randn(2, 100, 64)
        >>> output, weights = attention(tokens, tokens, tokens, need_weights=False)
        >>> output.shape, weights
        (torch.Size([2, 100, 64]), None)

    Source: Vaswani et al., "Attention Is All You Need", 2017; the two terms are equation 10 of Yin et al., ECCV 2020.
    """

    # nn.TransformerEncoderLayer has a fast path in C++ that reads the parameters of its attention and never calls its
    # forward; it does not take a module that says so.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        unary: bool = True,
        whiten: Whitening | None = "channel",
        temperature: float = 1.0,
        backend: Backend = "fused",
    ) -> None:
        super().__init__()
        self.embed_dim: int = check_width("embed_dim", embed_dim)
        self.num_heads: int = check_width("num_heads", num_heads)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim: expected a multiple of num_heads ({num_heads}), got {embed_dim}")
        self.head_dim: int = embed_dim // num_heads
        self.kdim: int = embed_dim if kdim is None else check_width("kdim", kdim)
        self.vdim: int = embed_dim if vdim is None else check_width("vdim", vdim)
        check_flags(bias=bias, batch_first=batch_first, unary=unary)
        for name, value in (("dropout", dropout), ("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if value:
                raise NotImplementedError(f"{name}: expected {type(value)(0)}, got {value}")
        self.dropout: float = 0.0
        self.batch_first: bool = batch_first
        self.unary: bool = unary
        self.whiten: Whitening | None = check_choice("whiten", whiten, reference.WHITEN_NAMES)
        self.temperature: float = check_above_zero("temperature", temperature)
        self.backend: Backend = check_choice("backend", backend, tuple(BACKENDS))

        options = {"device": device, "dtype": dtype}
        packed = self.kdim == self.vdim == embed_dim

        def weight(rows, columns):
            return nn.Parameter(torch.empty(rows, columns, **options))

        self.q_proj_weight: nn.Parameter | None
        self.k_proj_weight: nn.Parameter | None
        self.v_proj_weight: nn.Parameter | None
        self.in_proj_weight: nn.Parameter | None
        self.in_proj_bias: nn.Parameter | None
        # In the order of nn.MultiheadAttention, absent ones too.
        self.register_parameter("q_proj_weight", None if packed else weight(embed_dim, embed_dim))
        self.register_parameter("k_proj_weight", None if packed else weight(embed_dim, self.kdim))
        self.register_parameter("v_proj_weight", None if packed else weight(embed_dim, self.vdim))
        self.register_parameter("in_proj_weight", weight(3 * embed_dim, embed_dim) if packed else None)
        self.register_parameter("in_proj_bias", nn.Parameter(torch.empty(3 * embed_dim, **options)) if bias else None)
        self.out_proj: nn.Linear = nn.Linear(embed_dim, embed_dim, bias=bias, **options)
        self.mask_proj: nn.Linear | None = nn.Linear(self.kdim, num_heads, **options) if unary else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.MultiheadAttention``; ``mask_proj`` normal with deviation 0.01 and zero bias."""
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if getattr(self, name) is not None:
                nn.init.xavier_uniform_(getattr(self, name))
        self.out_proj.reset_parameters()
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)
        if self.mask_proj is not None:
            nn.init.normal_(self.mask_proj.weight, std=0.01)
            nn.init.zeros_(self.mask_proj.bias)

    def _heads(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
        """Query, key and value (B, length, dim) projected, each (B, heads, length, head_dim): views."""
        packed, bias = self.in_proj_weight, self.in_proj_bias  # once: a parametrization computes them at each access
        by_query: Any
        by_key: Any
        by_value: Any
        by_query, by_key, by_value = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        query_bias = key_bias = value_bias = None
        if packed is not None:
            by_query, by_key, by_value = packed.chunk(3)
        if bias is not None:
            query_bias, key_bias, value_bias = bias.chunk(3)
        rows = (query, by_query, query_bias), (key, by_key, key_bias), (value, by_value, value_bias)
        return [F.linear(*row).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for row in rows]

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend; arguments and results as those of ``nn.MultiheadAttention``.

        Args:
            query: tensor (L, B, embed_dim), with ``batch_first`` (B, L, embed_dim), unbatched (L, embed_dim). Or, with
                ``batch_first`` and for query, key and value alike, one nested tensor of B sequences, without masks and
                with ``need_weights=False``: what ``nn.TransformerEncoder`` makes of padding in evaluation mode.
            key: the same with S in place of L and kdim in place of embed_dim.
            value: the same with S in place of L and vdim in place of embed_dim.
            key_padding_mask: bool (B, S), True where a key is left out of both terms, or floats added to the logits;
                None. Queries at padded positions still count in the mean that whitening subtracts; names of
                ``whiten`` that would count padded keys (all but "channel", "spatial" and None) refuse it.
            need_weights: return the weights P_ij + u_j too; their rows sum to 2 with a unary term.
            attn_mask: bool (L, S) or (B * num_heads, L, S), True where a pair is left out, or floats added to the
                logits; None with the unary term, whose weights are the same for every query.
            average_attn_weights: average the weights over heads.
            is_causal: a hint that ``attn_mask`` is causal, which is not needed here; it wants the mask, as in torch.

        Returns:
            Output of the shape of ``query``; weights (B, L, S), not averaged (B, heads, L, S), or None. A query whose
            keys are all left out attends to nothing, and its output is the bias of ``out_proj``; with ``need_weights``
            its weights, its output and their gradients are NaN.

        Raises:
            TypeError: not a tensor.
            ValueError: a shape or mask that does not fit.
        """
        if any(isinstance(x, torch.Tensor) and x.is_nested for x in (query, key, value)):
            return self._nested(query, key, value, key_padding_mask, need_weights, attn_mask)
        inputs = batch_first_inputs(query, key, value, (self.embed_dim, self.kdim, self.vdim), self.batch_first)
        batch_query, batch_key, batch_value = inputs
        query_heads, key_heads, value_heads = self._heads(batch_query, batch_key, batch_value)
        mask = merged_mask(
            key_padding_mask, attn_mask, is_causal, query, query_heads, key_heads, unary=self.unary, whiten=self.whiten
        )
        output, weights = attend(
            query_heads,
            key_heads,
            value_heads,
            None if self.mask_proj is None else self.mask_proj(batch_key).transpose(1, 2),
            mask,
            need_weights,
            average_attn_weights,
            backend=self.backend,
            scale=1.0 / (math.sqrt(self.head_dim) * self.temperature),
            whiten=self.whiten,
        )
        return as_given(self.out_proj(output), weights, query, self.batch_first)

    def _nested(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None,
        need_weights: bool,
        attn_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, None]:
        """:meth:`forward` of a nested tensor: its sequences one by one, so that none needs padding or a mask."""
        if not (query is key and key is value and self.batch_first):
            raise ValueError(
                "query: expected a nested tensor only with batch_first=True and the same one as key and value"
            )
        for name, given in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if given is not None:
                raise ValueError(f"{name}: expected None with a nested query, got a mask")
        if need_weights:
            raise ValueError("need_weights: expected False with a nested query, got True")
        outputs = [self.forward(x, x, x, need_weights=False)[0] if len(x) else x for x in query.unbind()]
        jagged: Any = query if query.layout == torch.jagged else None
        if jagged is not None and jagged.lengths() is None:  # only of the same offsets can a result be added to `query`
            return torch.nested.nested_tensor_from_jagged(torch.cat(outputs), jagged.offsets()), None
        return torch.nested.as_nested_tensor(outputs, layout=query.layout), None

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, {self.num_heads}, kdim={self.kdim}, vdim={self.vdim}, "
            f"batch_first={self.batch_first}, unary={self.unary}, whiten={self.whiten!r}, "
            f"temperature={self.temperature}, backend={self.backend!r}"
        )
