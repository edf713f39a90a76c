"""Every softmax attention that a network computes: calls of ``F.scaled_dot_product_attention``, by who made them.

A torch function mode sees each call that Python code makes, whatever name it imported the function by. Two ways around
it are closed while it looks: ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` have a fast path in C++ in
evaluation mode, which is switched off, and a compiled network runs eagerly. ``F.multi_head_attention_forward`` with
``need_weights=True`` multiplies by hand; it is run a second time without, to be looked at.

Attention that is written with matrix products and a softmax of its own is not seen.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

from .masks import CausalMask, PairMask, TensorMask, depends_on_query, key_mask
from .terms import Terms

SDPA = F.scaled_dot_product_attention
MULTIHEAD = F.multi_head_attention_forward


class NotMeasured(ValueError):
    """Raised for an attention call that has no maps to measure; the message says why.

    Example:
        >>> from dnl_ext.analysis import AttentionCall, NotMeasured
        >>> query = torch.randn(1, 2, 1, 4)  # one query alone
        >>> try:
        ...     next(AttentionCall(query, query, query).heads())
        ... except NotMeasured as error:
        ...     print(error)
        fewer than two queries: there is nothing to compare a map with
    """


class AttentionCall(NamedTuple):
    """The arguments of a call of ``torch.nn.functional.scaled_dot_product_attention``, by its names.

    Attributes:
        query: tensor (..., heads, Nq, D); of fewer than four dimensions it has one head.
        key: tensor (..., heads, Nk, D), with ``enable_gqa`` of fewer heads.
        value: tensor (..., heads, Nk, Dv), likewise.
        attn_mask: bool, True where a query sees a key, or float, which is added to the logits: a tensor that broadcasts
            to (..., heads, Nq, Nk), or None.
        dropout_p: chance that a weight is dropped. The maps are those before that.
        is_causal: whether query i sees the keys 0 .. i alone.
        scale: factor of the logits; None is 1 / sqrt(D).
        enable_gqa: whether heads share keys and values.

    Example:
        >>> import torch
        >>> from dnl_ext.analysis import AttentionCall
        >>> query, key = torch.randn(2, 3, 9, 4), torch.randn(2, 3, 7, 4)  # 2 images, 3 heads
        >>> [(image, head) for image, head, terms in AttentionCall(query, key, key).heads()][:4]
        [(0, 0), (0, 1), (0, 2), (1, 0)]
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def heads(self) -> Iterator[tuple[int, int, Terms]]:
        """(image, head, :class:`Terms`) of each head; what comes before the heads counts as images.

        A head of whose keys a mask leaves fewer than two is left out: it has no map, or always the same.

        Raises:
            NotMeasured: nested tensors, or fewer than two queries or keys.
        """
        if any(x.is_nested for x in (self.query, self.key, self.value)):
            raise NotMeasured("nested tensors")
        if self.query.shape[-2] < 2:
            raise NotMeasured("fewer than two queries: there is nothing to compare a map with")
        if self.key.shape[-2] < 2:
            raise NotMeasured("fewer than two keys: every map is the same")
        parts = self._grouped()
        lead = tuple(torch.broadcast_shapes(*(x.shape[:-2] for x in parts))) or (1,)
        query, key, value = (x.detach().expand(*lead, *x.shape[-2:]) for x in parts)
        mask = self.attn_mask
        if mask is not None:
            mask = mask.detach().expand(*lead, query.shape[-2], key.shape[-2])
        heads = lead[-1] if len(lead) > 1 else 1
        for number, place in enumerate(itertools.product(*map(range, lead))):
            terms = self._terms(query[place], key[place], value[place], None if mask is None else mask[place])
            if terms.positions > 1:
                yield number // heads, number % heads, terms

    def _grouped(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value, the last two of as many heads as the query."""
        if not self.enable_gqa:
            return self.query, self.key, self.value
        group = self.query.shape[-3] // self.key.shape[-3]
        return self.query, self.key.repeat_interleave(group, -3), self.value.repeat_interleave(group, -3)

    def _terms(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> Terms:
        """:class:`Terms` of one head, from query (Nq, D), key (Nk, D), value (Nk, Dv), mask (Nq, Nk)."""
        scale = 1 / math.sqrt(query.shape[-1]) if self.scale is None else self.scale
        pair_mask: PairMask | None = None
        bias = None
        if self.is_causal:
            like = value.new_zeros((), dtype=torch.promote_types(value.dtype, torch.float32))
            pair_mask = CausalMask(key.shape[0], like)
        elif mask is not None and depends_on_query(mask):
            pair_mask = TensorMask(mask)
            key, value = key[pair_mask.kept], value[pair_mask.kept]
        elif mask is not None:
            kept, bias = key_mask(mask[0])
            key, value = key[kept], value[kept]
        return Terms(query, key, value, None, scale, False, key_bias=bias, pair_mask=pair_mask)

    def remarks(self) -> list[str]:
        """What there is beside query, key and value, in a word each."""
        found = []
        if self.is_causal:
            found.append("causal")
        if self.attn_mask is not None:
            found.append("mask" if self.attn_mask.dtype == torch.bool else "additive mask")
        if self.dropout_p > 0:
            found.append(f"before dropout of {self.dropout_p:g}")
        if self.enable_gqa and self.key.shape[-3] < self.query.shape[-3]:
            found.append(f"{self.key.shape[-3]} key heads")
        return found


class AttentionCalls:
    """Context in which every call of ``F.scaled_dot_product_attention`` that a network makes is handed to a function.

    The results of the network are not changed, apart from rounding where PyTorch's fast path would have been taken.
    Not for several threads at once: ``torch.nn.functional`` has another function while ``nn.MultiheadAttention`` runs.

    Args:
        model: any nn.Module.
        handler: called as ``handler(name, call)`` after each call: the name of the module that made it, and an
            :class:`AttentionCall`. Further calls of one forward of a module have ``#2``, ``#3``, ... behind the name.

    Example:
        >>> import torch
        >>> from dnl_ext.analysis import AttentionCalls
        >>> layer = torch.nn.TransformerDecoderLayer(16, 2, 32, batch_first=True).eval()
        >>> with AttentionCalls(layer, lambda name, call: print(name, tuple(call.query.shape), tuple(call.key.shape))):
        ...     _ = layer(torch.randn(1, 5, 16), torch.randn(1, 7, 16))
        self_attn (1, 2, 5, 8) (1, 2, 5, 8)
        multihead_attn (1, 2, 5, 8) (1, 2, 7, 8)
    """

    def __init__(self, model: nn.Module, handler: Callable[[str, AttentionCall], object]) -> None:
        self.model: nn.Module = model
        self.handler: Callable[[str, AttentionCall], object] = handler
        self._running: list[list[Any]] = []  # of each module that runs: its name, and the calls that it has made
        self._context: ExitStack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as context:
            for name, module in self.model.named_modules():
                context.enter_context(module.register_forward_pre_hook(self._begin(name)))
                context.enter_context(module.register_forward_hook(self._end, always_call=True))
            fast = torch.backends.mha.get_fastpath_enabled()
            context.callback(torch.backends.mha.set_fastpath_enabled, fast)
            torch.backends.mha.set_fastpath_enabled(False)
            context.enter_context(torch.compiler.set_stance("force_eager"))
            context.enter_context(_FunctionMode(self))
            self._context = context.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._context.close()
        self._running = []

    def _begin(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self._running.append([name, 0])

        return hook

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._running:
            self._running.pop()

    def seen(self, *args: Any, **options: Any) -> None:
        """Hand a call with these arguments on."""
        name, count = "", 1
        if self._running:
            self._running[-1][1] += 1
            name, count = self._running[-1]
        call = AttentionCall(*args, **options)
        self.handler(name if count == 1 else f"{name}#{count}", call)


class _FunctionMode(TorchFunctionMode):
    """Shows the calls of :class:`AttentionCalls` to it. What its handler computes is not seen in its turn."""

    def __init__(self, calls: AttentionCalls) -> None:
        super().__init__()
        self.calls = calls
        self.signature: inspect.Signature = inspect.signature(MULTIHEAD)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is MULTIHEAD:
            return self._multihead(args, kwargs)
        result = func(*args, **kwargs)
        if func is SDPA:
            self.calls.seen(*args, **kwargs)
        return result

    def _multihead(self, args: Any, kwargs: Any) -> Any:
        call = self.signature.bind(*args, **kwargs)
        if not call.arguments.get("need_weights", True):
            return self._shown(call)
        result = MULTIHEAD(*args, **kwargs)
        call.arguments.update(need_weights=False, training=False)
        self._shown(call)
        return result

    def _shown(self, call: inspect.BoundArguments) -> Any:
        """``F.multi_head_attention_forward``, which must run outside of the mode, lest it come here again."""

        def attention(*args: Any, **kwargs: Any) -> torch.Tensor:
            result = SDPA(*args, **kwargs)
            self.calls.seen(*args, **kwargs)
            return result

        with mock.patch.object(F, "scaled_dot_product_attention", attention):
            return MULTIHEAD(*call.args, **call.kwargs)
