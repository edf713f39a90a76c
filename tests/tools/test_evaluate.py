"""Splits of a folder, CamVid's layout, and ``dnl-ext evaluate``: what it counts, what it writes, bad input."""

import json

import pytest
import torch
from test_cli import assert_one_line, run, train
from test_data import make_ade20k, make_plain, write_image, write_label

from dnl_ext.segmentation.data import FolderData, find_layout, read_sample
from dnl_ext.segmentation.errors import InputError
from dnl_ext.segmentation.metrics import IGNORE, Confusion
from dnl_ext.segmentation.training import checkpoint, evaluate, evaluation_data, predict, restore


def make_splits(root, values=(0, 1, 2, 255), splits=("train", "val", "test"), count=2):
    """images/ and labels/ with a folder for each split; every split holds as many images."""
    for split in splits:
        for number in range(count):
            write_image(root / f"images/{split}/{split}{number}.png", seed=number)
            write_label(root / f"labels/{split}/{split}{number}.png", values)


def names(samples):
    return {sample.image.stem for sample in samples}


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """A folder in CamVid's layout, and a network that was trained on it for two steps."""
    root = tmp_path_factory.mktemp("road")
    make_splits(root / "data", (0, 3, 9, 10, 255))
    result = train("--data", root / "data", "--layout", "camvid", "--out", root / "run", "--block-gain", "1")
    assert result.exit_code == 0, result.output
    return root


class TestSplits:
    def test_three(self, tmp_path):
        make_splits(tmp_path)
        found = find_layout(tmp_path)
        assert [names(part) for part in (found.train, found.val, found.test)] == [
            {f"{split}0", f"{split}1"} for split in ("train", "val", "test")
        ]
        assert found.left_out == ()

    def test_without_val_nothing_of_test_is_trained_on(self, tmp_path):
        make_splits(tmp_path, splits=("train", "test"), count=5)
        found = find_layout(tmp_path)
        assert names(found.train) | names(found.val) == {f"train{number}" for number in range(5)}
        assert len(found.val) == 1 and len(found.test) == 5

    def test_test_images_without_labels_are_no_split(self, tmp_path):
        make_splits(tmp_path, splits=("train", "val"))
        write_image(tmp_path / "images/test/a.png")
        found = find_layout(tmp_path)
        assert found.test == [] and found.left_out == ("images without label (1)",)

    def test_classes_are_those_of_training(self, tmp_path):
        """What only the test labels hold is an error when it is measured, and no class that was never trained."""
        make_splits(tmp_path, splits=("train", "val"))
        make_splits(tmp_path, (0, 7), splits=("test",))
        assert len(find_layout(tmp_path).classes) == 3
        with pytest.raises(InputError, match=r"holds 7: expected 0\.\.2, 255"):
            FolderData(tmp_path, split="test").validation_sample(0)

    def test_a_flat_folder_has_none(self, tmp_path):
        make_plain(tmp_path)
        assert find_layout(tmp_path).test == []

    def test_data_of_a_split(self, tmp_path):
        make_splits(tmp_path, count=3)
        data = FolderData(tmp_path, validation_size=2, split="test")
        assert names(data.val) == {"test0", "test2"} and names(data.train) == {"train0", "train1", "train2"}
        assert data.summary == ("3 training and 2 test images; left out: test images beyond the number asked for (1)")

    def test_names_of_images(self, tmp_path):
        for name in ("train/x", "val/a/x", "val/b/x.y"):
            write_image(tmp_path / f"images/{name}.png")
            write_label(tmp_path / f"labels/{name}.png", (0, 1))
        data = FolderData(tmp_path)
        assert [data.validation_name(number) for number in range(2)] == ["a/x", "b/x.y"]
        assert FolderData(tmp_path, validation_size=1).validation_name(0) == "x"

    def test_bad_input(self, tmp_path):
        make_ade20k(tmp_path)
        with pytest.raises(InputError, match=r"--split must be one of val, test, got train"):
            FolderData(tmp_path, split="train")
        with pytest.raises(InputError, match=r"data folder .* \(ade20k layout\) has no test images with labels"):
            FolderData(tmp_path, split="test")


class TestCamVid:
    def test_is_named(self, tmp_path):
        make_splits(tmp_path, (0, 10, 11, 255))
        found = find_layout(tmp_path, "camvid")
        assert found.name == "camvid" and len(found.train) == len(found.val) == len(found.test) == 2
        assert len(found.classes) == 11 and (found.classes[3], found.classes[10]) == ("road", "bicyclist")
        assert read_sample(found.test[0])[1][0, :4].tolist() == [0, 10, IGNORE, IGNORE]
        assert find_layout(tmp_path).name == "plain"  # the folders are the same

    def test_other_values(self, tmp_path):
        make_splits(tmp_path, (0, 12))
        with pytest.raises(InputError, match=r"holds 12: expected 0\.\.11, 255"):
            read_sample(find_layout(tmp_path, "camvid").train[0])


class TestConfusion:
    def test_accuracies(self):
        confusion = Confusion(4)
        confusion.add(torch.tensor([0, 0, 1, 1, 1, IGNORE]), torch.tensor([0, 2, 1, 1, 0, 2]))
        assert confusion.accuracy() == [0.5, pytest.approx(2 / 3), None, None]
        assert confusion.mean_accuracy() == pytest.approx((0.5 + 2 / 3) / 2)  # class 2 is predicted, not present
        assert confusion.pixel_accuracy() == pytest.approx(3 / 5)

    def test_nothing_counted(self):
        assert Confusion(3).pixel_accuracy() is None and Confusion(3).mean_accuracy() is None


class Scripted(torch.nn.Module):
    """A network whose logits for its views, in the order in which it gets them, are given; it notes the views."""

    def __init__(self, *logits):
        super().__init__()
        self.logits, self.views = list(logits), []

    def forward(self, images):
        self.views.append(images)
        return self.logits.pop(0)


def logits_of(*pixels):
    """Logits (1, 2, 1, W) of two classes from one pair per pixel."""
    return torch.tensor(pixels).T[None, :, None]


class TestTestTimeAugmentation:
    CPU = torch.device("cpu")

    def test_probabilities_are_averaged_and_not_logits(self):
        """One view is sure of class 0, two lean to class 1: the mean of the logits is for 0, that of softmax for 1."""
        network = Scripted(*(logits_of(pair) for pair in ((20.0, 0.0), (0.0, 2.0), (0.0, 2.0))))
        assert predict(network, torch.rand(3, 1, 1), self.CPU, scales=(1, 1, 1)).item() == 1

    def test_a_mirrored_view_is_mirrored_back(self):
        image = torch.rand(3, 1, 2)
        left, right = logits_of((1.0, 0.0), (0.0, 0.0)), logits_of((3.0, 0.0), (0.0, 9.0))
        network = Scripted(left, right)
        assert predict(network, image, self.CPU, flip=True).tolist() == [[1, 0]]
        assert torch.equal(network.views[1], image[None].flip(3))

    def test_views_are_resized(self):
        image = torch.rand(3, 10, 20)
        network = Scripted(*(torch.rand(1, 2, *size) for size in ((5, 10), (10, 20), (15, 30))))
        assert predict(network, image, self.CPU, scales=(0.5, 1, 1.5)).shape == (10, 20)
        assert [tuple(view.shape[2:]) for view in network.views] == [(5, 10), (10, 20), (15, 30)]
        assert torch.equal(network.views[1], image[None])
        assert all(view.min() >= 0 and view.max() <= 1 for view in network.views)

    def test_one_scale_is_the_logits_alone(self):
        network = Scripted(logits_of((5.0, 4.0), (-3.0, -2.0)))
        assert predict(network, torch.rand(3, 1, 2), self.CPU).tolist() == [[0, 1]]

    @pytest.mark.parametrize("scales", [(), (0.0,), (1, -1), (float("nan"),), (float("inf"),)])
    def test_bad_scales(self, scales):
        with pytest.raises(InputError, match="--scales must be numbers above 0, got"):
            predict(Scripted(), torch.rand(3, 4, 4), self.CPU, scales=scales)


class TestEvaluate:
    def test_counts_the_pixels_of_a_split(self, road):
        trained = restore(road / "run/checkpoint.pt")
        data, seen = evaluation_data(trained.config, split="test"), []
        confusion = evaluate(trained, data, "cpu", listener=lambda *call: seen.append(call))
        expected = Confusion(11)
        for number, image, prediction in seen:
            own_image, label = read_sample(data.val[number])
            assert torch.equal(image, own_image)
            assert torch.equal(prediction, trained.network(image[None]).argmax(1)[0])
            expected.add(label, prediction)
        assert [call[0] for call in seen] == [0, 1] and torch.equal(confusion.counts, expected.counts)

    def test_is_what_training_measured(self, road):
        trained = restore(road / "run/checkpoint.pt")
        assert evaluate(trained, evaluation_data(trained.config, images=1)).miou() == trained.miou

    def test_command(self, road, tmp_path):
        result = run("evaluate", road / "run/checkpoint.pt", "--split", "test", "--json", tmp_path / "x.json")
        assert result.exit_code == 0, result.output
        found = json.loads((tmp_path / "x.json").read_text())
        assert found["split"] == "test" and found["images"] == 2 and found["data"] == "camvid"
        assert found["classes"]["road"]["pixels"] > 0 and found["classes"]["car"]["pixels"] == 0
        assert f"mIoU {100 * found['mIoU']:.1f} %  mAcc {100 * found['mAcc']:.1f} %" in result.output
        assert "2 training and 2 test images" in result.output and "bicyclist" in result.output

    def test_scales_and_flip(self, road, tmp_path):
        path, options = road / "run/checkpoint.pt", ("--scales", "0.5,1,1.25", "--flip", "--json", tmp_path / "x.json")
        result = run("evaluate", path, "--split", "test", *options)
        assert result.exit_code == 0, result.output
        found, trained = json.loads((tmp_path / "x.json").read_text()), restore(path)
        data = evaluation_data(trained.config, split="test")
        assert found["mIoU"] == evaluate(trained, data, scales=(0.5, 1, 1.25), flip=True).miou()
        assert found["scales"] == [0.5, 1, 1.25] and found["flip"] is True

    def test_the_layout_of_the_training_stands_for_another_folder(self, road, tmp_path):
        make_splits(tmp_path, (0, 10))
        result = run("evaluate", road / "run/checkpoint.pt", "--data", tmp_path)
        assert result.exit_code == 0, result.output

    def test_without_a_block(self, tmp_path):
        assert train("--variant", "none", "--out", tmp_path).exit_code == 0
        result = run("evaluate", tmp_path / "checkpoint.pt", "--images", 1)
        assert result.exit_code == 0 and "brick" in result.output

    def test_bad_input(self, road, tmp_path):
        path = road / "run/checkpoint.pt"
        assert_one_line(run("evaluate", tmp_path / "no.pt"), "no.pt does not exist")
        assert_one_line(run("evaluate", path, "--split", "all"), "--split must be one of val, test, got all")
        assert_one_line(run("evaluate", path, "--device", "tpu"), "--device must be auto, cpu")
        assert_one_line(run("evaluate", path, "--layout", "camvid"), "belong to --data")
        assert_one_line(run("evaluate", path, "--scales", "1,x"), "--scales: expected numbers", "got 1,x")
        assert_one_line(run("evaluate", path, "--scales", "1,0"), "--scales must be numbers above 0, got 1, 0")
        assert_one_line(run("evaluate", path, "--scales", "1,1e9"), "--scales must be at most 100, got 1, 1e+09")
        assert_one_line(run("evaluate", path, "--json", tmp_path), "--json: cannot write", tmp_path)
        make_plain(tmp_path / "data")
        other = run("evaluate", path, "--data", tmp_path / "data", "--layout", "plain")
        assert_one_line(other, "has 11 classes, the data plain 3 or others: give --data or --layout")
        assert_one_line(run("evaluate", path, "--data", tmp_path / "data", "--split", "test"), "has no test images")

    def test_built_in_data_have_no_test_images(self, tmp_path):
        assert train("--out", tmp_path).exit_code == 0
        assert_one_line(
            run("evaluate", tmp_path / "checkpoint.pt", "--split", "test"), "--split test belongs to --data"
        )

    def test_a_checkpoint_of_before_splits(self, road, tmp_path):
        """Its settings are fewer than today's, which then have their defaults."""
        state = checkpoint.load(road / "run/checkpoint.pt")
        state["config"] = {key: state["config"][key] for key in ("variant", "width", "data", "layout", "crop")}
        checkpoint.save(state, tmp_path / "old.pt")
        assert run("evaluate", tmp_path / "old.pt", "--split", "test").exit_code == 0
