"""What the analysis returns: dataclasses of plain numbers, `.to_dict()`, and their mean over images."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from typing_extensions import Self


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over a sample, with its standard error.

    Attributes:
        value: the mean.
        stderr: its standard error (deviation of the sample over the root of its size); nan for a sample of one.
        count: size of the sample.

    Example:
        >>> from dnl_ext.analysis import Estimate
        >>> print(Estimate.of([1.0, 2.0, 3.0]))
        2 ± 0.6
    """

    value: float
    stderr: float
    count: int

    @classmethod
    def of(cls, sample: torch.Tensor | Sequence[float]) -> Self:
        """The mean of a tensor (n,) or a list of numbers."""
        sample = [float(x) for x in sample]
        count = len(sample)
        if not count:
            return cls(math.nan, math.nan, 0)
        mean = math.fsum(sample) / count
        if count < 2:
            return cls(mean, math.nan, count)
        return cls(mean, math.sqrt(math.fsum((x - mean) ** 2 for x in sample) / (count - 1) / count), count)

    def __str__(self) -> str:
        return f"{self.value:.4g}" if math.isnan(self.stderr) else f"{self.value:.4g} ± {self.stderr:.1g}"


def to_dict(result: Any) -> Any:
    """A result dataclass as nested dicts of numbers, strings and lists; what is not a number becomes None."""
    if dataclasses.is_dataclass(result):
        return {field.name: to_dict(getattr(result, field.name)) for field in dataclasses.fields(result)}
    if isinstance(result, dict):
        return {key: to_dict(value) for key, value in result.items()}
    if isinstance(result, (list, tuple)):
        return [to_dict(value) for value in result]
    return None if isinstance(result, float) and not math.isfinite(result) else result


def flatten(result: Any, prefix: str = "") -> dict[str, float]:
    """The figures of a result as {"pairwise.jsd": float}; an :class:`Estimate` is one; counts, None, nan are none."""
    if isinstance(result, Estimate):
        result = result.value
    if dataclasses.is_dataclass(result):
        result = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    if isinstance(result, dict):
        return {
            name: number
            for key, value in result.items()
            for name, number in flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: result} if isinstance(result, float) and math.isfinite(result) else {}


def over_images(results: Sequence[Any]) -> dict[str, Estimate]:
    """Mean over images of every figure, {"pairwise.jsd": Estimate}; images that lack a figure do not count for it."""
    flat = [flatten(result) for result in results]
    names = dict.fromkeys(name for entry in flat for name in entry)
    return {name: Estimate.of([entry[name] for entry in flat if name in entry]) for name in names}
