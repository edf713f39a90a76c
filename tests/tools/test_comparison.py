"""The ablation's rows and differences, and what it says of the unary map."""

import dataclasses
import math

import pytest
import torch
from test_frozen import FROZEN, data  # noqa: F401  a fixture

from dnl_ext.segmentation.experiments import unary_detail as detail
from dnl_ext.segmentation.experiments.ablation_report import compared, differences
from dnl_ext.segmentation.experiments.comparison import Difference, difference
from dnl_ext.segmentation.experiments.recipes import RECIPES, rows
from dnl_ext.segmentation.experiments.runs import Run
from dnl_ext.segmentation.experiments.unary_detail import UnaryMap, unary_detail, unary_maps
from dnl_ext.segmentation.training.trainer import Trainer, segmentation_loss


def results(values):
    """{Run: result} from {(variant, temperature): one mIoU per seed}; None is a seed without a run."""
    return {
        Run(*row, seed): {"miou": miou, "attention": {"total.jsd": 1 - miou}}
        for row, entries in values.items()
        for seed, miou in enumerate(entries)
        if miou is not None
    }


class TestDifference:
    def test_is_paired_by_seed(self):
        """Rows that lie far apart from seed to seed, with a small difference in every one of them."""
        found = difference(
            results({("dnl", 0.05): (0.11, 0.52, 0.91, None), ("nl", 1.0): (0.10, 0.50, 0.90, 0.3)}),
            ("dnl", 0.05), ("nl", 1.0), "miou",
        )  # fmt: skip
        assert found.mean == pytest.approx(0.04 / 3) and found.seeds == 3
        assert found.deviation == pytest.approx(0.01 / math.sqrt(3))
        # t = 4 with two degrees of freedom: p = 1 - t / sqrt(t^2 + 2).
        assert found.p == pytest.approx(1 - 4 / math.sqrt(18))

    def test_says_nothing_where_it_cannot(self):
        one = difference(results({("dnl", 1.0): (0.5,), ("nl", 1.0): (0.4,)}), ("dnl", 1.0), ("nl", 1.0), "miou")
        assert one[:3] == (pytest.approx(0.1), pytest.approx(math.nan, nan_ok=True), 1) and math.isnan(one.p)
        none = difference(results({("dnl", 1.0): (0.5,)}), ("dnl", 1.0), ("nl", 1.0), "miou")
        assert none.seeds == 0 and math.isnan(none.mean)
        missing = difference(results({("dnl", 1.0): (0.5,), ("nl", 1.0): (0.4,)}), ("dnl", 1.0), ("nl", 1.0), "x")
        assert missing.seeds == 0

    def test_report_compares_with_the_standard_block_and_temperatures(self):
        pairs = compared([("nl", 1.0), ("dnl", 1.0), ("dnl", 0.05), ("none", None)])
        assert set(pairs) == {
            (("dnl", 1.0), ("nl", 1.0)),
            (("dnl", 0.05), ("nl", 1.0)),
            (("none", None), ("nl", 1.0)),
            (("dnl", 0.05), ("dnl", 1.0)),
        }
        lines = differences(results({("nl", 1.0): (0.5, 0.6), ("dnl", 0.05): (0.53, 0.62)}))
        assert any(line.startswith("| dnl, T = 0.05 | nl, T = 1 | mIoU, % | 2.5 ± 0.7 | 2 |") for line in lines)
        assert differences(results({("nl", 1.0): (0.5,), ("dnl", 0.05): (0.53,)})) == []

    def test_is_a_tuple(self):
        assert Difference(0.1, 0.2, 3, 0.4).p == 0.4


class TestRows:
    def test_camvid_has_nine_and_no_block(self):
        recipe = RECIPES["camvid"]
        assert len(recipe.choose(None, None)) == 10 and ("none", None) in recipe.rows and recipe.split == "test"
        assert set(recipe.rows) == {*rows(("nl", "pairwise", "dnl_shared_key", "dnl"), (1.0, 0.05)),
                                    ("unary", None), ("none", None)}  # fmt: skip

    def test_chosen(self):
        trained = RECIPES["camvid_trained"]
        assert trained.choose(["nl"], None) == (("nl", 1.0), ("nl", 0.05))
        assert trained.choose(["dnl"], None) == (("dnl", 0.05),)
        assert trained.choose(["unary"], None) == (("unary", None),)  # not the recipe's own
        assert trained.choose(["dnl"], [0.5]) == (("dnl", 0.5),)
        assert RECIPES["context"].choose(None, [0.1])[:2] == (("nl", 0.1), ("pairwise", 0.1))


class TestUnaryDetail:
    LABEL = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]]).expand(8, 8)

    def figures(self, monkeypatch, weights, gradient=None):
        monkeypatch.setattr(
            detail, "unary_maps", lambda trainer, count: iter([UnaryMap(weights, gradient, self.LABEL)])
        )
        return unary_detail(None, 1)

    def test_a_map_on_one_class(self, monkeypatch):
        found = self.figures(monkeypatch, (self.LABEL == 1).float() / 32)
        assert found["unary.class.1.lift"] == pytest.approx(2) and found["unary.class.0.lift"] == 0
        assert found["unary.band1.uniform"] == pytest.approx(4 / 8)  # the boundary's two columns, and one on each side
        assert found["unary.band1.mass"] == pytest.approx(2 / 4) and found["unary.band2.mass"] == pytest.approx(3 / 4)

    def test_a_map_on_the_boundary_and_its_gradient(self, monkeypatch):
        edge = torch.zeros(8, 8)
        edge[:, 3:5] = 1 / 16
        found = self.figures(monkeypatch, edge, torch.ones(8, 8))
        assert found["unary.band1.mass"] == pytest.approx(1) and found["unary.gradient.mass"] == pytest.approx(2 / 8)

    def test_gradient_is_that_of_the_loss(self, data, tmp_path):  # noqa: F811
        """Against a finite difference of the loss, at the token where it is largest."""
        torch.manual_seed(0)
        trainer = Trainer(FROZEN, tmp_path, data=data)
        block = trainer.network.block
        for conv in (block.g.conv, block.conv_out.conv):
            torch.nn.init.normal_(conv.weight)
        torch.nn.init.ones_(block.conv_out.bn.weight)
        (found,) = unary_maps(trainer, 1)
        sample, label = trainer.source.validation_sample(0)
        row, column = divmod(int(found.gradient.argmax()), found.gradient.shape[1])

        def loss(step):
            def shift(_module, _arguments, output):
                output = output.clone()
                output[0, 0, row, column] += step
                return output

            hook = block.conv_mask.register_forward_hook(shift)
            with torch.no_grad():
                value = segmentation_loss(trainer.head(sample[None], label.shape), label[None])
            hook.remove()
            return float(value)

        slope = abs(loss(0.2) - loss(-0.2)) / 0.4
        assert slope == pytest.approx(float(found.gradient.max()), rel=0.05) and slope > 1e-4
        assert trainer.network.classifier.weight.grad is None

    def test_a_block_without_a_unary_term(self, data, tmp_path):  # noqa: F811
        trainer = Trainer(dataclasses.replace(FROZEN, variant="pairwise"), tmp_path, data=data)
        assert unary_detail(trainer, 1) == {}
