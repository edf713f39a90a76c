"""What a block's figures give reason to look at: attention that has saturated, that ignores the query, that is flat."""

import math
from collections.abc import Mapping

from .results import Estimate

#: Entropy, as a share of log N, below which rows are called saturated: of 2,700 keys five have nearly all the weight.
SATURATED = 0.2
#: Variance of the logits above which rows are called saturated where the entropy is not known.
EXTREME = 1000.0
#: Entropy share above which rows are called flat.
FLAT = 0.99
#: Jensen-Shannon divergence of the rows below which all queries are said to have one map.
ONE_MAP = 0.02


def remarks_on(summary: Mapping[str, Estimate]) -> list[str]:
    """Sentences about what stands out in a block's figures, each with the figure and what can be done.

    Args:
        summary: {figure: :class:`Estimate`}, what :meth:`BlockReport.summary` returns.

    Returns:
        list of str, empty where nothing stands out.

    Example:
        >>> from dnl_ext.analysis import Estimate, remarks_on
        >>> figures = {"pairwise.entropy_share": 0.05, "decomposition.variance": 76_000.0, "total.jsd": 0.6}
        >>> print(remarks_on({name: Estimate(value, 0.0, 8) for name, value in figures.items()})[0])
        saturated: pairwise rows have 0.05 of the largest entropy, logits a variance of 76,000; hardly a gradient \
reaches query and key: train with a higher temperature or a lower learning rate
    """
    figures = {name: estimate.value for name, estimate in summary.items()}
    entropy = figures.get("pairwise.entropy_share", math.nan)
    variance = figures.get("decomposition.variance", math.nan)
    divergence = figures.get("total.jsd", math.nan)
    found = []
    if entropy < SATURATED or (math.isnan(entropy) and variance > EXTREME):
        found.append(
            f"saturated: pairwise rows have {entropy:.2f} of the largest entropy, logits a variance of {variance:,.0f}"
            "; hardly a gradient reaches query and key: train with a higher temperature or a lower learning rate"
        )
    elif entropy > FLAT:
        found.append(
            f"flat: pairwise rows have {entropy:.3f} of the largest entropy; the attention is nearly a mean over all "
            "positions: train longer, or with a lower temperature"
        )
    if divergence < ONE_MAP and figures.get("total.entropy_share", 1.0) < FLAT and "pairwise.jsd" in figures:
        found.append(
            f"degenerate: the Jensen-Shannon divergence of rows is {divergence:.3f} of at most 0.693; all queries have "
            "nearly one map"
        )
    return found
