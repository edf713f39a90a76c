"""The built-in task in which a region's class is shown somewhere else, and the encoder's own task beside it."""

import numpy as np
import pytest
import torch

from dnl_ext.segmentation.data import context
from dnl_ext.segmentation.data.context import ContextData, PretextData
from dnl_ext.segmentation.errors import InputError
from dnl_ext.segmentation.experiments.ablation import Ablation, quiet
from dnl_ext.segmentation.experiments.runs import Run
from dnl_ext.segmentation.training.config import TrainConfig
from dnl_ext.segmentation.training.trainer import Trainer, open_data


@pytest.fixture(scope="module")
def data():
    return ContextData((96, 192), 3)


class TestMosaic:
    def test_is_a_function_of_its_numbers(self, data):
        for first, again in zip(
            data.training_mosaic(1, 2, (64, 96)), data.training_mosaic(1, 2, (64, 96)), strict=True
        ):
            assert torch.equal(first, again)
        assert not torch.equal(data.training_sample(1, 2, (64, 96))[0], data.training_sample(1, 3, (64, 96))[0])
        assert not torch.equal(data.training_sample(2, 2, (64, 96))[0], data.training_sample(1, 2, (64, 96))[0])

    def test_every_class_is_shown_clearly_somewhere_and_hidden_elsewhere(self, data):
        for index in range(10):
            mosaic = data.training_mosaic(0, index, (128, 256))
            kinds = set(mosaic.label.unique().tolist())
            assert len(kinds) == context.GROUPS
            assert set(mosaic.label[mosaic.clear].unique().tolist()) == kinds
            assert set(mosaic.label[~mosaic.clear].unique().tolist()) == kinds

    def test_a_class_has_one_tint_per_image_and_another_in_the_next(self, data):
        """Clear and hidden cells of a class have the same colour; the same class differs between images."""
        by_class = {}
        for index in range(12):
            image, label, clear, _ = data.training_mosaic(0, index, (128, 256))
            color = image - image.mean(0)
            for kind in label.unique().tolist():
                here = [color[:, (label == kind) & part].mean(1) for part in (clear, ~clear)]
                assert (here[0] - here[1]).norm() < 0.12
                others = [color[:, label == other].mean(1) for other in label.unique().tolist() if other != kind]
                assert all((here[0] - other).norm() > 0.15 for other in others)
                by_class.setdefault(kind, []).append(here[0])
        for colors in by_class.values():
            if len(colors) > 3:
                assert torch.stack(colors).std(0).norm() > 0.1

    def test_a_hidden_cell_does_not_show_its_class(self):
        """The same random numbers with two classes exchanged: hidden pixels are the same, clear ones are not."""
        sources = ContextData((64, 64), 1).sources["train"]
        swapped = [sources[1], sources[0], *sources[2:]]
        first = context.compose(np.random.default_rng(5), sources[:3], (96, 192))
        second = context.compose(np.random.default_rng(5), swapped[:3], (96, 192))
        assert torch.equal(first.clear, second.clear) and torch.equal(first.label, second.label)
        assert torch.equal(first.image[:, ~first.clear], second.image[:, ~first.clear])
        changed = first.clear & (first.label < 2)
        assert (first.image[:, changed] != second.image[:, changed]).float().mean() > 0.9

    def test_pretext_labels_are_visible(self, data):
        pretext = PretextData((96, 192), 2)
        assert len(pretext.classes) == len(data.classes) + context.HUES
        seen = set()
        for index in range(6):
            mosaic = pretext.training_mosaic(0, index, (128, 256))
            texture = mosaic.pretext < len(data.classes)
            assert not (texture & ~mosaic.clear).any()
            assert torch.equal(mosaic.pretext[texture], mosaic.label[texture])
            seen |= set(mosaic.pretext.unique().tolist())
        assert max(seen) < len(pretext.classes) and len(seen) > context.HUES


class TestTraining:
    def test_open_data(self):
        config = TrainConfig(task="context", crop=(64, 96), val_images=2)
        assert open_data(config).name == "context" and open_data(config).validation_size == 2
        with pytest.raises(InputError, match="--task must be one of mosaic, context, got x"):
            TrainConfig(task="x")

    @pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
    def test_runs(self, optimizer):
        config = TrainConfig(
            task="context", steps=2, crop=(64, 96), batch_size=1, width=4, val_images=1, threads=1, optimizer=optimizer,
            lr=0.01,
        )  # fmt: skip
        trainer = Trainer(config)
        trainer.run()
        assert trainer.step == 2 and trainer.miou is not None
        assert type(trainer.optimizer).__name__ == {"adamw": "AdamW", "sgd": "SGD"}[optimizer]

    @pytest.mark.slow
    def test_a_network_without_the_block_cannot_do_it(self, tmp_path):
        """The check of the task itself, a few minutes: hidden cells need the block."""
        ablation = Ablation(tmp_path, variants=("dnl",), temperatures=(0.05,), seeds=(0,), pretext=1000,
                            overrides={"steps": 400, "val_images": 16}, images=4)  # fmt: skip
        data, hidden = open_data(ablation.base), {}
        for variant in ("none", "dnl"):
            trainer = ablation.train(Run(variant, None, 0), variant, data, quiet)
            right = total = 0
            for index in range(data.validation_size):
                mosaic = data.validation_mosaic(index)
                correct = trainer.predict(mosaic.image) == mosaic.label
                right += int(correct[~mosaic.clear].sum())
                total += int((~mosaic.clear).sum())
            hidden[variant] = right / total
        assert hidden["none"] < 0.4  # 1/3 is what guessing among an image's classes gives
        assert hidden["dnl"] > hidden["none"] + 0.2
