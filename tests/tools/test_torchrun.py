"""``dnl-ext train`` in several processes: one run's losses, log, checkpoint and messages, in any number of them.

Most tests run the trainer or the command in a group of tests/processes.py, which starts in a fraction of a second. The
last class starts torchrun itself.
"""

import csv
import dataclasses
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import torch
from test_cli import ROOT, TINY, assert_one_line, run
from test_data import make_plain
from typer.testing import CliRunner

from dnl_ext.cli.app import app
from dnl_ext.segmentation.data.mosaic import MosaicData
from dnl_ext.segmentation.metrics import IGNORE
from dnl_ext.segmentation.network import VARIANTS
from dnl_ext.segmentation.training import checkpoint, distributed
from dnl_ext.segmentation.training.config import TrainConfig
from dnl_ext.segmentation.training.trainer import Listener, Trainer

STEPS = 20
CONFIG = TrainConfig(
    steps=STEPS, crop=(64, 64), batch_size=4, width=4, val_every=8, val_images=3, save_every=6, block_gain=0.5,
    threads=1, dtype="float64",
)  # fmt: skip
#: Of the losses and weights of twenty steps in float64: nothing but the order of sums differs.
TOLERANCE = 1e-9
#: Biases whose gradient is zero, for a norm or a softmax takes them out again, and the running mean that one of them
#: shifts. AdamW divides the rounding that is left of such a gradient by 1e-8, so these are held to less.
UNDETERMINED = {f"block.{name}" for name in (
    "g.conv.bias", "theta.conv.bias", "phi.conv.bias", "conv_mask.bias", "conv_out.bn.running_mean",
)}  # fmt: skip
UNDETERMINED_TOLERANCE = 1e-6


class PartlyLabelled(MosaicData):
    """Mosaics of which image 4 n + k has a k-th of its pixels left out, up to all of them."""

    def training_sample(self, seed, index, crop):
        image, label = super().training_sample(seed, index, crop)
        label[: crop[0] * (index % 4) // 3] = IGNORE
        return image, label


class Losses(Listener):
    def __init__(self):
        self.losses = []

    def step(self, step, loss, rate, seconds):
        self.losses.append(loss)


def train(rank, world_size, config, out, stop_after=None):
    """Train or, where ``out`` holds a checkpoint, train on: losses, weights, confusion matrix, mIoU."""
    path = out / "checkpoint.pt"
    state = checkpoint.load(path) if path.exists() else None
    trainer = Trainer(config, out, data=PartlyLabelled(config.crop, config.val_images), state=state, state_path=path)
    recorded = Losses()
    trainer.run(recorded, stop_after)
    counts = None if trainer.confusion is None else trainer.confusion.counts
    return recorded.losses, trainer.network.state_dict(), counts, trainer.miou


def assert_agree(result, expected, first=0):
    losses, weights, counts, miou = result
    assert losses == pytest.approx(expected[0][first:], rel=TOLERANCE, abs=0) and len(losses) == STEPS - first
    assert_same_weights(weights, expected[1])
    assert torch.equal(counts, expected[2]) and miou == expected[3]


def assert_same_weights(weights, expected):
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        tolerance = UNDETERMINED_TOLERANCE if name in UNDETERMINED else TOLERANCE
        note = functools.partial("{}: {}".format, name)
        torch.testing.assert_close(weights[name], weight, rtol=tolerance, atol=tolerance, msg=note)


def rows(out):
    with open(out / "log.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folder and result of a run in one process."""
    out = tmp_path_factory.mktemp("alone")
    return out, train(0, 1, CONFIG, out)


class TestOneRun:
    @pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
    def test_as_one_process(self, world_size, alone, tmp_path):
        results = processes.run(train, world_size, CONFIG, tmp_path)
        for result in results:
            assert_agree(result, alone[1])
        assert rows(tmp_path) == rows(alone[0])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "log.csv"]
        states = [checkpoint.load(out / "checkpoint.pt") for out in (tmp_path, alone[0])]
        assert states[0].keys() == states[1].keys() and states[0]["config"] == states[1]["config"]
        assert states[0]["network"].keys() == states[1]["network"].keys()

    def test_the_attention_is_trained(self, alone):
        """A comparison of networks that stand still would compare nothing."""
        first = Trainer(CONFIG, data=PartlyLabelled(CONFIG.crop, 1)).network.state_dict()
        for name in ("block.theta.conv.weight", "block.phi.conv.weight", "block.conv_mask.weight"):
            assert (alone[1][1][name] - first[name]).abs().max() > 1e5 * TOLERANCE

    def test_resumed_in_other_numbers_of_processes(self, alone, tmp_path):
        processes.run(train, 2, CONFIG, tmp_path, 7)
        train(0, 1, CONFIG, tmp_path, 13)
        for result in processes.run(train, 4, CONFIG, tmp_path):
            assert_agree(result, alone[1], first=13)
        assert rows(tmp_path) == rows(alone[0])

    @pytest.mark.slow
    def test_resumed_in_two_is_bit_exact(self, tmp_path):
        config = dataclasses.replace(CONFIG, steps=6, dtype="float32")
        straight = processes.run(train, 2, config, tmp_path / "straight")[0]
        processes.run(train, 2, config, tmp_path / "parts", 3)
        parts = processes.run(train, 2, config, tmp_path / "parts")[0]
        assert parts[0] == straight[0][3:]
        for name, weight in straight[1].items():
            assert torch.equal(parts[1][name], weight)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "changes",
        [*({"variant": name} for name in VARIANTS if name != CONFIG.variant), {"optimizer": "sgd"}, {"workers": 3}],
    )
    def test_other_settings(self, changes, tmp_path):
        config = dataclasses.replace(CONFIG, **changes)
        expected = train(0, 1, config, tmp_path / "alone")
        assert_agree(processes.run(train, 2, config, tmp_path / "two")[0], expected)

    def test_class_weights_and_an_auxiliary_head(self, tmp_path):
        """The processes' pixels weigh differently, and are divided by the weight of all."""
        (tmp_path / "weights.json").write_text("[1, 0.5, 9, 0.1, 2, 3, 4, 0.2]")
        weights = str(tmp_path / "weights.json")
        config = dataclasses.replace(CONFIG, steps=3, class_weights=weights, aux_weight=0.4)
        expected = train(0, 1, config, tmp_path / "alone")
        losses, found, counts, _ = processes.run(train, 2, config, tmp_path / "two")[0]
        assert losses == pytest.approx(expected[0], rel=TOLERANCE, abs=0)
        assert_same_weights(found, expected[1])
        assert torch.equal(counts, expected[2])

    @pytest.mark.slow
    def test_bf16(self, tmp_path):
        config = dataclasses.replace(CONFIG, dtype="float32", amp="bf16")
        expected = train(0, 1, config, tmp_path / "alone")[0]
        losses = processes.run(train, 2, config, tmp_path / "two")[0][0]
        assert losses == pytest.approx(expected, rel=2**-6)


def commands(rank, world_size, *lists):
    """Exit code, stdout and stderr of ``dnl-ext`` with each list of arguments, in this process of a group."""
    results = []
    for arguments in lists:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert isinstance(result.exception, SystemExit | None), result.exception
        results.append((result.exit_code, result.stdout, result.stderr))
    return results


def command_with_a_signal(rank, world_size, *arguments):
    """The same, where process 1 gets a SIGTERM in its third step."""
    original = Trainer.train_step

    def train_step(self, *batch):
        if self.step == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *batch)

    Trainer.train_step = train_step
    return commands(rank, world_size, arguments)[0]


def command_with_a_full_disk(rank, world_size, *arguments):
    """The same, where nothing can be saved."""

    def save(state, file):
        raise OSError(28, "No space left on device")

    torch.save = save
    return commands(rank, world_size, arguments)[0]


def assert_one_speaks(results, code, *parts):
    """Every process ended with this code, and the first alone wrote to stderr: one line that holds all parts."""
    assert [result[0] for result in results] == [code] * len(results), results
    assert all(stderr == "" for _, _, stderr in results[1:]), results
    lines = results[0][2].strip().splitlines()
    assert len(lines) == 1 and all(str(part) in lines[0] for part in parts), results[0][2]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What both processes of a group made of each list of arguments, and the folder they ran in."""
    root = tmp_path_factory.mktemp("messages")
    make_plain(root / "data")  # four images for training, of which each process reads two
    (root / "data/images/2.png").write_text("no image")
    tiny = ["train", *TINY, "--batch-size", 2]
    new, used = [*tiny, "--out", root / "new"], ["--out", root / "used"]
    lists = {
        "batch": [*new, "--batch-size", 3],
        "data": [*new, "--data", "no/such/folder"],
        "epochs": [*new, "--epochs", 2],
        "crop": [*new, "--crop", 7],
        "one GPU": [*new, "--device", "cuda:0"],
        "GPU": [*new, "--device", "cuda"],
        "init": [*new, "--init", "x.pt"],
        "resume": [*new, "--resume"],
        "dtype": [*new, "--amp", "bf16", "--dtype", "float64"],
        "run": [*tiny, *used],
        "run again": [*tiny, *used],
        "other run": ["train", "--resume", *used, "--width", 8],
        "image": [*tiny, "--data", root / "data", "--out", root / "image"],
        "loss": [*tiny, "--out", root / "loss", "--steps", 20, "--lr", 1e30],
    }
    found = processes.run(commands, 2, *lists.values())
    return root, dict(zip(lists, zip(*found, strict=True), strict=True))


class TestMessages:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("batch", "error: --batch-size must be a multiple of the 2 processes that share it, got 3"),
            ("data", "error: data folder no/such/folder does not exist"),
            ("epochs", "error: give --steps or --epochs, not both"),
            ("crop", "error: --crop must be HEIGHTxWIDTH, such as 512x1024, got 7"),
            ("one GPU", "error: --device must be auto, cpu or cuda for several processes, one GPU each, got cuda:0"),
            ("init", "error: checkpoint x.pt does not exist"),
            ("resume", "checkpoint.pt does not exist"),
            ("dtype", "error: --amp bf16 needs --dtype float32, got float64"),
            ("run again", "--resume continues that run, --overwrite starts anew"),
            ("other run", "was made with --width 4, this run asks for 8"),
            ("image", "error: cannot read image"),
            ("loss", "try a lower --lr than 1e+30"),
        ],
    )
    def test_one_speaks_for_all(self, name, message, results):
        assert_one_speaks(results[1][name], 2, message)

    def test_nothing_was_written(self, results):
        assert not (results[0] / "new").exists()

    def test_a_good_run(self, results):
        (code, output, errors), silent = results[1]["run"]
        assert code == 0 and errors == "" and silent == (0, "", "")
        assert "2 processes with 1 threads" in output and output.count("step 1/2") == 1

    @pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
    def test_no_gpu(self, results):
        assert_one_speaks(results[1]["GPU"], 2, "error: --device cuda:0", "sees 0 CUDA devices")

    def test_a_signal_to_one_process_stops_all(self, tmp_path):
        arguments = ["train", *TINY, "--steps", 9, "--batch-size", 2, "--out", tmp_path]
        results = processes.run(command_with_a_signal, 2, *arguments)
        assert [result[0] for result in results] == [128 + signal.SIGTERM] * 2
        assert results[1][2] == "" and results[0][2] == (
            "stopped after step 3; the state is saved, continue with\n"
            f"  torchrun --nproc-per-node 2 -m dnl_ext train --resume --out {tmp_path}\n"
        )
        assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] == 3

    def test_a_full_disk(self, tmp_path):
        results = processes.run(command_with_a_full_disk, 2, "train", *TINY, "--batch-size", 2, "--out", tmp_path)
        assert_one_speaks(results, 2, "error: cannot write checkpoint", "No space left on device")


class TestEnvironment:
    """What a launcher sets, incomplete or wrong."""

    @pytest.mark.parametrize(
        ("variables", "parts"),
        [
            ({"WORLD_SIZE": "2"}, ["RANK is not set, WORLD_SIZE 2"]),
            ({"RANK": "1"}, ["RANK 1, WORLD_SIZE is not set"]),
            (
                {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
                ["RANK 2, WORLD_SIZE 2"],
            ),
            ({"RANK": "one", "WORLD_SIZE": "2"}, ["RANK one"]),
            ({"RANK": "0", "WORLD_SIZE": "2"}, ["MASTER_ADDR is not set"]),
        ],
    )
    def test_incomplete(self, variables, parts, tmp_path, monkeypatch):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert_one_line(run("train", *TINY, "--out", tmp_path), "torchrun --nproc-per-node N -m dnl_ext train", *parts)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("port", ["seven", "1e9"])
    def test_no_place_to_meet(self, port, tmp_path, monkeypatch):
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        assert_one_line(run("train", *TINY, "--out", tmp_path), f"cannot join 2 processes at localhost:{port}")

    def test_a_world_of_one(self, tmp_path, monkeypatch):
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "1")
        assert run("train", *TINY, "--out", tmp_path).exit_code == 0
        assert not distributed.is_distributed()

    def test_other_commands_do_not_look(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert run("demo", "--help").exit_code == 0


def torchrun(*arguments, processes=2):
    """``torchrun -m dnl_ext`` in a process group of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*launcher, "-m", "dnl_ext", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def wait_for_steps(process, log, steps):
    deadline = time.monotonic() + DEADLINE
    while not (log.exists() and log.read_text().count("\n") > steps):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


#: Seconds until a test gives up, on a machine however busy.
DEADLINE = 300
#: To be stopped on the way.
LONG = (
    "train", "--steps", 4000, "--crop", "32x32", "--width", 4, "--batch-size", 2, "--block-gain", 0.5, "--val-every", 0,
    "--val-images", 1, "--save-every", 5, "--threads", 1, "--dtype", "float64",
)  # fmt: skip


class TestTorchrun:
    @pytest.mark.slow
    def test_a_run(self, tmp_path):
        options = ("train", *TINY, "--steps", 6, "--batch-size", 4, "--block-gain", 0.5, "--dtype", "float64",
                   "--val-images", 3, "--val-every", 4)  # fmt: skip
        process = torchrun(*options, "--out", tmp_path / "two")
        output, errors = process.communicate(timeout=DEADLINE)
        assert process.returncode == 0 and errors == "", errors
        assert output.count("step 6/6  loss") == 1 and "2 processes with 1 threads" in output
        assert run(*options, "--out", tmp_path / "one").exit_code == 0
        assert rows(tmp_path / "two") == rows(tmp_path / "one")
        two, one = (checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("two", "one"))
        assert two["config"] == one["config"] and two["miou"] == one["miou"]
        assert_same_weights(two["network"], one["network"])

    def test_ctrl_c_saves_and_one_process_goes_on(self, tmp_path):
        two, one = tmp_path / "two", tmp_path / "one"
        process = torchrun(*LONG, "--out", two)
        wait_for_steps(process, two / "log.csv", 3)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=DEADLINE)
        assert process.returncode != 0
        assert output.count("step 200/") <= 1 and "2 processes with 1 threads" in output
        assert errors.count("stopped after step") == 1 and errors.count("continue with") == 1
        step = checkpoint.load(two / "checkpoint.pt")["step"]
        assert step >= 3 and f"stopped after step {step};" in errors
        assert int(rows(two)[-1]["step"]) == step
        assert run("train", "--resume", "--out", two, "--stop-after", step + 2).exit_code == 0
        assert run(*LONG, "--out", one, "--stop-after", step + 2).exit_code == 0
        assert len(rows(one)) == step + 2 and rows(two) == rows(one)
        assert_same_weights(*(checkpoint.load(out / "checkpoint.pt")["network"] for out in (two, one)))

    @pytest.mark.slow
    @pytest.mark.parametrize("victim", [0, 1])
    def test_a_process_that_is_killed(self, victim, tmp_path):
        process = torchrun(*LONG, "--out", tmp_path)
        wait_for_steps(process, tmp_path / "log.csv", 8)
        os.kill(worker(process.pid, victim), signal.SIGKILL)
        _, errors = process.communicate(timeout=DEADLINE)
        assert process.returncode != 0 and "exitcode  : -9" in errors
        assert errors.count("error: another process of this training has ended") == (victim == 1), errors
        assert "Error:" not in errors.split("torch.distributed.elastic")[0]
        assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] >= 5

    @pytest.mark.slow
    def test_bad_input(self, tmp_path):
        process = torchrun(*LONG, "--out", tmp_path, "--batch-size", 3)
        _, errors = process.communicate(timeout=DEADLINE)
        assert process.returncode != 0
        assert errors.count("error: --batch-size must be a multiple of the 2 processes") == 1
        assert not list(tmp_path.iterdir())


def worker(launcher, rank):
    """Process id of a rank that a launcher has started (Linux)."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status, variables = (folder / "status").read_text(), (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"\nPPid:\t{launcher}\n" in status and f"RANK={rank}".encode() in variables:
            return int(folder.name)
    raise AssertionError(f"no process {rank} of {launcher}")
