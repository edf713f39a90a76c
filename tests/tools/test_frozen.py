"""Backbones that are named, frozen encoders, and the cache of their features; timm itself is in tests/integrations."""

import dataclasses
import os
import sys

import numpy as np
import pytest
import torch
from test_cli import assert_one_line, run, train
from test_data import write_label
from test_evaluate import make_splits
from test_train import assert_same

from dnl_ext.segmentation import IGNORE, SegmentationNetwork
from dnl_ext.segmentation.data import FolderData, MosaicData, read_sample
from dnl_ext.segmentation.errors import InputError
from dnl_ext.segmentation.training import TrainConfig, Trainer, checkpoint, evaluate, feature_cache, restore
from dnl_ext.segmentation.training.feature_cache import FeatureCache, crop_features
from dnl_ext.segmentation.training.trainer import segmentation_loss

FROZEN = TrainConfig(
    steps=4, crop=(40, 48), batch_size=2, width=4, channels=16, val_every=0, save_every=2, block_gain=0.5, threads=1,
    freeze_backbone=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_splits(root, splits=("train", "val"), count=3)
    return FolderData(root)


class TestCropping:
    def test_label_and_features_stay_together(self):
        """Features that hold the number of their token, and labels that do so too, in whole images of odd size."""
        tokens = torch.arange(7 * 9).view(7, 9)
        label = tokens.repeat_interleave(8, 0).repeat_interleave(8, 1)[:53, :70]
        starts = set()
        for seed in range(20):
            features, cropped = crop_features(np.random.default_rng(seed), tokens[None].float(), label, (32, 40))
            assert features.shape == (1, 4, 5) and cropped.shape == (32, 40)
            assert torch.equal(torch.where(cropped[::8, ::8] == IGNORE, -1, cropped[::8, ::8]), features[0].long())
            starts.add(int(features[0, 0, 0]))
        assert len(starts) > 5

    def test_an_image_smaller_than_the_crop_is_filled_up(self):
        features, label = crop_features(
            np.random.default_rng(0), torch.ones(2, 3, 4), torch.zeros(24, 30, dtype=torch.int64), (40, 48)
        )
        assert features.shape == (2, 5, 6) and features.sum() == 2 * 3 * 4
        assert label.shape == (40, 48) and (label == IGNORE).sum() == 40 * 48 - 24 * 30 and (label[:24, :30] == 0).all()


class TestCache:
    def network(self):
        torch.manual_seed(0)
        return SegmentationNetwork(3, "dnl", width=4, channels=16, frozen=True).eval()

    def test_features_are_the_encoder_s_mirrored_ones_too(self, data, tmp_path):
        network = self.network()
        cache = FeatureCache(network, data, tmp_path)
        seen = set()
        for index in range(12):
            features, label = cache.training_sample(0, index, (64, 96))
            sample = data.train[data.training_number(0, index)]
            image, whole = read_sample(sample)
            height, width = whole.shape
            mirrored = torch.equal(label[:height, :width], whole.flip(1))
            assert mirrored or torch.equal(label[:height, :width], whole)
            with torch.no_grad():
                expected = network.encode((image.flip(2) if mirrored else image)[None])[0]
            have = features[:, : expected.shape[1], : expected.shape[2]]
            torch.testing.assert_close(have, expected, rtol=2e-3, atol=1e-4)
            seen.add(mirrored)
        assert seen == {True, False}

    def test_nothing_is_computed_twice(self, data, tmp_path, monkeypatch):
        network, calls = self.network(), []
        monkeypatch.setattr(
            network, "encode", lambda images: calls.append(1) or SegmentationNetwork.encode(network, images)
        )
        FeatureCache(network, data, tmp_path).fill(lambda done, total: None, lambda: False)
        assert len(calls) == 2 * len(data.train) + len(data.val)
        again = FeatureCache(network, data, tmp_path)
        again.fill(lambda done, total: None, lambda: False)
        again.training_sample(3, 1, (40, 48))
        assert len(calls) == 2 * len(data.train) + len(data.val)

    def test_another_encoder_or_image_has_files_of_its_own(self, data, tmp_path):
        network = self.network()
        cache = FeatureCache(network, data, tmp_path)
        before = cache.path(data.val[0], False)
        stat = data.val[0].image.stat()
        try:
            data.val[0].image.touch()
            assert cache.path(data.val[0], False) != before
        finally:
            os.utime(data.val[0].image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert cache.path(data.val[0], False) == before != cache.path(data.val[0], True)
        with torch.no_grad():
            next(network.encoder.parameters()).add_(1e-3)
        assert FeatureCache(network, data, tmp_path).path(data.val[0], False) != before

    def test_a_damaged_file_is_named(self, data, tmp_path):
        cache = FeatureCache(self.network(), data, tmp_path)
        cache.path(data.val[0], False).write_bytes(b"half")
        with pytest.raises(InputError, match=r"npy is damaged: remove it"):
            cache.validation_sample(0)

    def test_stops_between_images(self, data, tmp_path):
        cache = FeatureCache(self.network(), data, tmp_path)
        done = []
        cache.fill(lambda *progress: done.append(progress), lambda: len(done) == 2)
        assert done == [(1, 9), (2, 9)] and len(list(cache.folder.iterdir())) == 2

    @pytest.mark.parametrize("processes", [1, 2])
    def test_runs_at_once_begin_elsewhere(self, data, tmp_path, monkeypatch, processes):
        """Else two that fill one folder would compute every file in step. Processes of one run have a share each."""
        orders, network = [], self.network()
        monkeypatch.setattr(feature_cache.distributed, "world_size", lambda: processes)
        monkeypatch.setattr(FeatureCache, "compute", lambda self, sample, mirrored, path: orders[-1].append(path))
        for pid in (100, 101):
            shares = []
            monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
            for rank in range(processes):
                orders.append([])
                monkeypatch.setattr(feature_cache.distributed, "rank", lambda rank=rank: rank)
                FeatureCache(network, data, tmp_path).fill(lambda done, total: None, lambda: False)
                shares += orders[-1]
            assert len(shares) == len(set(shares)) == 9
        assert orders[0][0] != orders[processes][0] and set(orders[0]) == set(orders[processes])

    def test_features_beyond_float16(self, data, tmp_path):
        network = self.network()
        with torch.no_grad():
            network.encoder[-2][1].weight.fill_(1e6)
        with pytest.raises(InputError, match="do not fit float16"):
            FeatureCache(network, data, tmp_path).validation_sample(0)

    def test_needs_files(self, tmp_path):
        with pytest.raises(InputError, match="needs --data DIR"):
            FeatureCache(self.network(), MosaicData((64, 96), 1), tmp_path)


class TestTraining:
    def test_the_encoder_stays_as_it_is(self, data, tmp_path):
        trainer = Trainer(FROZEN, tmp_path, data=data)
        before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
        trainer.run()
        changed = {name for name, value in trainer.network.state_dict().items() if not torch.equal(value, before[name])}
        assert changed and not any(name.startswith("encoder.") for name in changed)
        assert {"classifier.weight", "block.g.conv.weight"} <= changed

    def test_norms_of_a_frozen_encoder_keep_their_statistics(self):
        network = SegmentationNetwork(3, "dnl", width=4, channels=16, frozen=True).train()
        before = {name: value.clone() for name, value in network.state_dict().items()}
        network(torch.rand(2, 3, 64, 64))
        changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
        assert changed and all(name.startswith("block.conv_out.bn.") for name in changed)
        assert SegmentationNetwork(3, "dnl", width=4, channels=16).train().encoder.training

    def test_validation_is_that_of_images(self, data, tmp_path):
        trainer = Trainer(FROZEN, tmp_path, data=data)
        trainer.run()
        whole = evaluate(restore(tmp_path / "checkpoint.pt"), data)
        assert abs(whole.counts - trainer.confusion.counts).sum() <= 0.02 * whole.counts.sum()  # float16 features

    def test_resumes_bit_for_bit(self, data, tmp_path):
        Trainer(FROZEN, tmp_path / "straight", data=data).run()
        Trainer(FROZEN, tmp_path / "parts", data=data).run(stop_after=2)
        path = tmp_path / "parts/checkpoint.pt"
        Trainer(FROZEN, tmp_path / "parts", state=checkpoint.load(path), state_path=path, data=data).run()
        straight, parts = (checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("straight", "parts"))
        assert_same(straight, parts)

    def test_label_stride(self, data, tmp_path):
        trainer = Trainer(dataclasses.replace(FROZEN, label_stride=4), tmp_path, data=data)
        features, labels = trainer.batch(0)
        trainer.network.train()
        coarse = labels[:, 2::4, 2::4]
        expected = segmentation_loss(trainer.head(features, coarse.shape[1:]), coarse).item()
        assert trainer.train_step(features, labels) == pytest.approx(expected, rel=1e-5)

    def test_commands(self, data, tmp_path):
        """An encoder from one run, frozen in the next, which diagnose and maps then open."""
        root = data.val[0].image.parents[2]
        options = ("--data", root, "--block-gain", "1", "--channels", "16")
        assert train(*options, "--out", tmp_path / "start").exit_code == 0
        start = tmp_path / "start/checkpoint.pt"
        result = train(
            *options, "--out", tmp_path / "frozen", "--init", start, "--freeze-backbone", "--label-stride", 2
        )
        assert result.exit_code == 0, result.output
        assert "features of 7/7 images" in result.output and (tmp_path / "frozen/features").is_dir()
        result = run("diagnose", tmp_path / "frozen/checkpoint.pt", "--images", 1, "--queries", 8, "--pictures", 0,
                     "--out", tmp_path / "report")  # fmt: skip
        assert result.exit_code == 0, result.output


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "parts"),
        [
            (("--backbone", "resnet18"), ("--backbone must be small or timm:NAME", "got resnet18")),
            (("--backbone", "timm:"), ("--backbone must be small or timm:NAME",)),
            (("--backbone-weights", "x.pth"), ("--backbone-weights FILE belongs to --backbone timm:NAME",)),
            (("--channels", "1"), ("--channels must be at least 2, got 1",)),
            (("--label-stride", "0"), ("--label-stride must be at least 1, got 0",)),
            (("--label-stride", "65"), ("--label-stride must be at most the crop's sides, got 65",)),
            (("--freeze-backbone", "--crop", "60x96"), ("--freeze-backbone needs a --crop in multiples of 8", "60x96")),
            (("--freeze-backbone",), ("--freeze-backbone", "needs --data DIR")),
        ],
    )
    def test_one_line(self, options, parts, tmp_path):
        assert_one_line(train(*options, "--out", tmp_path), *parts)

    def test_without_timm(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "timm", None)
        result = train("--backbone", "timm:resnet18", "--out", tmp_path)
        assert_one_line(result, "--backbone timm:NAME needs timm: pip install dnl_ext[timm]")

    def test_a_label_of_another_size(self, data, tmp_path):
        make_splits(tmp_path, splits=("train", "val"), count=1)
        write_label(tmp_path / "labels/val/val0.png", (0, 1), size=(8, 8))
        network = SegmentationNetwork(3, "none", width=4, channels=16, frozen=True)
        with pytest.raises(InputError, match="another size than its image"):
            FeatureCache(network, FolderData(tmp_path), tmp_path / "features").validation_sample(0)
