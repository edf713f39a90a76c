"""Training: resuming bit for bit, the network and its variants, checkpoints, attention rows, the memory figure."""

import csv
import dataclasses
import subprocess
import sys

import pytest
import torch

import dnl_ext
from dnl_ext.analysis import attention_rows
from dnl_ext.segmentation.data.mosaic import MosaicData
from dnl_ext.segmentation.errors import InputError
from dnl_ext.segmentation.experiments import memory
from dnl_ext.segmentation.looking.class_focus import focus, token_labels
from dnl_ext.segmentation.metrics import IGNORE
from dnl_ext.segmentation.network import VARIANTS, SegmentationNetwork, tokens
from dnl_ext.segmentation.training import checkpoint
from dnl_ext.segmentation.training.config import TrainConfig, resolve
from dnl_ext.segmentation.training.trainer import Listener, Trainer, learning_rate, segmentation_loss

TINY = TrainConfig(
    steps=6, crop=(64, 96), batch_size=2, width=4, val_every=2, val_images=1, save_every=2, block_gain=0.5, threads=1
)


@pytest.fixture(scope="module")
def data():
    return MosaicData((64, 96), 1)


def assert_same(a, b):
    """Equal bit by bit, in every tensor of nested dicts and lists."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def log_of(out):
    with open(out / "log.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


class TestResume:
    @pytest.mark.parametrize(
        "changes",
        [{}, {"variant": "nl"}, {"amp": "bf16"}, {"backend": "reference"}, {"workers": 3}],
        ids=lambda changes: "-".join(map(str, changes.values())) or "dnl",
    )
    def test_six_steps_are_three_and_three(self, changes, tmp_path, data):
        config = dataclasses.replace(TINY, **changes)
        Trainer(config, tmp_path / "straight", data=data).run()
        Trainer(config, tmp_path / "parts", data=data).run(stop_after=3)
        path = tmp_path / "parts/checkpoint.pt"
        state = checkpoint.load(path)
        assert state["step"] == 3
        torch.manual_seed(99)
        Trainer(TrainConfig(**state["config"]), tmp_path / "parts", state=state, state_path=path, data=data).run()
        straight, parts = (checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("straight", "parts"))
        assert straight["step"] == 6
        assert_same(straight, parts)
        assert log_of(tmp_path / "straight") == log_of(tmp_path / "parts")

    def test_another_seed_is_another_run(self, data):
        weights = []
        for seed in (0, 1):
            trainer = Trainer(dataclasses.replace(TINY, steps=1, seed=seed), data=data)
            trainer.run()
            weights.append(trainer.network.classifier.weight)
        assert not torch.equal(*weights)

    def test_log_rows_after_the_checkpoint_are_replaced(self, tmp_path, data):
        Trainer(TINY, tmp_path, data=data).run(stop_after=5)
        path = tmp_path / "checkpoint.pt"
        state = checkpoint.load(path)
        with open(tmp_path / "log.csv", "a") as file:
            file.write("6,0,0,0,0,\n6,,,,,0.5\n7,,")  # as after a kill in the middle of a line
        Trainer(TINY, tmp_path, state=state, state_path=path, data=data).run()
        steps = [int(row["step"]) for row in log_of(tmp_path) if row["loss"]]
        assert steps == [1, 2, 3, 4, 5, 6]

    @pytest.mark.parametrize("part", ["optimizer", "step", "rng", "network", "config", "classes"])
    def test_a_checkpoint_that_lacks_a_part(self, part, tmp_path, data):
        Trainer(TINY, tmp_path, data=data).run(stop_after=1)
        path = tmp_path / "checkpoint.pt"
        state = checkpoint.load(path)
        config = TrainConfig(**state["config"])
        torch.save({name: value for name, value in state.items() if name != part}, path)
        with pytest.raises(InputError, match=part):
            Trainer(config, tmp_path, state=checkpoint.load(path), state_path=path, data=data)

    def test_resolve(self):
        saved = dataclasses.asdict(dataclasses.replace(TINY, lr=0.5))
        assert resolve({"device": "cpu", "lr": 0.5}, saved, "x.pt").lr == 0.5
        with pytest.raises(InputError, match=r"x\.pt was made with --variant dnl, this run asks for nl"):
            resolve({"variant": "nl"}, saved, "x.pt")
        with pytest.raises(InputError, match=r"--crop 64x96, this run asks for 64x64"):
            resolve({"crop": (64, 64)}, saved, "x.pt")


class TestTrainer:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_one_batch_can_be_learned(self, variant, data):
        trainer = Trainer(dataclasses.replace(TINY, steps=40, width=8, lr=5e-3, variant=variant), data=data)
        batch = trainer.batch(0)
        losses = [trainer.train_step(*batch) for _ in range(25)]
        assert losses[-1] < 0.4 * losses[0]

    def test_reports_each_step_and_validation(self, data):
        steps, results = [], []

        class Recorder(Listener):
            def step(self, step, loss, rate, seconds):
                steps.append((step, rate))

            def validation(self, step, done, total, miou):
                results.append((step, miou))

        trainer = Trainer(TINY, data=data)
        trainer.run(Recorder())
        assert steps == [(step + 1, learning_rate(TINY, step)) for step in range(6)]
        assert [step for step, miou in results if miou is not None] == [2, 4, 6]
        assert trainer.miou == results[-1][1] and trainer.seconds_per_step() > 0

    def test_schedule(self):
        config = dataclasses.replace(TINY, steps=100, lr=1.0)
        rates = [learning_rate(config, step) for step in range(100)]
        assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9]
        assert rates[50] == pytest.approx(0.5**0.9) and 0 < rates[-1] < 0.02

    def test_loss_not_finite(self, tmp_path, data):
        trainer = Trainer(TINY, tmp_path, data=data)
        torch.nn.init.constant_(trainer.network.classifier.bias, float("nan"))
        with pytest.raises(InputError, match="loss is nan at step 1"):
            trainer.run()

    def test_data_error_keeps_what_was_trained(self, tmp_path, data):
        class Broken:
            name, classes, epoch, validation_size = data.name, data.classes, data.epoch, 1
            validation_sample = data.validation_sample

            def training_sample(self, seed, index, crop):
                if index >= 6:
                    raise InputError("cannot read image 6")
                return data.training_sample(seed, index, crop)

        config = dataclasses.replace(TINY, save_every=100, val_every=0)
        with pytest.raises(InputError, match="cannot read image 6"):
            Trainer(config, tmp_path, data=Broken()).run()
        assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] == 3

    def test_loss_ignores(self):
        logits, labels = torch.randn(1, 3, 4, 4, requires_grad=True), torch.full((1, 4, 4), IGNORE)
        assert segmentation_loss(logits, labels).item() == 0
        labels[0, 0, 0] = 2
        expected = -logits[0, :, 0, 0].log_softmax(0)[2]
        assert segmentation_loss(logits, labels).item() == pytest.approx(expected.item())

    @pytest.mark.parametrize(
        "changes", [{"steps": 0}, {"lr": -1.0}, {"crop": (8, 64)}, {"variant": "x"}, {"amp": "fp8"}]
    )
    def test_settings_out_of_range(self, changes):
        with pytest.raises(InputError, match=f"--{next(iter(changes))} must be"):
            dataclasses.replace(TINY, **changes)


class TestNetwork:
    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("size", [(64, 96), (50, 67)])
    def test_shapes(self, variant, size):
        network = SegmentationNetwork(5, variant, width=4)
        images = torch.rand(2, 3, *size)
        assert network(images).shape == (2, 5, *size)
        features = network.features(images)
        assert features.shape[2] * features.shape[3] == tokens(size)

    @pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "none"])
    def test_backends_agree(self, variant):
        torch.manual_seed(0)
        fused = SegmentationNetwork(4, variant, "fused", width=4, block_gain=1.0)
        plain = SegmentationNetwork(4, variant, "reference", width=4)
        plain.load_state_dict(fused.state_dict())
        images = torch.rand(2, 3, 64, 64)
        results = []
        for network in (fused, plain):
            logits = network(images)
            logits.square().mean().backward()
            results.append((logits, network.classifier.weight.grad, network.encoder[0][0].weight.grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)

    def test_variants(self):
        dnl, nl = (SegmentationNetwork(4, variant, width=4).block for variant in ("dnl", "nl"))
        assert (dnl.whiten, dnl.temperature) == ("channel", 0.05) and dnl.conv_mask is not None
        assert (nl.whiten, nl.temperature) == (None, 1.0) and not hasattr(nl, "conv_mask")
        for variant in VARIANTS[:-1]:
            assert SegmentationNetwork(4, variant, width=4).block.variant == variant
        assert SegmentationNetwork(4, "none", width=4).block is None
        with pytest.raises(ValueError, match=r"^variant: expected one of dnl, .*, none, got 'x'"):
            SegmentationNetwork(4, "x", width=4)

    def test_starts_as_the_identity(self):
        network = SegmentationNetwork(4, "dnl", width=4)
        features = network.features(torch.rand(1, 3, 64, 64))
        torch.testing.assert_close(network.block(features), features)


class TestCheckpoint:
    def test_a_failed_write_keeps_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "checkpoint.pt"
        checkpoint.save({"format": checkpoint.FORMAT, "step": 1}, path)

        def half(state, file):
            file.write(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", half)
        with pytest.raises(InputError, match="No space left"):
            checkpoint.save({"format": checkpoint.FORMAT, "step": 2}, path)
        assert checkpoint.load(path)["step"] == 1
        assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]

    @pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
    def test_unreadable(self, content, tmp_path):
        path = tmp_path / "checkpoint.pt"
        if content is None:
            torch.save({"something": "else"}, path)
        else:
            path.write_bytes(content)
        with pytest.raises(InputError) as raised:
            checkpoint.load(path)
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)

    def test_runs_no_code_from_the_file(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (pytest.fail, ("code from a checkpoint ran",))

        torch.save({"format": checkpoint.FORMAT, "network": Evil()}, tmp_path / "x.pt")
        with pytest.raises(InputError, match="cannot read checkpoint"):
            checkpoint.load(tmp_path / "x.pt")

    def test_weights_from_a_network_without_block(self):
        start, network = SegmentationNetwork(4, "none", width=4), SegmentationNetwork(4, "dnl", width=4)
        checkpoint.load_weights(network, {"network": start.state_dict()}, "x.pt", partial=True)
        assert torch.equal(network.encoder[0][0].weight, start.encoder[0][0].weight)

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (SegmentationNetwork(4, "nl", width=4), r"x\.pt is of another network: it lacks block\.conv_mask\.bias"),
            (SegmentationNetwork(5, "dnl", width=4), r"x\.pt is of another shape: classifier\.weight is \(5, 256"),
            (SegmentationNetwork(4, "dnl", width=8), r"x\.pt is of another shape: encoder"),
        ],
    )
    def test_weights_that_do_not_fit(self, other, message):
        network = SegmentationNetwork(4, "dnl", width=4)
        for partial in (False, True):
            with pytest.raises(InputError, match=message):
                checkpoint.load_weights(network, {"network": other.state_dict()}, "x.pt", partial)


class TestAttention:
    @pytest.mark.parametrize("variant", ["dnl", "dnl_shared_key", "pairwise", "nl"])
    def test_rows_are_rows_of_the_map(self, variant):
        torch.manual_seed(0)
        block = SegmentationNetwork(4, variant, width=4).block
        for role in ("query", "key"):
            torch.nn.init.normal_(block._layer(role).conv.weight, std=0.1)
        features = torch.randn(1, 256, 6, 9) + 0.5
        queries = [(0, 0), (5, 8), (2, 7)]
        maps = attention_rows(block, features, queries)
        query, key = (block._layer(role)(features)[0].flatten(1).t() for role in ("query", "key"))
        full = dnl_ext.reference.pairwise_softmax(query, key, scale=block._scale(), whiten=block.whiten)
        expected = torch.stack([full[row * 9 + column] for row, column in queries]).view(3, 6, 9)
        torch.testing.assert_close(maps.own, expected, rtol=1e-3, atol=1e-6)
        assert expected.amax() > 5 / 54  # the map is not flat
        assert maps.joint == {"nl": "product", "pairwise": "pairwise"}.get(variant, "sum")
        if variant == "pairwise":
            assert maps.unary is None
        else:
            torch.testing.assert_close(maps.unary.sum(), torch.tensor(1.0))
            assert maps.unary.shape == (6, 9)

    @pytest.mark.parametrize("whiten", ["channel", "spatial", "in", "fln", "bn", "bn_affine", None])
    def test_every_whitening(self, whiten):
        torch.manual_seed(0)
        block = dnl_ext.DisentangledNonLocal2d(8, 4, whiten=whiten, norm=None, use_out=False).eval()
        for conv in (block.conv_query, block.conv_key):
            torch.nn.init.normal_(conv.weight, std=0.3)
        x = torch.randn(1, 8, 3, 4) + 0.5
        rows = attention_rows(block, x, [(row, column) for row in range(3) for column in range(4)])
        weights = rows.pairwise.flatten(1) + rows.unary.flatten()
        expected = weights @ block.conv_value(x)[0].flatten(1).t()
        torch.testing.assert_close((block(x) - x)[0].flatten(1).t(), expected, rtol=1e-4, atol=1e-5)
        assert rows.pairwise.max() > 3 / 12

    def test_no_rows(self):
        with pytest.raises(NotImplementedError, match=r"^mode: expected .* softmaxes, got 'dot_product'"):
            attention_rows(dnl_ext.DisentangledNonLocal2d(8, mode="dot_product"), torch.randn(1, 8, 3, 4), [(0, 0)])

    @pytest.mark.parametrize("sub_sample", ["before", "after"])
    def test_sub_sampled_keys(self, sub_sample):
        block = dnl_ext.DisentangledNonLocal2d(8, sub_sample=sub_sample)
        maps = attention_rows(block, torch.randn(1, 8, 6, 10), [(5, 9)])
        assert maps.pairwise.shape == (1, 3, 5) and maps.unary.shape == (3, 5)
        torch.testing.assert_close(maps.pairwise.sum(), torch.tensor(1.0))

    def test_focus(self, data):
        result = focus(Trainer(TINY, data=data), queries=16)
        assert 0 < result.uniform < 1 and 0 < result.same_class < 1 and 0 <= result.variety < 1
        # An untrained block has flat maps.
        assert result.same_class == pytest.approx(result.uniform, abs=0.02)

    def test_token_labels(self):
        label = torch.arange(20 * 17).view(20, 17)
        picked = token_labels(label)
        assert picked.shape == (3, 3) and picked[0, 0] == label[4, 4] and picked[2, 2] == label[19, 16]


class TestMemory:
    def test_peak_counts_what_was_freed(self):
        # In a process of its own: here, memory that earlier tests give back in between would hide the block.
        code = (
            "import torch; from dnl_ext.segmentation.experiments import memory; torch.ones(1).sum();"
            "peak = memory.HostPeak();"
            "block = torch.ones(16 << 20); del block; print(peak.read())"  # 64 MB
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert 60e6 < int(result.stdout) < 100e6

    def test_step_in_a_process_of_its_own(self):
        config = dataclasses.replace(TINY, crop=(128, 192))
        result = memory.measure_step(config)
        assert result["peak_bytes"] > 1e6 and result["seconds"] > 0 and result["method"]

    def test_failure_is_one_line(self, monkeypatch):
        monkeypatch.setattr("sys.executable", "/bin/false")
        assert memory.measure_step(TINY) == {"error": "exit code 1"}
