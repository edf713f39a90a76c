"""What the training minimises: class weights and where they come from, the auxiliary head."""

import dataclasses
import json

import pytest
import torch
from test_cli import assert_one_line, run, train
from test_data import make_plain, write_image, write_label
from test_train import TINY, assert_same

from dnl_ext.segmentation.data import FolderData, MosaicData
from dnl_ext.segmentation.errors import InputError
from dnl_ext.segmentation.metrics import IGNORE
from dnl_ext.segmentation.network import SegmentationNetwork
from dnl_ext.segmentation.training import Trainer, checkpoint, class_weights, restore, segmentation_loss
from dnl_ext.segmentation.training.class_weights import balanced, count_pixels


@pytest.fixture(scope="module")
def data():
    return MosaicData((64, 96), 1)


class TestClassWeights:
    #: Pixels of four classes, the last of which occurs nowhere, in three images.
    COUNTS = torch.tensor([[60, 40, 0, 0], [90, 0, 10, 0], [50, 0, 0, 0]])

    def test_balanced(self):
        """N = 250 pixels, 3 classes that occur: 250 / (3 * 200), 250 / (3 * 40), 250 / (3 * 10)."""
        found = balanced("balanced", self.COUNTS)
        torch.testing.assert_close(found, torch.tensor([250 / 600, 250 / 120, 250 / 30, 0]))
        shares = found * self.COUNTS.sum(0)
        torch.testing.assert_close(shares[:3], torch.full((3,), 250 / 3))

    def test_median_frequency(self):
        """Frequencies 200 / 250, 40 / 100, 10 / 100, the denominators being the images in which a class occurs."""
        found = balanced("median-frequency", self.COUNTS)
        torch.testing.assert_close(found, torch.tensor([0.4 / 0.8, 1.0, 0.4 / 0.1, 0]))

    def test_the_kinds_differ_where_a_class_is_in_few_images(self):
        kinds = [balanced(kind, self.COUNTS) for kind in ("balanced", "median-frequency")]
        ratios = [weights[1] / weights[0] for weights in kinds]
        assert ratios[0] == pytest.approx(5) and ratios[1] == pytest.approx(2)

    def test_pixels_of_the_training_images_alone(self, tmp_path):
        for split, values in (("train", (0, 0, 0, 1)), ("val", (1, 1, 1, 1)), ("test", (1, 1, 0, 0))):
            write_image(tmp_path / f"images/{split}/{split}.png")
            write_label(tmp_path / f"labels/{split}/{split}.png", values)
        write_label(tmp_path / "labels/train/train.png", (0, 0, 0, 1, 255, 255, 255, 255))
        data = FolderData(tmp_path)
        assert count_pixels(data).tolist() == [[3 * 48 * 8, 48 * 8]]
        torch.testing.assert_close(class_weights("balanced", data), torch.tensor([4 / 6, 4 / 2]))

    def test_nothing_labelled(self):
        with pytest.raises(InputError, match="--class-weights balanced: the training images have no labelled pixel"):
            balanced("balanced", torch.zeros(2, 3, dtype=torch.int64))

    def test_files(self, data, tmp_path):
        path = tmp_path / "weights.json"
        path.write_text(json.dumps({name: number for number, name in reversed(list(enumerate(data.classes)))}))
        assert class_weights(str(path), data).tolist() == list(range(8))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("[1, 2]", r"expected 8 numbers in .*, got 2"),
            ("3", r"expected 8 numbers in .*, got int"),
            ("[1, 1, 1, 1, 1, 1, 1, -1]", "expected numbers of at least 0 in .*, got -1"),
            ("[1, 1, 1, 1, 1, 1, 1, NaN]", "got nan"),
            ("[1, 1, 1, 1, 1, 1, 1, Infinity]", "got inf"),
            ('[1, 1, 1, 1, 1, 1, 1, "1"]', "got '1'"),
            ("[1, 1, 1, 1, 1, 1, 1, true]", "got True"),
            ("[0, 0, 0, 0, 0, 0, 0, 0]", "got 0 for every class"),
            ('{"brick": 1}', "lacks the class 'coins'"),
            ("{", "is no JSON file"),
        ],
    )
    def test_bad_files(self, content, message, data, tmp_path):
        (tmp_path / "weights.json").write_text(content)
        with pytest.raises(InputError, match=rf"^--class-weights: .*{message}") as raised:
            class_weights(str(tmp_path / "weights.json"), data)
        assert "\n" not in str(raised.value)


class TestWeightedLoss:
    def test_is_torch_s_weighted_mean(self):
        logits, labels = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
        labels[0, 0] = IGNORE
        weights = torch.tensor([0.2, 1.0, 3.0])
        expected = torch.nn.CrossEntropyLoss(weights, ignore_index=IGNORE)(logits, labels)
        torch.testing.assert_close(segmentation_loss(logits, labels, weights=weights), expected)

    def test_small_weights_are_not_clipped(self):
        logits, labels, weights = (
            torch.zeros(1, 2, 1, 1),
            torch.zeros(1, 1, 1, dtype=torch.int64),
            torch.tensor([0.01, 1]),
        )
        assert segmentation_loss(logits, labels, weights=weights).item() == pytest.approx(
            torch.tensor(2.0).log().item()
        )

    def test_no_pixel_of_any_weight(self):
        labels = torch.zeros(1, 1, 1, dtype=torch.int64)
        assert segmentation_loss(torch.zeros(1, 2, 1, 1), labels, weights=torch.tensor([0.0, 1.0])).item() == 0

    def test_a_step_reports_it(self, data, tmp_path):
        (tmp_path / "w.json").write_text("[1, 0.5, 9, 0.1, 2, 3, 4, 0.2]")
        trainer = Trainer(dataclasses.replace(TINY, class_weights=str(tmp_path / "w.json")), data=data)
        images, labels = trainer.batch(0)
        with torch.no_grad():
            logits = trainer.network.train()(images)
        expected = torch.nn.CrossEntropyLoss(trainer.class_weights, ignore_index=IGNORE)(logits, labels)
        assert trainer.train_step(images, labels) == pytest.approx(expected.item(), rel=1e-5)

    def test_a_class_without_weight_is_not_learned(self, data, tmp_path):
        """Only the classes that the loss counts are predicted after some steps on one batch."""
        only = [3, 4]
        (tmp_path / "w.json").write_text(json.dumps([float(number in only) for number in range(8)]))
        config = dataclasses.replace(TINY, steps=40, width=8, lr=5e-3, class_weights=str(tmp_path / "w.json"))
        trainer = Trainer(config, data=data)
        batch = trainer.batch(0)
        for _ in range(15):
            trainer.train_step(*batch)
        assert set(trainer.predict(batch[0][0]).unique().tolist()) <= set(only)


class TestAuxiliaryHead:
    def test_logits_of_both_in_training_alone(self):
        network, images = SegmentationNetwork(5, width=4, auxiliary=True), torch.rand(2, 3, 50, 67)
        both = network(images)
        assert [logits.shape for logits in both] == [(2, 5, 50, 67)] * 2 and not torch.equal(*both)
        assert [logits.shape for logits in network(images, (10, 9))] == [(2, 5, 10, 9)] * 2
        assert network.eval()(images).shape == (2, 5, 50, 67)

    def test_is_beside_the_network(self):
        """The network's own logits are the same with it and without it, for the same weights."""
        network, images = SegmentationNetwork(5, width=4, block_gain=1.0, auxiliary=True), torch.rand(2, 3, 32, 48)
        plain = SegmentationNetwork(5, width=4)
        plain.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("auxiliary.")})
        torch.testing.assert_close(network(images)[0], plain(images))

    def test_trains_earlier_features_and_not_the_last(self):
        network = SegmentationNetwork(5, width=4, auxiliary=True)
        network(torch.rand(2, 3, 32, 48))[1].sum().backward()
        trained = {name for name, weight in network.named_parameters() if weight.grad is not None}
        assert "encoder.7.second.0.weight" in trained and "auxiliary.0.0.weight" in trained
        assert not any(name.startswith(("encoder.8", "block", "classifier")) for name in trained)

    def test_loss_is_the_weighted_sum(self, data):
        losses = {}
        for weight in (0.0, 0.5, 1.0):
            trainer = Trainer(dataclasses.replace(TINY, aux_weight=weight), data=data)
            losses[weight] = trainer.train_step(*trainer.batch(0))
        assert losses[1.0] - losses[0.0] == pytest.approx(2 * (losses[0.5] - losses[0.0]), rel=1e-3)
        assert losses[0.5] > losses[0.0] + 0.3  # of a second untrained classifier of 8 classes

    def test_init_from_a_network_without(self):
        small, network = SegmentationNetwork(4, width=4), SegmentationNetwork(4, width=4, auxiliary=True)
        for ours, theirs in ((network, small), (small, network)):
            checkpoint.load_weights(ours, {"network": theirs.state_dict()}, "x.pt", partial=True)
            assert torch.equal(ours.classifier.weight, theirs.classifier.weight)
            with pytest.raises(InputError, match="is of another network"):
                checkpoint.load_weights(ours, {"network": theirs.state_dict()}, "x.pt")


class TestTraining:
    def test_resumes_with_its_weights_bit_exactly(self, tmp_path):
        make_plain(tmp_path / "data")
        six = ("--steps", 6, "--data", tmp_path / "data", "--class-weights", "median-frequency", "--aux-weight", 0.4)
        result = train(*six, "--out", tmp_path / "straight")
        assert result.exit_code == 0, result.output
        assert "class weights: class 0 1, class 1 1, class 2 1" in result.output
        assert train(*six, "--out", tmp_path / "parts", "--stop-after", 3).exit_code == 0
        assert run("train", "--resume", "--out", tmp_path / "parts").exit_code == 0
        assert_same(*(checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("straight", "parts")))
        assert restore(tmp_path / "parts/checkpoint.pt").network.auxiliary is not None
        assert run("evaluate", tmp_path / "parts/checkpoint.pt").exit_code == 0

    def test_a_resumed_run_keeps_weights_of_a_file_that_has_gone(self, data, tmp_path):
        (tmp_path / "w.json").write_text("[1, 2, 3, 4, 5, 6, 7, 8]")
        config = dataclasses.replace(TINY, class_weights=str(tmp_path / "w.json"))
        Trainer(config, tmp_path, data=data).run(stop_after=1)
        (tmp_path / "w.json").unlink()
        resumed = Trainer(config, tmp_path, state=checkpoint.load(tmp_path / "checkpoint.pt"), data=data)
        assert resumed.class_weights.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]

    @pytest.mark.parametrize(
        ("options", "parts"),
        [
            (("--class-weights", "balanced"), ("--class-weights balanced", "needs --data DIR")),
            (("--class-weights", "nonsense"), ("balanced, median-frequency or a JSON file", "cannot read nonsense")),
            (("--aux-weight", "-1"), ("--aux-weight must not be negative, got -1",)),
            (("--aux-weight", "nan"), ("--aux-weight must not be negative, got nan",)),
        ],
    )
    def test_bad_input(self, options, parts, tmp_path):
        assert_one_line(train("--out", tmp_path, *options), *parts)

    def test_a_frozen_encoder(self, tmp_path):
        make_plain(tmp_path / "data")
        frozen = train(
            "--out", tmp_path / "out", "--data", tmp_path / "data", "--freeze-backbone", "--aux-weight", "0.4"
        )
        assert_one_line(frozen, "--aux-weight 0.4", "--freeze-backbone")
