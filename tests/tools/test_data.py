"""Training data: the built-in mosaics, the folder layouts, reading, augmentation, and the metric."""

import socket
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from dnl_ext.segmentation.data import mosaic
from dnl_ext.segmentation.data.files import read_image, read_label
from dnl_ext.segmentation.data.folders import FolderData, augment, read_sample, spans
from dnl_ext.segmentation.data.layouts import CITYSCAPES_IDS, find_layout
from dnl_ext.segmentation.errors import InputError, InputWarning
from dnl_ext.segmentation.metrics import IGNORE, Confusion

SIZE = (48, 64)


def write_image(path, size=SIZE, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def write_label(path, values, size=SIZE):
    """A label PNG whose columns run through ``values``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = np.array(values, dtype=np.uint8)[np.arange(size[1]) % len(values)]
    Image.fromarray(np.broadcast_to(row, size).copy()).save(path)


def make_cityscapes(root, values=(0, 7, 11, 33), kind="labelIds"):
    for part in ("train", "val"):
        for number in range(2):
            stem = f"town/town_{number:06}_000019"
            write_image(root / f"leftImg8bit/{part}/{stem}_leftImg8bit.png")
            write_label(root / f"gtFine/{part}/{stem}_gtFine_{kind}.png", values)


def make_ade20k(root, values=(0, 1, 150)):
    for part in ("training", "validation"):
        for number in range(2):
            write_image(root / f"images/{part}/ADE_{number}.jpg")
            write_label(root / f"annotations/{part}/ADE_{number}.png", values)


def make_pascal_context(root, values=(0, 1, 59, 255), lists=True):
    for number in range(6):
        write_image(root / f"JPEGImages/2008_{number}.jpg")
        if number < 5:  # as in VOC, where not every photograph has a label
            write_label(root / f"SegmentationClassContext/2008_{number}.png", values)
    if lists:
        folder = root / "ImageSets/SegmentationContext"
        folder.mkdir(parents=True)
        (folder / "train.txt").write_text("2008_0\n2008_1\n2008_2\n")
        (folder / "val.txt").write_text("2008_3\n")


def make_plain(root, values=(0, 1, 2, 255), count=5):
    for number in range(count):
        write_image(root / f"images/{number}.png", seed=number)
        write_label(root / f"labels/{number}.png", values)


MAKERS = {
    "cityscapes": make_cityscapes,
    "ade20k": make_ade20k,
    "pascal-context": make_pascal_context,
    "plain": make_plain,
}


class TestMosaic:
    def test_photographs_are_in_the_wheel(self, monkeypatch):
        def no_network(*_, **__):
            raise AssertionError("the built-in data opened a socket")

        monkeypatch.setattr(socket, "socket", no_network)
        data = mosaic.MosaicData((64, 128), 1)
        assert data.classes[:3] == ("brick", "grass", "gravel")
        data.validation_sample(0)

    @pytest.mark.parametrize("photograph", mosaic.PHOTOGRAPHS, ids=lambda photograph: photograph.name)
    def test_parts_do_not_overlap(self, photograph, tmp_path, monkeypatch):
        # Each column of the photograph is replaced by its number.
        with Image.open(f"{mosaic.photograph_folder()}/{photograph.file}") as image:
            width, height = image.size
        numbers = np.broadcast_to(np.arange(width) * 255 / width, (height, width)).astype(np.uint8)
        Image.fromarray(numbers).save(tmp_path / f"{photograph.name}.png")
        monkeypatch.setattr(mosaic, "photograph_folder", lambda: str(tmp_path))
        numbered = photograph._replace(file=f"{photograph.name}.png")
        train, val = (mosaic.load_photograph(numbered, part) for part in ("train", "val"))
        assert train.max() < val.min()
        assert train.shape[1] > val.shape[1] >= 64

    def test_same_arguments_same_sample(self):
        first, second = mosaic.MosaicData((64, 128), 2), mosaic.MosaicData((64, 128), 2)
        for a, b in zip(first.training_sample(1, 5, (64, 96)), second.training_sample(1, 5, (64, 96)), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(first.validation_sample(1), second.validation_sample(1), strict=True):
            assert torch.equal(a, b)

    def test_seed_and_index_matter(self):
        data = mosaic.MosaicData((64, 128), 2)
        images = [data.training_sample(*key, (64, 96))[0] for key in ((0, 0), (0, 1), (1, 0))]
        assert not torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])
        assert not torch.equal(data.validation_sample(0)[0], data.validation_sample(1)[0])

    @pytest.mark.parametrize("size", [(32, 32), (64, 128), (257, 390)])
    def test_sample(self, size):
        image, label = mosaic.MosaicData((64, 128), 1).training_sample(0, 3, size)
        assert image.shape == (3, *size) and image.dtype == torch.float32
        assert image.min() >= 0 and image.max() <= 1 and image.std() > 0.05
        assert label.shape == size and label.dtype == torch.int64
        assert 2 <= len(label.unique()) <= len(mosaic.PHOTOGRAPHS) and label.max() < len(mosaic.PHOTOGRAPHS)

    def test_classes_recur_apart(self):
        ndimage = pytest.importorskip("scipy.ndimage")
        data = mosaic.MosaicData((512, 1024), 3)
        for index in range(3):
            label = data.validation_sample(index)[1].numpy()
            parts = [ndimage.label(label == kind)[1] for kind in np.unique(label)]
            assert sum(count > 1 for count in parts) >= 2

    def test_mask_is_exact(self, monkeypatch):
        # Photographs of one value each, cells without brightness of their own: the image alone gives the mask.
        monkeypatch.setattr(mosaic, "texture", lambda rng, source, size, zoom: source.expand(size))
        rng = np.random.default_rng(0)
        uniform = rng.uniform

        class Even:
            def __getattr__(self, name):
                return getattr(rng, name)

            def uniform(self, low, high, size=None):
                if (low, high) in ((0, 1), (-1, 1)):  # places, not looks
                    return uniform(low, high, size)
                return high if size is None else np.full(size, high)

            def standard_normal(self, size, dtype):
                return np.zeros(size, dtype)

        monkeypatch.setattr(mosaic, "smooth_noise", lambda rng, size, cell, channels: torch.zeros(channels, *size))
        sources = [torch.full((1, 1), 0.2 * kind - 0.7) for kind in range(8)]
        image, label = mosaic.compose(Even(), sources, (96, 160))
        values = {kind: image[0][label == kind].unique() for kind in label.unique().tolist()}
        assert all(len(value) == 1 for value in values.values())
        assert len({float(value[0]) for value in values.values()}) == len(values) >= 2

    def test_missing_package(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(InputError, match="scikit-image"):
            mosaic.photograph_folder()


class TestLayouts:
    @pytest.mark.parametrize("name", MAKERS)
    def test_found_by_folder_names(self, name, tmp_path):
        MAKERS[name](tmp_path)
        found = find_layout(tmp_path)
        assert found.name == name
        counts = {"cityscapes": (19, 2, 2), "ade20k": (150, 2, 2), "pascal-context": (60, 3, 1), "plain": (3, 4, 1)}
        assert (len(found.classes), len(found.train), len(found.val)) == counts[name]
        image, label = read_sample(found.train[0])
        assert image.shape == (3, *SIZE) and label.shape == SIZE
        assert not {sample.image for sample in found.train} & {sample.image for sample in found.val}

    def test_one_level_below(self, tmp_path):
        make_ade20k(tmp_path / "ADEChallengeData2016")
        assert find_layout(tmp_path).name == "ade20k"

    def test_cityscapes_ids(self, tmp_path):
        make_cityscapes(tmp_path, values=(0, 7, 33, 9, 255))
        label = read_sample(find_layout(tmp_path).train[0])[1]
        assert label[0, :5].tolist() == [IGNORE, 0, 18, IGNORE, IGNORE]
        assert len(CITYSCAPES_IDS) == 19

    def test_cityscapes_train_ids_come_first(self, tmp_path):
        make_cityscapes(tmp_path, values=(0, 7))
        make_cityscapes(tmp_path, values=(18, 255), kind="labelTrainIds")
        label = read_sample(find_layout(tmp_path).train[0])[1]
        assert label[0, :2].tolist() == [18, IGNORE]

    def test_ade20k_labels_less_one(self, tmp_path):
        make_ade20k(tmp_path)
        assert read_sample(find_layout(tmp_path).train[0])[1][0, :3].tolist() == [IGNORE, 0, 149]

    def test_pascal_context_59(self, tmp_path):
        make_pascal_context(tmp_path)
        found = find_layout(tmp_path, "pascal-context-59")
        assert len(found.classes) == 59
        assert read_sample(found.train[0])[1][0, :4].tolist() == [IGNORE, 0, 58, IGNORE]

    def test_pascal_context_without_lists(self, tmp_path):
        make_pascal_context(tmp_path, lists=False)
        found = find_layout(tmp_path)
        assert (len(found.train), len(found.val)) == (4, 1)

    def test_plain_with_own_split(self, tmp_path):
        for part in ("train", "val"):
            write_image(tmp_path / f"images/{part}/a/x.png")
            write_label(tmp_path / f"labels/{part}/a/x.png", (0, 4))
        found = find_layout(tmp_path)
        assert (len(found.classes), len(found.train), len(found.val)) == (5, 1, 1)

    def test_palette_png(self, tmp_path):
        label = Image.fromarray(np.array([[0, 1], [2, 255]], dtype=np.uint8), mode="L").convert("P")
        label.putdata([0, 1, 2, 255])
        label.save(tmp_path / "x.png")
        assert read_label(tmp_path / "x.png").tolist() == [[0, 1], [2, 255]]

    @pytest.mark.parametrize(
        ("break_it", "message"),
        [
            (lambda root: None, "does not exist"),
            (lambda root: root.mkdir(), "no known layout"),
            (lambda root: root.write_text("x"), "is not a folder"),
            (lambda root: [(root / name).mkdir(parents=True) for name in ("images", "labels")], "0 training and 0 val"),
            (lambda root: make_plain(root, values=(255,)), "labelled pixel"),
            (lambda root: make_plain(root, count=1), "0 training and 1 validation"),
            (lambda root: (make_plain(root), (root / "labels/3.png").unlink()), "3.png has no label: expected"),
        ],
    )
    def test_errors(self, break_it, message, tmp_path):
        break_it(tmp_path / "data")
        with pytest.raises(InputError, match=message) as raised:
            find_layout(tmp_path / "data")
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize("classes", [None, 2])
    def test_black_and_white_masks(self, classes, tmp_path):
        make_plain(tmp_path, values=(0, 255), count=20)
        with pytest.warns(InputWarning, match="0 and 255 alone.*store 1 instead") as caught:
            found = find_layout(tmp_path, classes=classes)
        assert len(caught) == 1 and len(found.classes) == (classes or 1)
        assert str(caught[0].message).startswith("all labels in " if classes is None else "10 of 20 labels in ")
        for path in (tmp_path / "labels").iterdir():  # what the warning says to do
            with Image.open(path) as mask:
                mapped = Image.fromarray((np.array(mask) == 255).astype(np.uint8))
            mapped.save(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = find_layout(tmp_path, classes=classes)
        assert len(found.classes) == 2 and read_sample(found.train[0])[1].unique().tolist() == [0, 1]

    @pytest.mark.parametrize(("values", "classes"), [((0,), None), ((0, 1, 255), None), ((0, 255), 1), ((1, 255), 3)])
    def test_other_labels_are_not_taken_for_masks(self, values, classes, tmp_path):
        make_plain(tmp_path, values=values)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            find_layout(tmp_path, classes=classes)

    @pytest.mark.parametrize("maker", [make_plain, make_ade20k])
    def test_two_images_of_one_label(self, maker, tmp_path):
        maker(tmp_path)
        image = sorted(path for path in (tmp_path / "images").rglob("*") if path.is_file())[0]
        other = image.with_suffix(".webp")
        write_image(other)
        with pytest.raises(InputError, match="have the same label") as raised:
            find_layout(tmp_path)
        assert str(image) in str(raised.value) and str(other) in str(raised.value)

    def test_forced_layout_that_is_not_there(self, tmp_path):
        make_plain(tmp_path)
        with pytest.raises(InputError, match="expected the folders images and annotations"):
            find_layout(tmp_path, "ade20k")


class TestReading:
    def test_unreadable(self, tmp_path):
        path = tmp_path / "x.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\nnot really")
        for read, kind in ((read_image, "image"), (read_label, "label")):
            with pytest.raises(InputError, match=f"cannot read {kind} {path}") as raised:
                read(path)
            assert "\n" not in str(raised.value)

    def test_truncated(self, tmp_path):
        write_image(tmp_path / "x.jpg", (200, 200))
        data = (tmp_path / "x.jpg").read_bytes()
        (tmp_path / "x.jpg").write_bytes(data[: len(data) // 2])
        with pytest.raises(InputError, match="cannot read image"):
            read_image(tmp_path / "x.jpg")

    def test_color_label(self, tmp_path):
        write_image(tmp_path / "x.png")
        with pytest.raises(InputError, match="kind RGB"):
            read_label(tmp_path / "x.png")

    def test_value_out_of_range(self, tmp_path):
        make_cityscapes(tmp_path, values=(0, 34))
        with pytest.raises(InputError, match=r"holds 34: expected 0\.\.33, 255"):
            read_sample(find_layout(tmp_path).train[0])

    def test_sizes_differ(self, tmp_path):
        make_plain(tmp_path)
        write_label(tmp_path / "labels/0.png", (0, 1), (SIZE[0], SIZE[1] + 2))
        with pytest.raises(InputError, match=r"is 48x66, but its image .* is 48x64"):
            read_sample(find_layout(tmp_path).train[0])

    def test_spans(self):
        assert spans([0, 1, 2, 5, 7, 8, 255]) == "0..2, 5, 7..8, 255"


class TestFolderData:
    def test_epoch_sees_every_image_once(self, tmp_path, monkeypatch):
        make_plain(tmp_path, count=10)
        data, seen = FolderData(tmp_path), []

        def read_and_note(sample):
            seen.append(sample.image)
            return read_sample(sample)

        monkeypatch.setattr("dnl_ext.segmentation.data.folders.read_sample", read_and_note)
        for index in range(2 * data.epoch):
            data.training_sample(0, index, (32, 32))
        first, second = seen[: data.epoch], seen[data.epoch :]
        assert sorted(first) == sorted(second) == sorted(sample.image for sample in data.train)
        assert first != second

    def test_sample_is_a_function_of_its_arguments(self, tmp_path):
        make_plain(tmp_path)
        samples = [FolderData(tmp_path).training_sample(3, 7, (32, 40)) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*samples, strict=True))
        assert samples[0][0].shape == (3, 32, 40)

    def test_validation_size(self, tmp_path):
        make_plain(tmp_path, count=15)
        assert FolderData(tmp_path).validation_size == 3
        assert FolderData(tmp_path, validation_size=2).validation_size == 2

    @pytest.mark.parametrize("crop", [(32, 32), (64, 200), (130, 40)])
    def test_image_and_label_stay_together(self, crop):
        # Broad stripes whose grey value is their class.
        label = (torch.arange(120) // 30).expand(80, 120).contiguous()
        image = (label / 4).expand(3, -1, -1)
        for seed in range(20):
            out, kind = augment(np.random.default_rng(seed), image, label, crop)
            assert out.shape == (3, *crop) and kind.shape == crop
            inside = kind != IGNORE
            assert inside.any()
            assert ((out[0] - kind / 4).abs()[inside] < 0.13).float().mean() > 0.9
            assert (out[:, ~inside] == 0.5).all()

    def test_augmentation_varies(self):
        image, label = torch.rand(3, 64, 64), torch.zeros(64, 64, dtype=torch.int64)
        outs = [augment(np.random.default_rng(seed), image, label, (32, 32))[0] for seed in range(4)]
        assert all(not torch.equal(outs[0], other) for other in outs[1:])


class TestConfusion:
    def test_against_hand_count(self):
        confusion = Confusion(4)
        confusion.add(torch.tensor([0, 0, 1, 1, IGNORE]), torch.tensor([0, 1, 1, 1, 2]))
        assert confusion.iou() == [0.5, pytest.approx(2 / 3), None, None]
        assert confusion.miou() == pytest.approx((0.5 + 2 / 3) / 2)

    def test_nothing_counted(self):
        assert Confusion(3).miou() is None
