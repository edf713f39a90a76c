"""Everything about one image's attention in one pass over rows of sampled queries.

The pass computes a chunk of rows, hands it to every accumulator, and forgets it. What is exact (decomposition, entropy
of the unary map, cosine distance of inputs and outputs) needs no rows. The rest is a mean over ``queries`` random
queries without replacement; on a map of 32,768 positions 256 of them take a fraction of the block's forward.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..types import Joint, Whitening
from .consistency import IGNORE, Consistency, OwnClassAccumulator, boundaries, map_consistency
from .coupling import Coupling, CouplingAccumulator
from .decomposition import Decomposition, decompose
from .degeneration import RowAccumulator, mean_cosine_distance, row_entropy
from .results import Estimate, to_dict
from .terms import Terms, whiten_pair

#: Queries per image where the caller names no number.
QUERIES = 256


@dataclasses.dataclass(frozen=True)
class TermStatistics:
    """Statistics of one map of a block, pairwise, unary or total.

    Attributes:
        entropy: mean of H = -sum_j p_j log p_j over queries, in nats.
        entropy_share: the mean divided by log Nk, 0 .. 1; 1 is uniform attention.
        cosine_distance: of the rows of two queries, mean over pairs of different queries, 0 .. 1; 0 says that all
            queries have the same map. None for the unary map, which all queries share.
        jsd: Jensen-Shannon divergence of the rows of two queries, mean over disjoint pairs of queries, 0 .. log 2; None
            for the unary map.
        own_class: how well queries attend to their own class; None without labels and for the unary map.
        boundaries: how well the unary map keeps to class boundaries; None without labels and for the other maps.

    Example:
        >>> import torch
        >>> from dnl_ext.analysis import attention_terms, measure_terms
        >>> terms = attention_terms(torch.zeros(9, 4), torch.zeros(9, 4), torch.randn(9, 4))
        >>> round(measure_terms(terms).total.entropy_share, 5)  # equal logits: uniform attention
        1.0
    """

    entropy: Estimate
    entropy_share: float
    cosine_distance: Estimate | None
    jsd: Estimate | None
    own_class: Consistency | None
    boundaries: Consistency | None


@dataclasses.dataclass(frozen=True)
class AttentionStatistics:
    """Statistics of one block's attention in one image (and head); :mod:`dnl_ext.analysis` says what each part is.

    Attributes:
        joint: how the block joins its terms: "product", "sum", "pairwise" or "unary".
        queries: number of query positions.
        keys: number of key positions.
        sampled: number of queries whose attention weights were looked at.
        pairwise: :class:`TermStatistics` of the pairwise map; None where the block has none.
        unary: the same of the unary map.
        total: the same of what the block applies; None also where a learned gain is negative.
        decomposition: :class:`Decomposition`; None for a block without query and key.
        coupling: :class:`Coupling`; None for a block with a single term, and under a mask that depends on the query.
        input_cosine_distance: mean cosine distance of the block's input between positions; None if it was not given.
        output_cosine_distance: the same of its output.
        mask: :class:`TermStatistics` of a mask that depends on the query, by itself: what attention of equal logits
            would have; None without one.

    Example:
        >>> import torch
        >>> from dnl_ext.analysis import attention_terms, measure_terms
        >>> terms = attention_terms(torch.randn(9, 4), torch.randn(9, 4), torch.randn(9, 4))
        >>> statistics = measure_terms(terms)
        >>> statistics.joint, statistics.queries
        ('pairwise', 9)
        >>> sorted(statistics.to_dict())[:3]
        ['coupling', 'decomposition', 'input_cosine_distance']
    """

    joint: Joint
    queries: int
    keys: int
    sampled: int
    pairwise: TermStatistics | None
    unary: TermStatistics | None
    total: TermStatistics | None
    decomposition: Decomposition | None
    coupling: Coupling | None
    input_cosine_distance: float | None
    output_cosine_distance: float | None
    mask: TermStatistics | None = None

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of numbers; what is not finite is None."""
        return to_dict(self)


def sample_queries(
    count: int, wanted: int | None, generator: torch.Generator | None = None, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """``wanted`` of ``count`` query numbers in random order, all of them where ``wanted`` is None or larger.

    With ``labels`` (Nq,), queries that have a class come first, so that others are drawn only where those run out.
    """
    order = torch.randperm(count, generator=generator)
    if labels is not None:
        order = order[torch.argsort((labels.cpu()[order] == IGNORE).to(torch.int8), stable=True)]
    return order if wanted is None else order[:wanted]


@torch.no_grad()
def measure_terms(
    terms: Terms,
    queries: int | torch.Tensor | None = QUERIES,
    *,
    labels: tuple[torch.Tensor, torch.Tensor] | None = None,
    grad_output: torch.Tensor | None = None,
    inputs: torch.Tensor | None = None,
    outputs: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> AttentionStatistics:
    """All statistics of one image's attention.

    Args:
        terms: a :class:`Terms`.
        queries: how many random queries to take rows of (None: all), or an int64 tensor of query numbers, whose order
            decides which are compared in pairs.
        labels: (query labels, key labels), int64 tensors of the queries' and the keys' spatial shapes; None: none.
        grad_output: dL/dy at the attention's output, tensor (Nq, Dv), for the coupling; None draws it.
        inputs: the block's input, tensor (N, C); None leaves its distance out.
        outputs: the block's output, likewise.
        generator: torch.Generator on the CPU of everything random; None: one with seed 0.
        progress: called as ``progress(done, total)`` in rows, after every chunk.

    Returns:
        An :class:`AttentionStatistics`.

    Raises:
        ValueError: a number of queries below 2, or a shape that does not fit.

    Example:
        >>> import torch
        >>> from dnl_ext.analysis import attention_terms, measure_terms
        >>> terms = attention_terms(torch.randn(64, 16), torch.randn(64, 16), torch.randn(64, 32), torch.randn(64))
        >>> statistics = measure_terms(terms, queries=32)
        >>> statistics.sampled, statistics.unary is None
        (32, False)
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    flat_labels = None if labels is None else [x.flatten().to(terms.value.device) for x in labels]
    check_shapes(terms, queries, flat_labels, grad_output)
    if not isinstance(queries, torch.Tensor):
        queries = sample_queries(terms.queries, queries, generator, None if flat_labels is None else flat_labels[0])
    chosen = queries.to(terms.value.device)

    maps = {name: RowAccumulator() for name in map_names(terms)}
    classes = {}
    if flat_labels is not None:
        query_labels, key_labels = flat_labels
        classes = {name: OwnClassAccumulator(query_labels, key_labels, terms.value.dtype) for name in maps}
    # Under a mask that depends on the query there are weights of exactly 0, which have no logarithm.
    coupled = terms.joint in ("product", "sum") and terms.pair_mask is None
    coupling = CouplingAccumulator(terms) if coupled else None
    done = 0
    for part in chosen.split(terms.chunk()):
        rows = terms.rows(part)
        for name, accumulator in maps.items():
            accumulator.add(getattr(rows, name))
            if classes:
                classes[name].add(part, getattr(rows, name))
        if coupling is not None:
            coupling.add(rows, upstream(terms, grad_output, part, generator))
        done += len(part)
        if progress is not None:
            progress(done, len(chosen))

    def rows_of(name):
        if name not in maps:
            return None
        result = maps[name].result()
        share = result.entropy.value / math.log(terms.positions) if terms.positions > 1 else math.nan
        own = classes[name].result() if classes else None
        return TermStatistics(result.entropy, share, result.cosine_distance, result.jsd, own, None)

    pairwise = rows_of("pairwise")
    return AttentionStatistics(
        joint=terms.joint,
        queries=terms.queries,
        keys=terms.positions,
        sampled=len(chosen),
        pairwise=pairwise,
        unary=None if terms.unary is None else unary_statistics(terms, None if labels is None else labels[1]),
        total=pairwise if terms.joint == "pairwise" else rows_of("total"),
        decomposition=decompose(terms),
        coupling=None if coupling is None else coupling.result(),
        input_cosine_distance=None if inputs is None else mean_cosine_distance(inputs),
        output_cosine_distance=None if outputs is None else mean_cosine_distance(outputs),
        mask=rows_of("mask"),
    )


def map_names(terms: Terms) -> tuple[str, ...]:
    """The maps to gather rows of: the total of a block with the pairwise term alone is the same map."""
    if terms.joint == "unary":
        return ("total",)
    if terms.pair_mask is not None:
        return ("pairwise", "total", "mask")
    return ("pairwise",) if terms.joint == "pairwise" or not terms.gain >= 0 else ("pairwise", "total")


def upstream(
    terms: Terms, grad_output: torch.Tensor | None, part: torch.Tensor, generator: torch.Generator | None
) -> torch.Tensor:
    """dL/dy (n, Dv) of some queries: the caller's, or standard normal."""
    if grad_output is not None:
        return grad_output[part].to(terms.value.dtype)
    shape = (len(part), terms.value.shape[1])
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(terms.value)


def unary_statistics(terms: Terms, key_labels: torch.Tensor | None) -> TermStatistics:
    """:class:`TermStatistics` of the unary map."""
    assert terms.unary is not None
    entropy = float(row_entropy(terms.unary))
    share = entropy / math.log(terms.positions) if terms.positions > 1 else math.nan
    edges = None
    if key_labels is not None:
        member, valid = boundaries(key_labels).flatten(), key_labels.flatten() != IGNORE
        edges = map_consistency(terms.unary, member.to(terms.unary.device), valid.to(terms.unary.device))
    return TermStatistics(Estimate(entropy, math.nan, 1), share, None, None, None, edges)


def check_shapes(
    terms: Terms,
    queries: int | torch.Tensor | None,
    flat_labels: Sequence[torch.Tensor] | None,
    grad_output: torch.Tensor | None,
) -> None:
    """Raise ValueError where something does not fit the terms."""
    if isinstance(queries, torch.Tensor):
        if queries.dim() != 1 or queries.dtype != torch.int64 or len(queries) < 2:
            raise ValueError(f"queries: expected an int64 tensor (n,) with n >= 2, got {tuple(queries.shape)}")
        if int(queries.min()) < 0 or int(queries.max()) >= terms.queries:
            raise ValueError(f"queries: expected numbers from 0 to {terms.queries - 1}")
    elif queries is not None and (isinstance(queries, bool) or not isinstance(queries, int) or queries < 2):
        raise ValueError(f"queries: expected None, a number of at least 2 or an int64 tensor, got {queries!r}")
    for name, x, count in zip(
        ("query labels", "key labels"), flat_labels or (), (terms.queries, terms.positions), strict=False
    ):
        if len(x) != count:
            raise ValueError(f"labels: expected {count} {name}, got {len(x)}")
    shape = (terms.queries, terms.value.shape[1])
    if grad_output is not None and tuple(grad_output.shape) != shape:
        raise ValueError(f"grad_output: expected shape {shape}, got {tuple(grad_output.shape)}")


def attention_terms(
    query: torch.Tensor | None,
    key: torch.Tensor | None,
    value: torch.Tensor,
    mask_logits: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    whiten: Whitening | None = "channel",
    gain: torch.Tensor | float = 1.0,
) -> Terms:
    """Terms of one image's attention, from the arguments of :func:`dnl_ext.disentangled_attention`.

    Args:
        query: tensor (Nq, Dqk), or None together with ``key`` for a block without a pairwise term.
        key: tensor (Nk, Dqk), or None.
        value: tensor (Nk, Dv).
        mask_logits: tensor (Nk,), the logits of the unary term, or None.
        scale: factor of the pairwise logits; None means 1 / sqrt(Dqk).
        whiten: name of the whitening of query and key, as in :func:`dnl_ext.whiten`, or None.
        gain: factor of the pairwise term in the sum of the two.

    Returns:
        :class:`Terms`, for :func:`measure_terms` and :func:`decompose`.

    Raises:
        ValueError: one of query and key without the other, or neither and no ``mask_logits``.

    Example:
        >>> import torch
        >>> from dnl_ext.analysis import attention_terms
        >>> terms = attention_terms(torch.randn(9, 4), torch.randn(9, 4), torch.randn(9, 4), whiten=None)
        >>> terms.joint  # the standard non-local block multiplies a pairwise with a unary map
        'product'
    """
    if scale is None:
        scale = 1.0 if query is None else 1 / math.sqrt(query.shape[-1])
    query, key = whiten_pair(query, key, whiten)
    return Terms(query, key, value, mask_logits, scale, whiten is not None, gain)
