"""Do the maps keep to what is in the image: pairwise rows to the query's class, the unary map to class boundaries?

The paper reports such figures (Yin et al., ECCV 2020, section 3), but the exact definition behind them is not public.
The definitions here are this library's; compare each figure with the uniform value beside it, not with the paper's
numbers.

    own class    mass: share of a query's attention that lies on keys of its own class, mean over queries.
                 correlation: Pearson's r over the keys between a query's weights and [same class], mean over queries.
    boundaries   mass: share of the unary map on boundary keys. correlation: Pearson's r between the map and [boundary].

A boundary key is one that has a direct neighbour of another class, in any spatial dimension. Keys without a class
(``IGNORE``) count nowhere: rows are taken over the other keys and brought back to sum 1. Attention that is spread
evenly has the mass ``uniform`` (the class's share of the keys, or the boundaries') and the correlation 0.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch

#: Label of positions that have no class.
IGNORE = 255


@dataclasses.dataclass(frozen=True)
class Consistency:
    """How well attention weights keep to a set of keys, such as those of the query's class, or class boundaries.

    nan where nothing can be said: no key with a class, or, for the correlation, keys that are all alike.

    Attributes:
        mass: share of the attention that lies on the set, 0 .. 1.
        uniform: what ``mass`` would be for uniform attention, the set's share of the keys.
        correlation: Pearson's r between the weights and membership in the set, -1 .. 1.
        queries: number of queries that were averaged over; 1 for a map that all queries share.

    Example:
        >>> from dnl_ext.analysis import Consistency
        >>> found = Consistency(mass=0.6, uniform=0.25, correlation=0.4, queries=100)
        >>> found.mass > found.uniform  # more than uniform attention would have
        True
    """

    mass: float
    uniform: float
    correlation: float
    queries: int


def labels_on_grid(label: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Class of the pixel in the middle of each cell of a coarser grid.

    Args:
        label: int64 tensor of the image's spatial shape.
        shape: the grid's shape, of as many dimensions and no finer.

    Returns:
        int64 tensor of ``shape``.

    Example:
        >>> import torch
        >>> from dnl_ext.analysis import labels_on_grid
        >>> labels_on_grid(torch.arange(16).view(4, 4), (2, 2))
        tensor([[ 5,  7],
                [13, 15]])
    """
    for dim, size in enumerate(shape):
        places = ((torch.arange(size, dtype=torch.float64) + 0.5) * (label.shape[dim] / size)).long()
        label = label.index_select(dim, places.clamp(max=label.shape[dim] - 1).to(label.device))
    return label


def boundaries(labels: torch.Tensor) -> torch.Tensor:
    """Which positions have a direct neighbour of another class, in any spatial dimension.

    Positions without a class (label 255, ``IGNORE``) and their neighbours are no boundary on that account.

    Args:
        labels: int64 tensor of class numbers, of any shape.

    Returns:
        bool tensor of the shape of ``labels``.

    Example:
        >>> import torch
        >>> from dnl_ext.analysis import boundaries
        >>> boundaries(torch.tensor([[0, 0, 1], [0, 0, 1], [0, 0, 255]]))
        tensor([[False,  True,  True],
                [False,  True,  True],
                [False, False, False]])
    """
    found = torch.zeros_like(labels, dtype=torch.bool)
    for dim in range(labels.dim()):
        size = labels.shape[dim]
        if size < 2:
            continue
        first, second = labels.narrow(dim, 0, size - 1), labels.narrow(dim, 1, size - 1)
        differ = (first != second) & (first != IGNORE) & (second != IGNORE)
        found.narrow(dim, 0, size - 1).logical_or_(differ)
        found.narrow(dim, 1, size - 1).logical_or_(differ)
    return found


def map_consistency(weights: torch.Tensor, member: torch.Tensor, valid: torch.Tensor) -> Consistency:
    """:class:`Consistency` of one map with a set of keys: weights (N,), member and valid bool (N,)."""
    weights, member = weights[valid].double(), member[valid].double()
    if not len(weights):
        return Consistency(math.nan, math.nan, math.nan, 0)
    a, b = weights - weights.mean(), member - member.mean()
    spread = float(a.norm() * b.norm())
    correlation = float(a @ b) / spread if float(b.norm()) > 0 and spread > 0 else math.nan
    return Consistency(float(weights @ member / weights.sum()), float(member.mean()), correlation, 1)


class OwnClassAccumulator:
    """Own-class mass and correlation of rows, gathered chunk by chunk.

    Args:
        query_labels: int64 tensor (Nq,). key_labels: int64 tensor (Nk,).
        dtype: of the rows.

    Work per row is one product with the Nk x classes indicator of the keys' classes, not a comparison per key.
    """

    def __init__(self, query_labels: torch.Tensor, key_labels: torch.Tensor, dtype: torch.dtype) -> None:
        self.query_labels = query_labels
        self.classes: torch.Tensor = key_labels[key_labels != IGNORE].unique()
        self.indicator: torch.Tensor = (key_labels[:, None] == self.classes).to(dtype)  # (Nk, classes)
        self.valid: torch.Tensor = (key_labels != IGNORE).to(dtype)
        self.counts: torch.Tensor = self.indicator.sum(0, dtype=torch.float64)
        self.masses: list[torch.Tensor] = []
        self.uniforms: list[torch.Tensor] = []
        self.correlations: list[torch.Tensor] = []

    def add(self, queries: torch.Tensor, rows: torch.Tensor) -> None:
        """Add rows (n, Nk) of the queries with these numbers (n,); queries without a class are left out."""
        own = self.query_labels[queries]
        keep = own != IGNORE
        if not len(self.classes) or not keep.any():
            return
        own, rows = own[keep], rows[keep]
        by_class = (rows @ self.indicator).double()  # (n, classes)
        same = own[:, None] == self.classes
        total, count = by_class.sum(1), float(self.counts.sum())
        mass = (by_class * same).sum(1) / total
        share = (self.counts * same).sum(1) / count
        # Pearson's r with a 0/1 variable of mean `share`, from sums over the keys that have a class.
        centred = rows - (total / count)[:, None].to(rows.dtype)
        squares = (centred.square() @ self.valid).double()
        spread = torch.sqrt(squares * count * share * (1 - share))
        correlation = (mass - share) * total / spread
        self.masses.append(mass)
        self.uniforms.append(share)
        self.correlations.append(correlation[(share > 0) & (share < 1) & (squares > 0)])

    def result(self) -> Consistency:
        """A :class:`Consistency`."""
        if not self.masses:
            return Consistency(math.nan, math.nan, math.nan, 0)
        masses, uniforms, correlations = (torch.cat(x) for x in (self.masses, self.uniforms, self.correlations))
        return Consistency(
            float(masses.mean()),
            float(uniforms.mean()),
            float(correlations.mean()) if len(correlations) else math.nan,
            len(masses),
        )
