"""Strange files in a data folder: what is read of each, and the line that says so."""

import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, features
from test_cli import assert_one_line, run, train
from test_data import SIZE, make_plain, write_label

from dnl_ext.segmentation.data.files import UPRIGHT, read_image, read_label
from dnl_ext.segmentation.data.folders import read_sample
from dnl_ext.segmentation.data.layouts import find_layout
from dnl_ext.segmentation.errors import InputError, InputWarning

tifffile = pytest.importorskip("tifffile")

RAMP = np.arange(65536).reshape(256, 256)
COLOR = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
ORIENTATION = 274


def read(path):
    """An image, and the texts of the warnings."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        image = read_image(path)
    assert all(issubclass(warning.category, InputWarning) for warning in said)
    texts = [str(warning.message) for warning in said]
    assert all(text.startswith(f"image {path}: ") for text in texts)
    return image, texts


def turned(orientation):
    """EXIF data with an orientation."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


class TestGreyOfManyLevels:
    @pytest.mark.parametrize(
        ("kind", "factor", "offset", "line"),
        [
            ("<u2", 1, 0, "its grey values 0 .. 65535 are scaled to 0 .. 1"),
            (">u2", 1, 0, "its grey values 0 .. 65535 are scaled to 0 .. 1"),
            ("<i2", 1, -32768, "its integer values, -32768 .. 32767, are scaled to 0 .. 1 by their own range"),
            ("<i4", 7, -9, "its integer values, -9 .. 458736, are scaled to 0 .. 1 by their own range"),
            ("<u4", 65537, 0, "its integer values, 0 .. 4.29497e+09, are scaled to 0 .. 1 by their own range"),
            ("<f4", 2, -1, "its float values, -1 .. 131069, are scaled to 0 .. 1 by their own range"),
        ],
    )
    def test_all_levels_stay(self, kind, factor, offset, line, tmp_path):
        tifffile.imwrite(tmp_path / "x.tif", (RAMP * factor + offset).astype(kind), byteorder=kind[0])
        image, said = read(tmp_path / "x.tif")
        assert said == [f"image {tmp_path / 'x.tif'}: {line}"]
        assert image.shape == (3, 256, 256) and (image == image[:1]).all()
        assert np.abs(image[0].numpy() - RAMP / 65535).max() < 1e-6

    def test_12_bits(self, tmp_path):
        # 0, 4095, 2048, 1 in six bytes behind a header of eight and one directory.
        tags = {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: 1, 279: 6}
        entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
        header = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
        (tmp_path / "x.tif").write_bytes(header + entries + bytes(4) + bytes.fromhex("000fff800001"))
        image, said = read(tmp_path / "x.tif")
        assert (image[0, 0] * 4095).round().tolist() == [0, 4095, 2048, 1]
        assert said == [f"image {tmp_path / 'x.tif'}: its grey values 0 .. 4095 are scaled to 0 .. 1"]

    def test_png(self, tmp_path):
        Image.fromarray(RAMP.astype(np.uint16)).save(tmp_path / "x.png")
        image, said = read(tmp_path / "x.png")
        assert said == [f"image {tmp_path / 'x.png'}: its grey values 0 .. 65535 are scaled to 0 .. 1"]
        assert np.abs(image[0].numpy() - RAMP / 65535).max() < 1e-6

    def test_float_in_unit_range_is_as_it_is(self, tmp_path):
        tifffile.imwrite(tmp_path / "x.tif", np.float32([[0.25, 0.5]]))
        image, said = read(tmp_path / "x.tif")
        assert image[0].tolist() == [[0.25, 0.5]] and not said

    @pytest.mark.parametrize(("kind", "most"), [("u1", 255), ("u2", 65535), ("f4", 2)])
    def test_white_is_zero(self, kind, most, tmp_path):
        tifffile.imwrite(tmp_path / "x.tif", np.array([[0, most]], kind), photometric="miniswhite")
        assert read(tmp_path / "x.tif")[0][0].tolist() == [[1, 0]]

    def test_one_value(self, tmp_path):
        tifffile.imwrite(tmp_path / "x.tif", np.full((4, 4), 9, np.int32))
        assert (read(tmp_path / "x.tif")[0] == 0).all()

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_not_finite(self, value, tmp_path):
        tifffile.imwrite(tmp_path / "x.tif", np.float32([[0, value]]))
        with pytest.raises(InputError, match=r"x\.tif holds values that are not finite"):
            read_image(tmp_path / "x.tif")


class TestColor:
    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK", "LAB", "YCbCr"])
    def test_same_color(self, mode, tmp_path):
        picture = Image.fromarray(np.full_like(COLOR, (200, 30, 60)))
        if mode == "LAB":
            profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
            picture = ImageCms.profileToProfile(picture, *profiles, outputMode="LAB")
        else:
            picture = picture.convert(mode)
        picture.save(tmp_path / "x.tif")
        image, said = read(tmp_path / "x.tif")
        assert not said
        assert (255 * image.mean((1, 2)) - torch.tensor([200.0, 30, 60])).abs().max() < 3

    def test_16_bit_color_keeps_the_upper_8(self, tmp_path):
        tifffile.imwrite(tmp_path / "x.tif", COLOR.astype(np.uint16) * 256 + 99, photometric="rgb")
        image, said = read(tmp_path / "x.tif")
        assert torch.equal(image, torch.from_numpy(COLOR).permute(2, 0, 1).float() / 255)
        assert len(said) == 1 and "the upper 8 of its 16 bits per channel are read" in said[0]

    @pytest.mark.parametrize("extra", ["unspecified", "unassalpha", "assocalpha"])
    def test_fourth_channel(self, extra, tmp_path):
        pixels = np.concatenate([COLOR, np.full((*SIZE, 1), 200, np.uint8)], 2)
        tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="rgb", extrasamples=[extra])
        said = read(tmp_path / "x.tif")[1]
        expected = (
            "the last of its 4 channels is left out" if extra == "unspecified" else "its transparency is left out"
        )
        assert len(said) == 1 and expected in said[0]

    @pytest.mark.parametrize("mode", ["LA", "PA", "P"])
    def test_transparency(self, mode, tmp_path):
        if mode == "P":
            Image.fromarray(COLOR).convert("P").save(tmp_path / "x.png", transparency=0)
        else:
            picture = Image.fromarray(COLOR).convert("LA" if mode == "LA" else "RGBA")
            picture.putalpha(128)
            picture.save(tmp_path / "x.png")
        said = read(tmp_path / "x.png")[1]
        assert len(said) == 1 and "its transparency is left out" in said[0]

    def test_more_than_four_channels(self, tmp_path):
        for channels in (5, 6):
            tifffile.imwrite(
                tmp_path / "x.tif", np.zeros((*SIZE, channels), np.uint8), photometric="rgb", planarconfig="contig"
            )
            with pytest.raises(InputError, match=rf"x\.tif has {channels} channels: expected 1 to 4"):
                read_image(tmp_path / "x.tif")

    def test_several_pages(self, tmp_path):
        tifffile.imwrite(tmp_path / "x.tif", np.stack([COLOR[..., 0]] * 3), photometric="minisblack")
        image, said = read(tmp_path / "x.tif")
        assert image.shape == (3, *SIZE) and len(said) == 1 and "the first of its 3 frames is read" in said[0]


class TestBitsOfLabels:
    @pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
    def test_grey_png(self, bits, tmp_path):
        values = np.arange(2 ** min(bits, 9), dtype=np.uint16)[None]
        picture = Image.fromarray(values if bits == 16 else values.astype(np.uint8))
        if bits == 1:
            picture = Image.fromarray(values == 1)
        picture.save(tmp_path / "x.png", **({"bits": bits} if bits in (2, 4) else {}))
        assert (tmp_path / "x.png").read_bytes()[24] == bits  # the depth in the file's header
        assert read_label(tmp_path / "x.png").tolist() == values.tolist()

    @pytest.mark.parametrize("bits", [1, 2, 4])
    def test_palette_png(self, bits, tmp_path):
        values = np.arange(2**bits, dtype=np.uint8)[None]
        picture = Image.fromarray(values).convert("P")
        picture.putdata(values[0].tolist())
        picture.save(tmp_path / "x.png", bits=bits)
        assert read_label(tmp_path / "x.png").tolist() == values.tolist()

    @pytest.mark.parametrize("kind", [np.bool_, np.uint8, np.uint16])
    def test_white_is_zero(self, kind, tmp_path):
        tifffile.imwrite(tmp_path / "x.tif", np.array([[0, 1] * 8], kind), photometric="miniswhite")
        assert read_label(tmp_path / "x.tif").tolist() == [[0, 1] * 8]

    def test_two_classes_of_one_bit(self, tmp_path):
        make_plain(tmp_path)
        for path in (tmp_path / "labels").iterdir():
            Image.fromarray(np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) % 2 == 1).save(path)
        found = find_layout(tmp_path)
        assert len(found.classes) == 2 and read_sample(found.train[0])[1][0, :2].tolist() == [0, 1]

    @pytest.mark.parametrize("mode", ["RGB", "LA", "CMYK", "F"])
    def test_other_kinds_are_refused(self, mode, tmp_path):
        Image.new(mode, (4, 4)).save(tmp_path / "x.tif")
        with pytest.raises(InputError, match=rf"x\.tif is of kind {mode}: expected one channel of class numbers"):
            read_label(tmp_path / "x.tif")


class TestOrientation:
    @pytest.mark.parametrize("orientation", range(1, 10))
    @pytest.mark.parametrize("ending", ["png", "tif"])
    def test_upright(self, orientation, ending, tmp_path):
        first = {2: np.fliplr, 3: lambda x: x[::-1, ::-1], 4: np.flipud, 5: lambda x: x.swapaxes(0, 1),
                 6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90}  # fmt: skip
        assert set(first) == set(UPRIGHT)
        Image.fromarray(COLOR).save(tmp_path / f"x.{ending}", exif=turned(orientation))
        expected = first.get(orientation, lambda x: x)(COLOR)
        assert torch.equal(
            read_image(tmp_path / f"x.{ending}"), torch.from_numpy(expected.copy()).permute(2, 0, 1) / 255
        )

    @pytest.mark.parametrize("orientation", [5, 6, 7, 8])
    def test_grey_that_pillow_would_map_into_memory(self, orientation, tmp_path):
        Image.fromarray(COLOR[..., 0]).save(tmp_path / "x.tif", exif=turned(orientation))
        Image.fromarray(COLOR[..., 0]).save(tmp_path / "x.png", exif=turned(orientation))
        assert torch.equal(read_image(tmp_path / "x.tif"), read_image(tmp_path / "x.png"))

    def test_label_of_the_picture_as_shown(self, tmp_path):
        make_plain(tmp_path)
        Image.fromarray(COLOR).save(tmp_path / "images/0.png", exif=turned(6))
        sample = find_layout(tmp_path).train[0]
        with pytest.raises(InputError, match=r"label .* is 48x64, but its image .* is 64x48, turned .* orientation 6"):
            read_sample(sample)
        write_label(tmp_path / "labels/0.png", (0, 1, 2), SIZE[::-1])
        image, label = read_sample(sample)
        assert image.shape == (3, *SIZE[::-1]) and label.shape == SIZE[::-1]

    def test_broken_tags_beside_it(self, tmp_path):
        exif = turned(6)
        exif[270] = "x" * 10
        Image.fromarray(COLOR).save(tmp_path / "x.jpg", exif=exif)
        data = (tmp_path / "x.jpg").read_bytes()
        # The description becomes the image's width: a text where a number belongs, which cannot be written again.
        (tmp_path / "x.jpg").write_bytes(data.replace(b"\x01\x0e\x00\x02", b"\x01\x00\x00\x02"))
        assert read_image(tmp_path / "x.jpg").shape == (3, *SIZE[::-1])


#: Of the folder below.
LEFT_OUT = ".md files (1), .txt files (1)"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data folder with a 16-bit and a turned image for validation, and a checkpoint of it."""
    root = tmp_path_factory.mktemp("strange")
    make_plain(root / "data", count=10)
    (root / "data/images/notes.txt").write_text("")
    (root / "data/labels/notes.md").write_text("")
    Image.fromarray(RAMP[:48, :64].astype(np.uint16) * 9).save(root / "data/images/4.png")
    Image.fromarray(COLOR).save(root / "data/images/9.png", exif=turned(8))
    write_label(root / "data/labels/9.png", (0, 1, 2), SIZE[::-1])
    result = train("--data", root / "data", "--out", root / "out", "--val-images", 2, "--crop", "32x32")
    assert result.exit_code == 0, result.output
    return root, result


class TestCommands:
    """All that reads images says the same."""

    def test_train(self, trained):
        root, result = trained
        lines = [line for line in result.stderr.splitlines() if "grey values" in line]
        assert len(lines) == 1 and lines[0].startswith(f"warning: image {root / 'data/images/4.png'}: its grey values")

    def test_maps(self, trained):
        root, _ = trained
        command = ("--checkpoint", root / "out/checkpoint.pt", "--out", root / "maps.png")
        result = run("maps", root / "data/images/9.png", *command)
        assert result.exit_code == 0 and "48 x 64 pixels" in result.output
        result = run("maps", root / "data/images/4.png", *command)
        assert result.exit_code == 0 and "its grey values 0 .. 65535 are scaled" in result.stderr

    def test_diagnose(self, trained):
        root, _ = trained
        options = ("--images", 2, "--queries", 4, "--pictures", 0, "--out", root / "diagnose")
        result = run("diagnose", root / "out/checkpoint.pt", *options)
        assert result.exit_code == 0, result.output
        assert result.stderr.count("its grey values 0 .. 65535 are scaled") == 1
        assert f"8 training and 2 validation images; left out: {LEFT_OUT}" in result.output

    def test_masks_are_warned_of_once(self, tmp_path):
        make_plain(tmp_path / "data", values=(0, 255))
        result = train("--data", tmp_path / "data", "--out", tmp_path / "out", "--crop", "32x32")
        assert result.exit_code == 0, result.output
        warned = [line for line in result.stderr.splitlines() if "0 and 255 alone" in line]
        assert len(warned) == 1 and "such file" not in warned[0]

    @pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
    def test_corrupt_avif(self, trained):
        root, _ = trained
        path = root / "x.avif"
        Image.fromarray(COLOR).save(path)
        data = path.read_bytes()
        start = data.index(b"mdat") + 4
        for broken in (data[: len(data) // 2], data[:-20], data[:start] + bytes(len(data) - start)):
            path.write_bytes(broken)
            result = run("maps", path, "--checkpoint", root / "out/checkpoint.pt")
            assert_one_line(result, f"cannot read image {path}: ")
