"""Validation samples of a trainer as batches: what the experiments measure attention on."""

from collections.abc import Iterator

import torch

from ..training.trainer import Trainer


class ValidationSamples:
    """Validation samples of a trainer, evenly spread, as batches of one: images or features, and labels (1, H, W)."""

    def __init__(self, trainer: Trainer, count: int) -> None:
        size = trainer.data.validation_size
        self.trainer: Trainer = trainer
        self.numbers: list[int] = [n * size // min(count, size) for n in range(min(count, size))]

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for number in self.numbers:
            sample, label = self.trainer.source.validation_sample(number)
            yield sample[None], label[None]
