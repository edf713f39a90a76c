"""Strange things in a data folder: links, hidden files, other endings, labels without image; and the line on them."""

import pytest
from test_cli import run, train
from test_data import make_cityscapes, make_pascal_context, make_plain, write_image, write_label

from dnl_ext.segmentation.data.layouts import find_layout, images_in
from dnl_ext.segmentation.errors import InputError


def add_links(root):
    """Half of the images and labels in linked folders, with links in circles and one that leads nowhere."""
    for name, values in (("images", None), ("labels", (0, 1))):
        for number in range(3):
            path = root.parent / f"elsewhere/{name}/{number}.png"
            write_image(path, seed=number) if values is None else write_label(path, values)
        (root / name / "linked").symlink_to(root.parent / "elsewhere" / name)
    (root / "images/circle").symlink_to(root / "images")
    (root / "images/up").symlink_to(root)
    (root.parent / "elsewhere/images/again").symlink_to(root.parent / "elsewhere/images")
    (root / "images/nowhere.png").symlink_to(root / "missing.png")


def add_hidden(root):
    write_image(root / "images/.ipynb_checkpoints/0-checkpoint.png")
    write_image(root / "images/.hidden.png")
    write_image(root / ".trash/images/0.png")


def add_other_endings(root):
    write_image(root / "images/more.gif")
    (root / "images/notes.txt").write_text("x")
    (root / "labels/README").write_text("x")


def lone_label(root):
    write_label(root / "labels/none.png", (0, 1))
    write_label(root / "labels/zero.png", (0, 1))


def folder_with_ending(root):
    write_image(root / "images/set.png/a.png")
    write_label(root / "labels/set.png/a.png", (0, 1))


def upper_case(root):
    for path in list((root / "labels").iterdir()):
        path.rename(path.with_suffix(".PNG"))


FIVE = "4 training and 1 validation images"


class TestFolders:
    @pytest.mark.parametrize(
        ("change", "line"),
        [
            (lambda root: None, FIVE),
            (add_links, "7 training and 1 validation images; left out: broken links (1), "
                        "links to folders read elsewhere (3)"),
            (add_hidden, f"{FIVE}; left out: hidden folders (1)"),
            (add_other_endings, f"{FIVE}; left out: .gif files (1), .txt files (1), files without ending (1)"),
            (lone_label, f"{FIVE}; left out: labels without image (2)"),
            (folder_with_ending, "5 training and 1 validation images"),
            (upper_case, FIVE),
        ],
    )  # fmt: skip
    def test_training_begins_with_a_line(self, change, line, tmp_path):
        make_plain(tmp_path / "data")
        change(tmp_path / "data")
        result = train("--data", tmp_path / "data", "--out", tmp_path / "out", "--crop", "32x32")
        assert result.exit_code == 0, result.output
        assert line in result.output.splitlines()

    def test_all_folders_are_links(self, tmp_path):
        make_plain(tmp_path / "elsewhere")
        for name in ("images", "labels"):
            (tmp_path / "data" / name).mkdir(parents=True)
            (tmp_path / "data" / name / "a").symlink_to(tmp_path / "elsewhere" / name)
        assert len(find_layout(tmp_path / "data").train) == 4

    def test_a_folder_goes_before_links_to_it(self, tmp_path):
        (tmp_path / "images").mkdir()
        # Made before and after it: the order in which the file system lists them is its own.
        (tmp_path / "images/first").symlink_to(tmp_path / "images/own")
        write_image(tmp_path / "images/own/a.png")
        (tmp_path / "images/second").symlink_to(tmp_path / "images/own")
        assert images_in(tmp_path / "images") == [tmp_path / "images/own/a.png"]

    def test_cityscapes_tells_other_parts(self, tmp_path):
        make_cityscapes(tmp_path)
        write_image(tmp_path / "leftImg8bit/test/town/town_0_leftImg8bit.png")
        write_label(tmp_path / "gtFine/test/town/town_0_gtFine_labelIds.png", (0,))
        write_image(tmp_path / "leftImg8bit/train/town/town_9.png")
        write_label(tmp_path / "gtFine/train/town/town_000000_000019_gtFine_color.png", (0,))
        found = find_layout(tmp_path)
        assert found.left_out == ("images in no split (1)", "images without label (1)")
        assert (len(found.train), len(found.val)) == (2, 2)

    def test_label_of_another_ending(self, tmp_path):
        make_plain(tmp_path)
        (tmp_path / "labels/3.png").rename(tmp_path / "labels/3.tif")
        with pytest.raises(InputError, match=r"3\.png has no label: expected .*3\.png, found 3\.tif"):
            find_layout(tmp_path)

    def test_no_image_that_is_read(self, tmp_path):
        make_plain(tmp_path)
        for path in list((tmp_path / "images").iterdir()):
            path.rename(path.with_suffix(".gif"))
        with pytest.raises(
            InputError, match=r"0 training and 0 validation images, left out: \.gif files \(5\), labels"
        ):
            find_layout(tmp_path)

    def test_ablate_begins_with_it_too(self, tmp_path):
        make_pascal_context(tmp_path / "data")
        (tmp_path / "data/JPEGImages/notes.txt").write_text("")
        result = run("ablate", "--recipe", "pascal_context", "--data", tmp_path / "data", "--out", tmp_path / "out",
                     "--variants", "unary", "--seeds", "0", "--steps", 1, "--crop", "32x32", "--batch-size", 1,
                     "--width", 4, "--images", 1)  # fmt: skip
        assert result.exit_code == 0, result.output
        assert (
            "3 training and 1 validation images; left out: .txt files (1), images in no split (1), "
            "images without label (1)" in result.output
        )
