"""Coupling: does the gradient of one term depend on the value of the other? The paper's argument, measured.

Let p_ij be the pairwise map, u_j the unary one, w_ij the weights of the values v_j, and g_ij = dL/dw_ij = <dy_i, v_j>.
The standard non-local block multiplies, w_ij = p_ij u_j / Z_i with Z_i = sum_l p_il u_l. The disentangled one adds,
w_ij = p_ij + u_j. With the maps as free variables the chain rule gives

    product    dL/dp_ij = (u_j  / Z_i) (g_ij - sum_l w_il g_il)      query i's part of dL/du_j:  the same with p_ij
    sum        dL/dp_ij = g_ij                                       query i's part of dL/du_j = g_ij

so under the product a term learns nothing at a position where the other is small. The statistic is an elasticity: the
slope of the least-squares line through the points (log u_j, log |dL/dp_ij|), over the keys j of each query i, each
query with a constant of its own (which takes Z_i away), and the correlation r within queries. Likewise with the two
maps exchanged.

    pairwise_by_unary   slope of log |dL/dp_ij| on log u_j            1: proportional to the other; 0: independent of it
    unary_by_pairwise   slope of log |query i's dL/du_j| on log p_ij

Where g itself varies with the map, for instance because the unary term favours positions whose values are long, the
figures differ from 1 and 0. That part is given beside each as ``values``: the slope of log |dL/dw_ij| on the same
logarithm. What is left, slope - values, is what the block's own form does. The statistic is ours; the
argument is the paper's (Yin et al., ECCV 2020, section 3). dy comes from a loss where the caller gives it; otherwise
it is standard normal: the mean over directions in which a loss might pull.
"""

import dataclasses
import math

import torch

from .terms import Rows, Terms

#: Added to |g| before its logarithm, relative to the mean of |g|, so that a zero gradient stays a number.
FLOOR = 1e-12


@dataclasses.dataclass(frozen=True)
class Slope:
    """A least-squares line with a constant per query; nan where nothing varies.

    Attributes:
        slope: of the logarithm of one term's gradient on the logarithm of the other term's weights.
        correlation: of the two within queries, -1 .. 1.
        values: the part of the slope that comes from the gradient by the attention weights, dL/dw, itself.

    Example:
        >>> from dnl_ext.analysis import Slope
        >>> line = Slope(slope=1.1, correlation=0.9, values=0.1)
        >>> round(line.slope - line.values, 6)  # what the product of the two terms makes of it
        1.0
    """

    slope: float
    correlation: float
    values: float


@dataclasses.dataclass(frozen=True)
class Coupling:
    """How much the gradient of one term depends on the value of the other: about 1 in a product, 0 in a sum.

    The module ``dnl_ext.analysis.coupling`` has the definition.

    Attributes:
        pairwise_by_unary: :class:`.Slope` of the pairwise term's gradient on the unary weights.
        unary_by_pairwise: :class:`.Slope` of the unary term's gradient on the pairwise weights.

    Example:
        >>> import torch
        >>> from dnl_ext.analysis import attention_terms, measure_terms
        >>> terms = attention_terms(torch.randn(64, 16), torch.randn(64, 16), torch.randn(64, 32), torch.randn(64))
        >>> line = measure_terms(terms).coupling.pairwise_by_unary
        >>> abs(line.slope - line.values) < 1e-6  # the two terms of a disentangled block are not coupled
        True
    """

    pairwise_by_unary: Slope
    unary_by_pairwise: Slope


class SlopeAccumulator:
    """Sums for the lines of y + factor * x, and of y alone, on x over the columns of rows (n, N).

    Each row has a constant of its own. ``factor`` is 1 where the gradient has the other map as a factor, else 0.
    """

    def __init__(self, factor: int) -> None:
        self.factor = factor
        self.xx: float = 0.0
        self.xy: float = 0.0
        self.yy: float = 0.0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add rows: y (n, N); x (n, N), or (1, N) for the same x in every row."""
        x = x - x.mean(1, keepdim=True)
        y = y - y.mean(1, keepdim=True)
        self.xx += float(x.square().sum(dtype=torch.float64)) * (y.shape[0] / x.shape[0])
        self.xy += float((x * y).sum(dtype=torch.float64))
        self.yy += float(y.square().sum(dtype=torch.float64))

    def result(self) -> Slope:
        """A :class:`Slope`."""
        if not self.xx > 0:
            return Slope(math.nan, math.nan, math.nan)
        values = self.xy / self.xx
        joint = self.factor * self.xx + self.xy
        spread = math.sqrt(self.xx * max(self.yy + self.factor * (2 * self.xy + self.xx), 0.0))
        return Slope(joint / self.xx, joint / spread if spread > 0 else math.nan, values)


class CouplingAccumulator:
    """Coupling of the two terms of :class:`terms.Terms`, gathered chunk by chunk."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        factor = 1 if terms.joint == "product" else 0
        self.by_unary: SlopeAccumulator = SlopeAccumulator(factor)
        self.by_pairwise: SlopeAccumulator = SlopeAccumulator(factor)

    def add(self, rows: Rows, grad_output: torch.Tensor) -> None:
        """Add queries.

        Args:
            rows: their :class:`terms.Rows`.
            grad_output: dL/dy of these queries, tensor (n, Dv).
        """
        gradient = grad_output @ self.terms.value.T  # g (n, Nk)
        assert self.terms.log_unary is not None and rows.log_pairwise is not None
        if self.terms.joint == "product":
            assert rows.total is not None
            gradient -= (rows.total * gradient).sum(1, keepdim=True)
        magnitude = gradient.abs_()
        magnitude = magnitude.add_(FLOOR * magnitude.mean()).log_()
        self.by_unary.add(self.terms.log_unary[None], magnitude)
        self.by_pairwise.add(rows.log_pairwise, magnitude)

    def result(self) -> Coupling:
        """A :class:`Coupling`."""
        return Coupling(self.by_unary.result(), self.by_pairwise.result())
