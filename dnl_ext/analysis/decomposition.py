"""Where the variance of a block's logits comes from: pairwise, unary or a constant per row. Exact, in O(N D^2).

With mu_q, mu_k the means over positions of (whitened, scaled) queries and keys, the logits split exactly into

    <q_i, k_j> = <q_i - mu_q, k_j - mu_k>  +  <mu_q, k_j>  +  <q_i - mu_q, mu_k>
                 whitened pairwise            unary           constant per row

(Yin et al., ECCV 2020, section 3; the last part leaves the softmax as it is). It is a two-way analysis of
variance: over all (i, j) the parts are uncorrelated, so their variances add up to that of the logits. They are second
moments: with the D x D sums of products Q = sum_i q'_i q'_i^T and K = sum_j k'_j k'_j^T of the centred ones the
pairwise variance is trace(Q K) / (Nq Nk), the others are <mu_q, K mu_q> / Nk and <mu_k, Q mu_k> / Nq. No N x N map.

A bias of the keys is in the unary part. A mask that depends on the query is in none: the shares are those of the
products.
"""

import dataclasses

import torch

from .terms import Terms


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """Variance of a block's logits over all pairs of query and key, and what share of it each part has.

    Attributes:
        variance: of the logits.
        pairwise: share of the whitened pairwise part, 0 .. 1. The three shares add up to 1; nan where all logits are
            equal.
        unary: share of the unary part.
        row: share of the part that is constant per query.
        unary_of_map: unary / (unary + pairwise), the share among the parts that the softmax sees. 1 means that all
            queries have the same map.
        mask_variance: of the unary term's own logits over the keys, in a block that has them; else None.

    Example:
        >>> import torch
        >>> from dnl_ext.analysis import attention_terms, decompose
        >>> found = decompose(attention_terms(torch.randn(30, 8), torch.randn(40, 8), torch.randn(40, 8), whiten=None))
        >>> round(found.pairwise + found.unary + found.row, 6)
        1.0
    """

    variance: float
    pairwise: float
    unary: float
    row: float
    unary_of_map: float
    mask_variance: float | None


def decompose(terms: Terms) -> Decomposition | None:
    """Split the variance of a block's logits into a pairwise, a unary and a per-query part, exactly and in O(N D^2).

    Products run in the type of the terms, sums of the parts in float64.

    Args:
        terms: of :func:`dnl_ext.analysis.attention_terms`.

    Returns:
        :class:`Decomposition`; None for a block without query and key.

    Example:
        >>> import torch
        >>> from dnl_ext.analysis import attention_terms, decompose
        >>> query, key, value = torch.randn(30, 8), torch.randn(40, 8), torch.randn(40, 16)
        >>> decompose(attention_terms(query, key, value, whiten="channel")).unary < 1e-6  # whitening takes it away
        True

    Source: Yin et al., "Disentangled Non-Local Neural Networks", ECCV 2020, section 3.
    """
    if terms.query is None or terms.key is None:
        return None
    query_mean, key_mean = (x.mean(0, keepdim=True) for x in (terms.query, terms.key))
    queries, keys = second_moment(terms.query, query_mean), second_moment(terms.key, key_mean)
    query_mean, key_mean = query_mean[0].double(), key_mean[0].double()
    pairwise = max(float((queries * keys).sum()), 0.0)  # trace(Q K), both symmetric
    unary = max(float(query_mean @ keys @ query_mean), 0.0)
    if terms.key_bias is not None and terms.unary_logits is not None:
        unary = float(terms.unary_logits.double().var(correction=0))
    row = max(float(key_mean @ queries @ key_mean), 0.0)
    variance = pairwise + unary + row
    mask = None
    if terms.joint == "sum" and terms.unary_logits is not None:
        mask = float(terms.unary_logits.double().var(correction=0))
    whole = variance if variance else float("nan")
    of_map = unary / (unary + pairwise) if unary + pairwise else float("nan")
    return Decomposition(variance, pairwise / whole, unary / whole, row / whole, of_map, mask)


def second_moment(x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """mean_i (x_i - mean) (x_i - mean)^T: float64 tensor (D, D) from x (n, D), mean (1, D)."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in x.split(8192):
        part = part - mean
        total += part.T @ part
    return total / x.shape[0]
