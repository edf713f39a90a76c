"""Colours of classes: how far apart they are, whose they are, and what a legend names."""

import numpy as np
import pytest
import torch
from skimage.color import deltaE_ciede2000, rgb2lab

from dnl_ext.segmentation.data import palette
from dnl_ext.segmentation.data.colors import IGNORED, PALETTES, colorize
from dnl_ext.segmentation.data.layouts import CAMVID_CLASSES, CITYSCAPES_CLASSES
from dnl_ext.segmentation.looking.overlay import class_handles, tinted
from dnl_ext.segmentation.metrics import IGNORE


def least_distances(colors):
    """(CIELAB 1976, CIEDE2000): the least over all pairs of colours (C, 3), and of one with black."""
    lab = rgb2lab(np.concatenate([colors, [IGNORED]])[None].astype(np.uint8))[0]
    first, second = np.triu_indices(len(lab), 1)
    plain = np.linalg.norm(lab[first] - lab[second], axis=1)
    return float(plain.min()), float(deltaE_ciede2000(lab[first], lab[second]).min())


def shown(handles):
    return {handle.get_label(): tuple(round(255 * part) for part in handle.get_facecolor()[:3]) for handle in handles}


class TestPalette:
    @pytest.mark.parametrize(
        ("classes", "plain", "ciede2000"), [(8, 30, 22), (19, 30, 19), (60, 23, 11), (150, 15.5, 7.8), (255, 12, 6)]
    )
    def test_any_two_can_be_told_apart(self, classes, plain, ciede2000):
        found = least_distances(palette("ade20k", classes))
        assert found[0] > plain and found[1] > ciede2000

    def test_distances_are_measured(self):
        """Two colours that differ in one step of one channel are found, as the eight that were repeated would be."""
        colors = palette("plain", 20).copy()
        colors[13] = colors[4] + (0, 0, 1)
        assert least_distances(colors)[0] < 1
        assert least_distances(np.tile(palette("plain", 8), (2, 1)))[0] == 0

    def test_fewer_are_the_beginning_of_more(self):
        assert (palette("plain", 150)[:9] == palette("mosaic", 9)).all()
        assert palette("plain", 0).shape == (0, 3) and palette("plain", 255).dtype == np.uint8

    def test_data_sets_have_their_own(self):
        city, road = palette("cityscapes", 19), palette("camvid", 11)
        assert tuple(city[CITYSCAPES_CLASSES.index("car")]) == (0, 0, 142)
        assert tuple(city[CITYSCAPES_CLASSES.index("bicycle")]) == (119, 11, 32)
        assert tuple(road[CAMVID_CLASSES.index("sky")]) == (128, 128, 128)
        assert tuple(road[CAMVID_CLASSES.index("bicyclist")]) == (0, 128, 192)
        for name, colors in PALETTES.items():
            assert least_distances(np.array(colors))[0] > 15, name

    def test_another_number_of_classes_is_another_data_set(self):
        assert (palette("cityscapes", 20) == palette("plain", 20)).all()


class TestPictures:
    def test_colorize(self):
        colors = palette("camvid", 11)
        found = colorize(np.array([[0, 10], [IGNORE, 11]]), colors)
        assert found.tolist() == [[[128, 128, 128], [0, 128, 192]], [[0, 0, 0], [0, 0, 0]]]

    def test_tinted(self):
        image, label = torch.rand(3, 4, 6), torch.full((4, 6), 3)
        found = tinted(image, label, palette("camvid", 11), opacity=0.5)
        expected = 0.5 * image.mean(0)[..., None] + 0.5 * torch.tensor([128, 64, 128]) / 255
        torch.testing.assert_close(torch.from_numpy(found), expected)

    def test_legend_names_what_is_there(self):
        labels = [torch.tensor([[4, 4, 1]]), torch.tensor([1, 1, 1, IGNORE])]
        found = shown(class_handles(labels, CAMVID_CLASSES, palette("camvid", 11)))
        assert found == {"building": (128, 0, 0), "sidewalk": (0, 0, 192)}
        assert list(found) == ["building", "sidewalk"]  # the larger area first

    def test_classes_one_and_nine_differ(self):
        names = tuple(map(str, range(10)))
        found = shown(class_handles([torch.tensor([1, 9])], names, palette("plain", 10)))
        assert found["1"] != found["9"]

    def test_legend_of_many_classes(self):
        label, names = torch.arange(30).repeat_interleave(torch.arange(30, 0, -1)), tuple(map(str, range(40)))
        found = list(shown(class_handles([label], names, palette("plain", 40), most=5)))
        assert found == ["0", "1", "2", "3", "4", "and 25 more"]
