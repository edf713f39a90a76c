"""What an ablation trains: one run is a variant, a temperature and a seed."""

import dataclasses
from collections.abc import Sequence

from .recipes import Row


@dataclasses.dataclass(frozen=True)
class Run:
    """One training of an ablation.

    Attributes:
        variant: of the block, as :class:`dnl_ext.DisentangledNonLocal2d` names it, or "none".
        temperature: divides the block's logits; None where there are no pairwise logits.
        seed: of weights and training images.

    Example:
        >>> from dnl_ext.segmentation.experiments import Run
        >>> Run("dnl", 0.05, 0).name
        'dnl-T0.05-seed0'
    """

    variant: str
    temperature: float | None
    seed: int

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        temperature = "" if self.temperature is None else f"-T{self.temperature:g}"
        return f"{self.variant}{temperature}-seed{self.seed}"

    @property
    def row(self) -> Row:
        """The row of the table that it belongs to, by variant and temperature."""
        return self.variant, self.temperature


def plan(rows: Sequence[Row], seeds: Sequence[int]) -> list[Run]:
    """All runs, seed by seed, so that what is finished at any time compares the same seeds."""
    return [Run(variant, temperature, seed) for seed in seeds for variant, temperature in rows]
