"""Degeneration: do all queries look at the same places? As GCNet measures it (Cao et al., ICCVW 2019, section 3).

Two distances between the rows a, b of two queries, averaged over pairs of different queries:

    cosine distance            (1 - cos(a, b)) / 2                                   0 .. 1
    Jensen-Shannon divergence  H((a + b) / 2) - (H(a) + H(b)) / 2, natural logarithm   0 .. log 2

and the cosine distance of a block's inputs and outputs between positions. 0 says that all are equal.

The cosine mean over all n (n - 1) / 2 pairs needs no pair: with unit vectors e_i the sum of all cos(e_i, e_j), equal
pairs included, is |sum_i e_i|^2. The divergence has no such form; it is measured on disjoint pairs of random queries,
which are independent, so that their deviation over the root of their number is its standard error. The cosine of the
rows is the mean over all pairs of the same queries; for it the disjoint pairs give an upper bound of the standard
error (Hoeffding 1948: the mean over all pairs varies no more than the mean over disjoint ones).
"""

import dataclasses

import torch

from .results import Estimate

#: Below this norm a vector has no direction: its cosine with any other counts as 0.
TINY = 1e-30


def mean_cosine_distance(x: torch.Tensor) -> float:
    """Mean of (1 - cos) / 2 over all pairs of different rows, exact, in O(n C).

    Args:
        x: float tensor (n, C), n >= 2, such as a block's input at n positions.

    Returns:
        A float, 0 .. 1/2 + 1 / (2 (n - 1)).

    Raises:
        ValueError: fewer than two rows.

    Example:
        >>> import torch
        >>> from dnl_ext.analysis import mean_cosine_distance
        >>> mean_cosine_distance(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 4.0]]))
        0.33333333333333337

    Source: Cao et al., "GCNet", ICCVW 2019, section 3.
    """
    if x.dim() != 2 or x.shape[0] < 2:
        raise ValueError(f"x: expected shape (n, C) with n >= 2, got {tuple(x.shape)}")
    total, directed = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device), 0
    for part in x.split(4096):  # float64 sums without a float64 copy of the whole
        part = part.double()
        norms = part.norm(dim=1, keepdim=True)
        total += (part / norms.clamp(min=TINY)).sum(0)
        directed += int((norms > TINY).sum())
    return cosine_of_sum(total, directed, x.shape[0])


def cosine_of_sum(total: torch.Tensor, directed: int, count: int) -> float:
    """Mean cosine distance of ``count`` unit vectors, ``directed`` of them not zero, from their sum (C,)."""
    cosines = float(total.square().sum()) - directed  # ordered pairs of different vectors
    return 0.5 * (1 - cosines / (count * (count - 1)))


def row_entropy(rows: torch.Tensor) -> torch.Tensor:
    """H = -sum_j p_j log p_j of each row (..., N), with 0 log 0 = 0, in float64."""
    return torch.special.entr(rows).sum(-1, dtype=torch.float64)


@dataclasses.dataclass(frozen=True)
class RowStatistics:
    """entropy: mean over rows, in nats. cosine_distance, jsd: means over pairs of rows, see the module."""

    entropy: Estimate
    cosine_distance: Estimate
    jsd: Estimate


class RowAccumulator:
    """Entropy, cosine distance and Jensen-Shannon divergence of the rows of one map, gathered chunk by chunk.

    Rows 0 and 1, 2 and 3, ... of every chunk are the disjoint pairs; the caller gives the queries in random order.
    """

    def __init__(self) -> None:
        self.entropies: list[torch.Tensor] = []
        self.divergences: list[torch.Tensor] = []
        self.cosines: list[torch.Tensor] = []
        self.total: torch.Tensor | float = 0.0

    def add(self, rows: torch.Tensor) -> None:
        """Add a chunk of rows (n, N), each a distribution."""
        entropy = row_entropy(rows)
        self.entropies.append(entropy)
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        self.total = self.total + (1 / norms).to(rows.dtype) @ rows
        pairs = rows.shape[0] // 2
        first, second = rows[0 : 2 * pairs : 2], rows[1 : 2 * pairs : 2]
        middle = row_entropy((first + second).mul_(0.5))
        divergence = middle - (entropy[0 : 2 * pairs : 2] + entropy[1 : 2 * pairs : 2]) / 2
        self.divergences.append(divergence.clamp(min=0))
        dots = (first * second).sum(1, dtype=torch.float64)
        self.cosines.append(dots / (norms[0 : 2 * pairs : 2] * norms[1 : 2 * pairs : 2]))

    def result(self) -> RowStatistics:
        """A :class:`RowStatistics`."""
        entropies = torch.cat(self.entropies)
        count = len(entropies)
        divergence = Estimate.of(torch.cat(self.divergences))
        pairs = Estimate.of((1 - torch.cat(self.cosines)) / 2)
        cosine = cosine_of_sum(torch.as_tensor(self.total).double(), count, count) if count > 1 else float("nan")
        return RowStatistics(
            Estimate.of(entropies), Estimate(cosine, pairs.stderr, count * (count - 1) // 2), divergence
        )
