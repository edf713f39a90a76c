"""Statistics of every attention head of any network: :func:`measure_model`, and what it returns.

A layer is a call of ``F.scaled_dot_product_attention`` (:mod:`.calls`) or a non-local block (:mod:`.blocks`), which has
one head. Heads are measured one by one, from rows of random queries, so memory is linear in the number of positions.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sized
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ..modules import DisentangledMultiheadAttention
from .blocks import adapter
from .calls import AttentionCall, AttentionCalls, NotMeasured
from .head_tables import head_sections
from .masks import queries_with_keys
from .measure import QUERIES, AttentionStatistics, measure_terms, sample_queries
from .probe import AttentionProbe, BlockReport, evaluation, progress_bar
from .results import Estimate
from .tables import as_markdown
from .terms import Terms


@dataclasses.dataclass
class LayerReport:
    """Statistics of one attention layer of a network, over all inputs that it has seen.

    Attributes:
        name: of the module that computes it; the network itself is "".
        heads: a :class:`BlockReport` for each head, in their order.
        remarks: what there is beside query, key and value, such as "causal".

    Example:
        >>> import torch
        >>> from dnl_ext.analysis import measure_model
        >>> (layer,) = measure_model(torch.nn.MultiheadAttention(8, 2), [(torch.randn(9, 8),) * 3]).layers.values()
        >>> len(layer.heads), layer.heads[1].images[0].queries
        (2, 9)
    """

    name: str
    heads: list[BlockReport] = dataclasses.field(default_factory=list)
    remarks: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class ModelReport:
    """Statistics of every attention head of a network; see :func:`measure_model`.

    Attributes:
        layers: dict of a :class:`LayerReport` by name, in the order in which they were computed first.
        skipped: dict of the reasons why layers are left out, by name.

    Example:
        >>> import torch
        >>> from dnl_ext.analysis import measure_model
        >>> encoder = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        >>> report = measure_model(encoder, [torch.randn(1, 9, 16)])
        >>> list(report.layers), len(report.ranking())
        (['self_attn'], 2)
    """

    layers: dict[str, LayerReport] = dataclasses.field(default_factory=dict)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)

    def heads(self) -> list[tuple[str, int, dict[str, Estimate]]]:
        """(layer, head, {figure: Estimate over inputs}) of every head, in the order of the network."""
        return [
            (layer.name, number, head.summary())
            for layer in self.layers.values()
            for number, head in enumerate(layer.heads)
        ]

    def ranking(self) -> list[tuple[str, int, dict[str, Estimate]]]:
        """:meth:`heads` by the Jensen-Shannon divergence of their rows: those that ignore the query most come first."""

        def divergence(entry: tuple[str, int, dict[str, Estimate]]) -> float:
            return entry[2]["total.jsd"].value

        return sorted((entry for entry in self.heads() if "total.jsd" in entry[2]), key=divergence)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers of all layers, heads and inputs, for JSON."""
        layers = [
            {"name": layer.name, "remarks": layer.remarks, "heads": [head.to_dict() for head in layer.heads]}
            for layer in self.layers.values()
        ]
        return {"layers": layers, "skipped": self.skipped}

    def table(self) -> str:
        """Layers, and heads by how far they ignore the query, as Markdown tables."""
        return "\n".join(as_markdown(section) for section in head_sections(self))


class HeadRecorder:
    """The handler of :class:`AttentionCalls` that measures every head; see :func:`measure_model`."""

    def __init__(self, report: ModelReport, queries: int | None, seed: int, left_out: Iterable[str]) -> None:
        self.report = report
        self.queries = queries
        self.seed = seed
        self.left_out: tuple[str, ...] = tuple(left_out)

    def __call__(self, name: str, call: AttentionCall) -> None:
        """Measure a call of the module of this name."""
        if any(name == block or name.startswith(f"{block}.") or not block for block in self.left_out):
            return
        layer = self.report.layers.get(name, LayerReport(name))
        measured = False
        try:
            with torch.no_grad(), torch.autocast(call.query.device.type, enabled=False):
                for _, head, terms in call.heads():
                    measured |= self._add(layer, head, terms)
        except NotMeasured as error:
            self.report.skipped[name] = str(error)
            return
        if not measured:
            self.report.skipped[name] = "its mask leaves fewer than two keys, or queries with a key"
            return
        self.report.layers[name] = layer
        layer.remarks += [remark for remark in call.remarks() if remark not in layer.remarks]

    def _add(self, layer: LayerReport, head: int, terms: Terms) -> bool:
        while len(layer.heads) <= head:
            layer.heads.append(BlockReport(f"{layer.name}[{len(layer.heads)}]"))
        images = layer.heads[head].images
        # All heads of an input are seen from the same queries.
        generator = torch.Generator().manual_seed(self.seed + len(images))
        statistics = measure_head(terms, self.queries, generator)
        if statistics is not None:
            images.append(statistics)
        return statistics is not None


def measure_head(terms: Terms, queries: int | None, generator: torch.Generator) -> AttentionStatistics | None:
    """Statistics of one head from random queries that see any key; None where fewer than two do."""
    order = sample_queries(terms.queries, None, generator)
    if terms.pair_mask is not None:
        order = order[queries_with_keys(terms.pair_mask, terms.queries, terms.value.device).cpu()[order]]
    return measure_terms(terms, order[:queries], generator=generator) if len(order) > 1 else None


def call_model(model: nn.Module, arguments: Any) -> Any:
    """The output of a network for arguments as :func:`measure_model` takes them."""
    if isinstance(arguments, Mapping):
        return model(**arguments)
    if isinstance(arguments, (tuple, list)):
        return model(*arguments)
    return model(arguments)


def on_device(arguments: Any, device: torch.device) -> Any:
    """Tensors of tuples, lists and mappings moved to a device."""
    if isinstance(arguments, torch.Tensor):
        return arguments.to(device)
    if isinstance(arguments, Mapping):
        return {name: on_device(value, device) for name, value in arguments.items()}
    if type(arguments) in (tuple, list):
        return type(arguments)(on_device(value, device) for value in arguments)
    return arguments


@torch.no_grad()
def measure_model(
    model: nn.Module,
    inputs: Iterable[Any],
    *,
    queries: int | None = QUERIES,
    seed: int = 0,
    progress: bool | Callable[[int, int | None], object] = False,
) -> ModelReport:
    """Degeneration, decomposition and entropy of every attention head of a network.

    Measured are every call of ``torch.nn.functional.scaled_dot_product_attention`` and every ``nn.MultiheadAttention``
    (whatever its ``need_weights``), head by head, and the non-local blocks that :func:`block_inputs` knows. So it takes
    the transformers of PyTorch, torchvision, timm, transformers and diffusers. The network runs in evaluation mode, on
    the device of its first parameter; nothing of Nq x Nk is kept, and its results are unchanged.

    A mask that all queries share takes keys away, one that depends on the query is added to the pairwise logits:
    :class:`Terms`. Attention that a network computes by matrix products of its own is not seen.

    Args:
        model: any nn.Module.
        inputs: iterable of what the network is called with: a tensor, a tuple or list of arguments, or a mapping of
            named ones.
        queries: random queries of each head and input, None for all.
        seed: of the random queries.
        progress: True for a rich bar where rich is installed, or a callable ``progress(done, total or None)`` in
            inputs.

    Returns:
        A :class:`ModelReport`. It has no layers where no attention was seen; what was seen and left out is in
        ``.skipped``.

    Raises:
        ValueError: a number of queries below 2.

    Example:
        >>> import torch
        >>> from dnl_ext.analysis import measure_model
        >>> decoder = torch.nn.TransformerDecoder(torch.nn.TransformerDecoderLayer(16, 2, 32, batch_first=True), 2)
        >>> target, memory = torch.randn(1, 5, 16), torch.randn(1, 7, 16)
        >>> report = measure_model(decoder, [(target, memory)])
        >>> list(report.layers)
        ['layers.0.self_attn', 'layers.0.multihead_attn', 'layers.1.self_attn', 'layers.1.multihead_attn']
        >>> layer, head, figures = report.ranking()[0]  # the head that ignores the query most
        >>> 0 < figures["total.jsd"].value < figures["total.entropy"].value
        True
    """
    if queries is not None and (isinstance(queries, bool) or not isinstance(queries, int) or queries < 2):
        raise ValueError(f"queries: expected None or a number of at least 2, got {queries!r}")
    report = ModelReport()
    blocks = [name for name, module in model.named_modules() if adapter(module) is not None]
    probe = AttentionProbe(model, queries, seed) if blocks else None
    parameters = itertools.chain(model.parameters(), model.buffers())
    device = next((x.device for x in parameters), torch.device("cpu"))
    total = len(inputs) if isinstance(inputs, Sized) else None
    with (
        evaluation(model),
        AttentionCalls(model, HeadRecorder(report, queries, seed, blocks)),
        probe or nullcontext(),
        progress_bar(progress, total) as advance,
    ):
        for done, arguments in enumerate(inputs, 1):
            call_model(model, on_device(arguments, device))
            advance(done, total)
    for name in report.layers:  # some of whose calls may have been too small
        report.skipped.pop(name, None)
    if probe is not None:
        report.layers.update({name: LayerReport(name, [block]) for name, block in probe.blocks.items() if block.images})
        report.skipped.update(probe.skipped)
    for name, module in model.named_modules():
        if isinstance(module, DisentangledMultiheadAttention):
            report.skipped[name] = "a DisentangledMultiheadAttention; restore(model, report) puts the original back"
    return report
