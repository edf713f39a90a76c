"""Predictions as files: of ``dnl-ext evaluate`` and ``dnl-ext predict``."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import assert_one_line, run
from test_data import SIZE, write_image
from test_evaluate import make_splits, road  # noqa: F401 (a fixture)

from dnl_ext.segmentation.data import palette, read_image, read_label
from dnl_ext.segmentation.errors import InputError
from dnl_ext.segmentation.looking import PredictionWriter
from dnl_ext.segmentation.looking.overlay import tinted
from dnl_ext.segmentation.training import restore

CLASSES = ("road", "sky", "tree", "car")


@pytest.fixture
def label():
    return torch.arange(4).repeat_interleave(16).expand(48, 64).contiguous()


class TestWriter:
    def test_class_numbers_in_colours(self, label, tmp_path):
        PredictionWriter(CLASSES, "plain", tmp_path).write("a/b.c", torch.rand(3, 48, 64), label)
        path = tmp_path / "a/b.c.png"
        assert (read_label(path) == label.numpy()).all()
        with Image.open(path) as picture:
            assert picture.mode == "P"
            colors = np.asarray(picture.convert("RGB"))
        assert (colors == palette("plain", 4)[label.numpy()]).all()

    @pytest.mark.parametrize("size", [(48, 64), (1, 1), (30, 700), (701, 33)])
    def test_overlay_keeps_the_pixels_of_the_photograph(self, size, tmp_path):
        height, width = size
        image, label = torch.rand(3, *size), torch.randint(4, size)
        PredictionWriter(CLASSES, "plain", overlays=tmp_path).write("a", image, label)
        with Image.open(tmp_path / "a.png") as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert pixels.shape[1] == width and pixels.shape[0] > height
        expected = 255 * tinted(image, label, palette("plain", 4), 0.5)
        assert np.abs(pixels[:height] - expected).max() < 2
        assert (pixels[height:] < 255).any()  # the legend

    def test_nothing_asked_for(self, label, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        PredictionWriter(CLASSES).write("a", torch.rand(3, 48, 64), label)
        assert list(tmp_path.iterdir()) == []

    def test_errors(self, label, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match=r"cannot write to .*file"):
            PredictionWriter(CLASSES, "", tmp_path / "file")
        with pytest.raises(InputError, match="--overlays: expected another folder"):
            PredictionWriter(CLASSES, "", tmp_path, f"{tmp_path}/.")
        (tmp_path / "a.png").mkdir()
        with pytest.raises(InputError, match=r"cannot write .*a\.png"):
            PredictionWriter(CLASSES, "", tmp_path).write("a", torch.rand(3, 48, 64), label)


class TestEvaluate:
    def test_files_of_a_split(self, road, tmp_path):  # noqa: F811
        options = ("--predictions", tmp_path / "p", "--overlays", tmp_path / "o")
        result = run("evaluate", road / "run/checkpoint.pt", "--split", "test", *options)
        assert result.exit_code == 0, result.output
        for folder in ("p", "o"):
            assert {path.name for path in (tmp_path / folder).iterdir()} == {"test0.png", "test1.png"}
        image = read_image(road / "data/images/test/test1.png")
        predicted = restore(road / "run/checkpoint.pt").network(image[None]).argmax(1)[0]
        assert (read_label(tmp_path / "p/test1.png") == predicted.numpy()).all()
        with Image.open(tmp_path / "p/test1.png") as picture:
            assert picture.getpalette()[9:12] == [128, 64, 128]  # CamVid's road

    def test_ground_truth_is_not_written_over(self, road, tmp_path):  # noqa: F811
        make_splits(tmp_path, (0, 3))
        before = (tmp_path / "labels/test/test0.png").read_bytes()
        result = run("evaluate", road / "run/checkpoint.pt", "--data", tmp_path, "--split", "test", "--predictions",
                     tmp_path / "labels/test")  # fmt: skip
        assert_one_line_after_summary(result, "test0.png would be written over")
        assert (tmp_path / "labels/test/test0.png").read_bytes() == before


def assert_one_line_after_summary(result, part):
    assert result.exit_code == 2 and part in result.stderr and len(result.stderr.strip().splitlines()) == 1


class TestPredict:
    def test_photographs_and_folders(self, road, tmp_path):  # noqa: F811
        write_image(tmp_path / "one.jpg")
        for name in ("in/a/x.png", "in/b/x.JPG"):
            write_image(tmp_path / name)
        (tmp_path / "in/notes.txt").write_text("")
        result = run("predict", road / "run/checkpoint.pt", tmp_path / "one.jpg", tmp_path / "in", "--out",
                     tmp_path / "out", "--overlays", tmp_path / "over")  # fmt: skip
        assert result.exit_code == 0, result.output
        assert "3 images, 11 classes" in result.output
        for folder in ("out", "over"):
            found = {str(path.relative_to(tmp_path / folder)) for path in (tmp_path / folder).rglob("*.png")}
            assert found == {"one.png", "a/x.png", "b/x.png"}
        assert read_label(tmp_path / "out/a/x.png").shape == SIZE

    def test_bad_input(self, road, tmp_path):  # noqa: F811
        path = road / "run/checkpoint.pt"
        (tmp_path / "empty").mkdir()
        write_image(tmp_path / "x.png")
        write_image(tmp_path / "x.jpg")
        (tmp_path / "text.png").write_text("no image")
        out = ("--out", tmp_path / "out")
        assert_one_line(run("predict", path, tmp_path / "no.png", *out), "IMAGE:", "no.png does not exist")
        assert_one_line(run("predict", path, tmp_path / "empty", *out), "holds no images")
        assert_one_line(
            run("predict", path, tmp_path / "x.png", tmp_path / "x.jpg", *out), "would both be written as x"
        )
        assert_one_line(run("predict", path, tmp_path / "text.png", *out), "cannot read image")
        assert_one_line(run("predict", tmp_path / "no.pt", tmp_path / "x.png", *out), "no.pt does not exist")
        assert_one_line(run("predict", path, tmp_path / "x.png", *out, "--overlays", tmp_path / "out"), "--overlays")
        before = (tmp_path / "x.png").read_bytes()
        assert_one_line(run("predict", path, tmp_path / "x.png", "--out", tmp_path), "x.png would be written over")
        assert (tmp_path / "x.png").read_bytes() == before
