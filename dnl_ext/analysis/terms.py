"""The attention of one image as terms whose rows can be had a few at a time: pairwise, unary and total.

What the terms are depends on how the block joins them:

    joint       the block computes                pairwise                  unary              total
    product     softmax(s q_i.k_j), unwhitened    softmax(s (q_i-mu).k_j)   softmax(s mu.k_j)  P_ij u_j / Z_i
    sum         gain softmax(s q'_i.k'_j) + u_j   softmax(s q'_i.k'_j)      u = softmax(m_j)   (gain P + u) / (gain + 1)
    pairwise    softmax(s q'_i.k'_j)              the same                  -                  the same
    unary       u_j                               -                         u                  the same

mu is the mean query. The first line is the paper's split of the standard non-local block (Yin et al., ECCV 2020,
section 3): it multiplies two maps that can be looked at one by one, although it computes their product only. It is the
split of any softmax attention: a mask that depends on the query is then added to the logits of the pairwise map, a bias
of the keys to those of the unary one, so that the product is still what is computed.

A row of a map is Nk numbers. Everything here works on chunks of rows, so memory is linear in Nq and Nk.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .. import reference
from ..modules import AttentionInputs
from ..types import Joint, Whitening
from .masks import PairMask

#: Values in one chunk of rows: 4 MB of float32, so that a chunk and its temporaries stay near the caches.
CHUNK_VALUES = 2**20


class Rows(NamedTuple):
    """Rows of the maps for n queries: pairwise, its logarithm and total (n, Nk), unary (Nk,); None where there is none.

    ``total`` is None too where a learned gain is negative: the block then has no map of positive weights. ``mask``
    (n, Nk) is the map of a mask by itself, of logits that are all equal; None without a mask that depends on the query.
    """

    log_pairwise: torch.Tensor | None
    pairwise: torch.Tensor | None
    unary: torch.Tensor | None
    total: torch.Tensor | None
    mask: torch.Tensor | None = None


class Terms:
    """The pairwise, unary and total attention weights of one image, of which any rows can be computed.

    Computed in float64 for float64 inputs, otherwise in float32.

    Args:
        query: tensor (Nq, Dqk) or None, whitened as the block does it.
        key: tensor (Nk, Dqk) or None, whitened as the block does it.
        value: tensor (Nk, Dv).
        mask_logits: tensor (Nk,) or None.
        scale: as in :class:`dnl_ext.modules.AttentionInputs`.
        whitened: whether the block whitens.
        gain: as in :class:`dnl_ext.modules.AttentionInputs`.
        queries: their number, needed where there is no ``query``; None: as many as keys.
        key_bias: tensor (Nk,) added to the logits of all queries, or None. This and ``pair_mask`` are for a product.
        pair_mask: what else is added to the logits, a :class:`.masks.PairMask`, or None.

    Attributes:
        joint: how the block joins its terms. "product": it computes softmax(q.k) unwhitened, which is the product of a
            pairwise map, of the query less its mean, and a unary one, of the mean query. "sum": a whitened pairwise map
            and the softmax of the mask logits. "pairwise", "unary": one of the two alone.
        query: the query times ``scale``, so that the logits are ``query @ key.T``; None without a pairwise term.
        key: the key; None without a pairwise term.
        pair_query: the query of the pairwise term, less its mean where the joint is the product.
        unary_logits: logits of the unary map, tensor (Nk,); None without one.
        gain: factor of the pairwise term.
        queries: Nq.
        positions: Nk.
        key_bias: as given.
        pair_mask: as given.

    Raises:
        ValueError: one of query and key without the other, or neither and no ``mask_logits``; a bias or mask where the
            joint is not the product.

    Example:
        >>> import torch
        >>> from dnl_ext.analysis import attention_terms
        >>> terms = attention_terms(torch.randn(9, 4), torch.randn(7, 4), torch.randn(7, 4), torch.randn(7))
        >>> rows = terms.rows(torch.tensor([0, 8]))  # of the first and the last query
        >>> rows.pairwise.shape, rows.unary.shape
        (torch.Size([2, 7]), torch.Size([7]))
    """

    def __init__(
        self,
        query: torch.Tensor | None,
        key: torch.Tensor | None,
        value: torch.Tensor,
        mask_logits: torch.Tensor | None,
        scale: float,
        whitened: bool,
        gain: torch.Tensor | float = 1.0,
        queries: int | None = None,
        key_bias: torch.Tensor | None = None,
        pair_mask: PairMask | None = None,
    ) -> None:
        wide = torch.float64 if value.dtype == torch.float64 else torch.float32
        self.value: torch.Tensor = value.to(wide)
        self.gain: float = float(gain)
        self.positions: int = value.shape[0]
        self.queries: int = query.shape[0] if query is not None else self.positions if queries is None else queries
        if (query is None) != (key is None) or (query is None and mask_logits is None):
            raise ValueError("query, key: expected both, or neither and mask_logits")
        self.joint: Joint = "unary"
        self.query: torch.Tensor | None = None
        self.key: torch.Tensor | None = None
        self.pair_query: torch.Tensor | None = None
        self.unary_logits: torch.Tensor | None = None if mask_logits is None else mask_logits.to(wide)
        if query is not None and key is not None:
            self.query, self.key = query.to(wide) * scale, key.to(wide)
            self.joint = "sum" if mask_logits is not None else "pairwise" if whitened else "product"
            self.pair_query = self.query
            if self.joint == "product":
                mean = self.query.mean(0)
                self.pair_query = self.query - mean
                self.unary_logits = self.key @ mean
                if key_bias is not None:
                    self.unary_logits = self.unary_logits + key_bias
        self.key_bias: torch.Tensor | None = key_bias
        self.pair_mask: PairMask | None = pair_mask
        if self.joint != "product" and not (key_bias is None and pair_mask is None):
            raise ValueError(f"key_bias, pair_mask: expected None for the joint {self.joint!r}")
        self.log_unary: torch.Tensor | None = None
        self.unary: torch.Tensor | None = None
        if self.unary_logits is not None:
            self.log_unary = torch.log_softmax(self.unary_logits, 0)
            self.unary = self.log_unary.exp()

    def rows(self, queries: torch.Tensor) -> Rows:
        """The rows (``Rows``) of the queries with these numbers (n,); the caller keeps n small."""
        if self.pair_query is None or self.key is None:
            assert self.unary is not None
            return Rows(None, None, self.unary, self.unary.expand(len(queries), -1))
        logits, mask = self.pair_query[queries] @ self.key.T, None
        if self.pair_mask is not None:
            added = self.pair_mask.rows(queries).to(logits)
            logits, mask = logits + added, torch.softmax(added, 1)
        logs = torch.log_softmax(logits, 1)
        pairwise = logs.exp()
        if self.unary is None or self.log_unary is None:
            return Rows(logs, pairwise, None, pairwise)
        if self.joint == "product":
            return Rows(logs, pairwise, self.unary, torch.softmax(logs + self.log_unary, 1), mask)
        if not self.gain >= 0:
            return Rows(logs, pairwise, self.unary, None)
        # A gain of 0 leaves the unary map for every query; 1 is the block without a learned one.
        return Rows(logs, pairwise, self.unary, pairwise.mul(self.gain).add_(self.unary).div_(self.gain + 1))

    def chunk(self) -> int:
        """Rows to compute at once."""
        return max(2, CHUNK_VALUES // self.positions // 2 * 2)  # an even number: rows are compared in pairs


def whiten_pair(
    query: torch.Tensor | None, key: torch.Tensor | None, name: Whitening | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Query (..., Nq, D) and key (..., Nk, D), in float32 or wider, whitened as :mod:`dnl_ext.reference` defines it."""
    if query is None or key is None:
        return None, None
    query, key = (x.detach().to(torch.promote_types(x.dtype, torch.float32)) for x in (query, key))
    return reference.whiten(query, name), reference.whiten(key, name)


def split_images(inputs: AttentionInputs) -> Iterator[Terms]:
    """The :class:`Terms` of every image (and head) of a block's :class:`dnl_ext.modules.AttentionInputs`, in order."""
    lead = inputs.value.shape[:-2]
    query, key = whiten_pair(inputs.query, inputs.key, inputs.whiten)  # first: a whitening may span the batch

    def flat(x: torch.Tensor | None, dims: int) -> list[Any]:
        return [None] * math.prod(lead) if x is None else list(x.detach().reshape(-1, *x.shape[-dims:]))

    gain = float(torch.as_tensor(inputs.gain).detach())
    parts = (flat(query, 2), flat(key, 2), flat(inputs.value, 2), flat(inputs.mask_logits, 1))
    for query_part, key_part, value, mask in zip(*parts, strict=True):
        yield Terms(
            query_part,
            key_part,
            value,
            mask,
            inputs.scale,
            inputs.whiten is not None or inputs.whitened,
            gain,
            math.prod(inputs.query_shape),
        )
