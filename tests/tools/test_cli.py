"""The command line: what each command writes, one line and exit code 2 for bad input, Ctrl-C, resuming."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from test_data import MAKERS, make_plain, write_label
from test_train import assert_same
from typer.testing import CliRunner

from dnl_ext import cli
from dnl_ext.cli import health
from dnl_ext.cli.app import COMMANDS, app
from dnl_ext.segmentation.training import checkpoint

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--steps", "2", "--crop", "64x64", "--batch-size", "1", "--width", "4", "--val-images", "1", "--val-every", "0",
        "--threads", "1")  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def train(*arguments):
    return run("train", *TINY, *arguments)


def start(*arguments):
    """``python -m dnl_ext`` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dnl_ext", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def assert_one_line(result, *parts):
    """Exit code 2 and one line on stderr that holds all parts."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)  # and no other: a traceback is not a message
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    for part in parts:
        assert str(part) in lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a finished training of two steps."""
    out = tmp_path_factory.mktemp("trained")
    assert train("--out", out).exit_code == 0
    return out


class TestApp:
    def test_help_lists_the_commands(self):
        result = run("--help")
        assert result.exit_code == 0
        assert "train" in result.output and "demo" in result.output

    @pytest.mark.parametrize("command", ["train", "demo"])
    def test_help_of_a_command(self, command):
        result = run(command, "--help")
        assert result.exit_code == 0 and "--seed" in result.output

    @pytest.mark.parametrize("name", COMMANDS)
    def test_help_loses_nothing(self, name):
        """rich takes text in square brackets for markup, and shows none of it."""
        command = typer.main.get_command(app).get_command(None, name)
        texts = [command.help, *(parameter.help for parameter in command.params)]
        assert len(texts) > 3 and not [text for text in texts if text and "[" in text]

    def test_unknown_command(self):
        assert run("fly").exit_code == 2

    def test_missing_packages(self, monkeypatch, capsys):
        monkeypatch.setattr(cli, "PACKAGES", ("no_such_package",))
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        assert capsys.readouterr().err == 'dnl_ext: no_such_package not found; pip install "dnl_ext[cli]"\n'

    def test_doctor_needs_torch_alone(self, monkeypatch, capsys):
        """As right after `pip install` of a wheel."""
        monkeypatch.setattr(cli, "PACKAGES", ("no_such_package",))
        wrong = (["--dtype", "int8"], ["--fly"], ["--shape", "abc"], ["--shape", f"{10**20},256,512"])
        for arguments, code in ((["--json", "--device", "cpu"], 0), *((options, 2) for options in wrong)):
            with pytest.raises(SystemExit) as stopped:
                cli.main(["doctor", *arguments])
            assert stopped.value.code == code
        out, err = capsys.readouterr()
        assert json.loads(out)["ok"] and "error: dtype: expected one of" in err
        assert "error: --shape: expected numbers such as" in err and "error: --shape: expected numbers below" in err

    def test_doctor_imports_torch_alone(self):
        code = "import sys; from dnl_ext.cli import health; health.self_check(); "
        code += "print([name for name in ('typer', 'rich', 'PIL', 'matplotlib', 'skimage') if name in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout == "[]\n"

    def test_options_of_doctor_are_the_same_without_typer(self, capsys):
        command = typer.main.get_command(app).get_command(None, "doctor")
        with pytest.raises(SystemExit):
            health.main(["--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert set(re.findall(r"--\w+", text)) == {"--help"} | {option for p in command.params for option in p.opts}
        assert all(" ".join(parameter.help.split()) in text for parameter in command.params)

    def test_library_needs_no_command_line_packages(self):
        code = "import sys, dnl_ext; sys.exit(any(name in sys.modules for name in ('typer', 'matplotlib', 'skimage')))"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


class TestTrain:
    def test_writes_checkpoint_and_log(self, trained):
        assert checkpoint.load(trained / "checkpoint.pt")["step"] == 2
        with open(trained / "log.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["step"] for row in rows] == ["1", "2", "2"]
        assert float(rows[0]["loss"]) > 0 and 0 <= float(rows[-1]["miou"]) <= 1

    def test_keeps_an_older_run(self, trained):
        assert_one_line(train("--out", trained), "--resume", "--overwrite")

    def test_resume_of_a_finished_run(self, trained):
        result = run("train", "--resume", "--out", trained)
        assert result.exit_code == 0 and "after 2 steps" in result.output

    def test_resume_is_bit_exact(self, tmp_path):
        six = ("--steps", 6, "--val-every", 2)
        assert train(*six, "--out", tmp_path / "straight").exit_code == 0
        assert train(*six, "--out", tmp_path / "parts", "--stop-after", 3).exit_code == 0
        assert run("train", "--resume", "--out", tmp_path / "parts").exit_code == 0
        assert_same(*(checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("straight", "parts")))

    def test_init(self, trained, tmp_path):
        assert train("--out", tmp_path, "--init", trained / "checkpoint.pt", "--lr", "1e-12").exit_code == 0
        states = [checkpoint.load(out / "checkpoint.pt")["network"] for out in (trained, tmp_path)]
        torch.testing.assert_close(*(state["classifier.weight"] for state in states))

    @pytest.mark.parametrize(
        "options", [("--variant", "nl"), ("--variant", "none"), ("--amp", "bf16"), ("--backend", "reference")]
    )
    def test_options(self, options, tmp_path):
        result = train("--out", tmp_path, *options)
        assert result.exit_code == 0, result.output
        name, value = options
        assert checkpoint.load(tmp_path / "checkpoint.pt")["config"][name[2:]] == value

    @pytest.mark.parametrize("layout", MAKERS)
    def test_layouts(self, layout, tmp_path):
        MAKERS[layout](tmp_path / "data")
        result = train("--data", tmp_path / "data", "--out", tmp_path / "out", "--lr", "1e-4")
        assert result.exit_code == 0, result.output
        assert f"on {layout}" in result.output

    def test_other_files_in_the_folder(self, tmp_path):
        make_plain(tmp_path)
        (tmp_path / "images/notes.txt").write_text("x")
        (tmp_path / "images/.hidden.png").write_text("x")
        assert train("--data", tmp_path, "--out", tmp_path / "out").exit_code == 0

    def test_epochs(self, tmp_path):
        make_plain(tmp_path / "data")  # 4 for training
        result = run("train", *TINY[2:], "--epochs", 1.5, "--data", tmp_path / "data", "--out", tmp_path / "out")
        assert result.exit_code == 0, result.output
        assert checkpoint.load(tmp_path / "out/checkpoint.pt")["step"] == 6


class TestTrainErrors:
    """Every one is a line on stderr and exit code 2."""

    @pytest.mark.parametrize(
        ("options", "part"),
        [
            (("--data", "no/such/folder"), "no/such/folder does not exist"),
            (("--crop", "512"), "--crop must be HEIGHTxWIDTH, such as 512x1024, got 512"),
            (("--crop", "8x8"), "--crop must be"),
            (("--crop", "0x0", "--label-stride", "4"), "--crop must be"),
            (("--lr", "-1"), "--lr must be above 0, got -1"),
            (("--lr", "nan"), "--lr must be above 0, got nan"),
            (("--batch-size", "0"), "--batch-size must be at least 1, got 0"),
            (("--epochs", "2"), "--steps or --epochs"),
            (("--layout", "plain"), "belong to --data"),
            (("--layout", "kitti"), "--layout must be one of cityscapes"),
            (("--variant", "x"), "--variant must be one of dnl, dnl_shared_key, pairwise, unary, nl, none, got x"),
            (("--backend", "x"), "--backend must be one of fused, reference, got x"),
            (("--amp", "fp8"), "--amp must be one of none, bf16, got fp8"),
            (("--device", "tpu"), "--device must be auto, cpu, cuda"),
            (("--device", "cuda:99"), "--device cuda:99"),
            (("--init", "no/such.pt"), "no/such.pt does not exist"),
            (("--resume", "--init", "x.pt"), "leave --init out"),
            (("--resume",), "checkpoint.pt does not exist"),
        ],
    )
    def test_options(self, options, part, tmp_path):
        assert_one_line(train("--out", tmp_path / "out", *options), part)

    def data_error(self, root, *parts):
        assert_one_line(train("--data", root, "--out", root / "out", "--steps", "8"), *parts)

    def test_no_layout(self, tmp_path):
        self.data_error(tmp_path, "no known layout")

    def test_unreadable_image(self, tmp_path):
        make_plain(tmp_path)
        (tmp_path / "images/2.png").write_text("no image")
        self.data_error(tmp_path, "cannot read image", tmp_path / "images/2.png")

    def test_unreadable_label(self, tmp_path):
        make_plain(tmp_path)
        (tmp_path / "labels/2.png").write_text("no image")
        self.data_error(tmp_path, "cannot read label", tmp_path / "labels/2.png")

    def test_missing_label(self, tmp_path):
        make_plain(tmp_path)
        (tmp_path / "labels/2.png").unlink()
        self.data_error(tmp_path, tmp_path / "labels/2.png")

    def test_label_out_of_range(self, tmp_path):
        MAKERS["ade20k"](tmp_path, values=(0, 1, 151))
        self.data_error(tmp_path, "holds 151: expected 0..150, 255")

    def test_sizes_differ(self, tmp_path):
        make_plain(tmp_path)
        write_label(tmp_path / "labels/2.png", (0, 1), (20, 30))
        self.data_error(tmp_path, "is 20x30, but its image")

    def test_out_is_a_file(self, tmp_path):
        (tmp_path / "out").write_text("")
        assert_one_line(train("--out", tmp_path / "out"), "cannot write to")

    @pytest.mark.parametrize(
        ("options", "part"),
        [
            (("--variant", "nl"), "made with --variant dnl, this run asks for nl"),
            (("--width", "8"), "made with --width 4, this run asks for 8"),
            (("--crop", "64x96"), "made with --crop 64x64, this run asks for 64x96"),
        ],
    )
    def test_checkpoint_of_another_run(self, options, part, trained):
        assert_one_line(run("train", "--resume", "--out", trained, *options), part)

    @pytest.mark.parametrize(
        ("options", "part"),
        [(("--variant", "nl"), "is of another network"), (("--width", "8"), "is of another shape")],
    )
    def test_weights_of_another_network(self, options, part, trained, tmp_path):
        init = trained / "checkpoint.pt"
        assert_one_line(train("--out", tmp_path, "--init", init, *options), init, part)

    def test_checkpoint_of_other_classes(self, trained, tmp_path):
        make_plain(tmp_path)
        (tmp_path / "checkpoint.pt").write_bytes((trained / "checkpoint.pt").read_bytes())
        result = run("train", "--resume", "--out", tmp_path, "--data", tmp_path)
        assert_one_line(result, "has 8 classes, the data 3")

    def test_damaged_checkpoint(self, trained, tmp_path):
        content = (trained / "checkpoint.pt").read_bytes()
        (tmp_path / "checkpoint.pt").write_bytes(content[: len(content) // 2])
        assert_one_line(run("train", "--resume", "--out", tmp_path), "cannot read checkpoint")

    def test_something_else_in_place_of_a_checkpoint(self, tmp_path):
        """Unpickling text raises KeyError: 101, of which the number alone would say nothing."""
        (tmp_path / "checkpoint.pt").write_text("hello")
        result = run("train", "--resume", "--out", tmp_path)
        assert_one_line(result, f"cannot read checkpoint {tmp_path / 'checkpoint.pt'}: ", "Error: ")

    @pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
    def test_out_of_memory(self, error, tmp_path, monkeypatch):
        def fail(*_):
            raise error

        monkeypatch.setattr("dnl_ext.segmentation.training.trainer.Trainer.train_step", fail)
        assert_one_line(train("--out", tmp_path), "out of memory", "--crop")

    def test_a_bug_keeps_its_traceback(self, tmp_path, monkeypatch):
        monkeypatch.setattr("dnl_ext.segmentation.training.trainer.Trainer.train_step", lambda *_: [][1])
        assert isinstance(train("--out", tmp_path).exception, IndexError)


class TestInterrupt:
    def test_ctrl_c_saves_and_resumes_bit_exactly(self, tmp_path):
        options = ("--steps", 400, "--crop", "32x32", "--width", 4, "--batch-size", 1, "--val-images", 1,
                   "--val-every", 0, "--save-every", 1000, "--threads", 1)  # fmt: skip
        out = tmp_path / "stopped"
        process = start("train", *options, "--out", out)
        log = out / "log.csv"
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") > 3):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130, errors
        assert "Traceback" not in errors
        assert f"python -m dnl_ext train --resume --out {out}" in errors
        step = checkpoint.load(out / "checkpoint.pt")["step"]
        assert 3 <= step < 400
        # Both go on to a few steps later: one from the interrupted state, one from the beginning.
        assert run("train", "--resume", "--out", out, "--stop-after", step + 3).exit_code == 0
        assert run("train", *options, "--out", tmp_path / "straight", "--stop-after", step + 3).exit_code == 0
        assert_same(*(checkpoint.load(folder / "checkpoint.pt") for folder in (out, tmp_path / "straight")))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Folder and metrics of a demonstration in miniature."""
    out = tmp_path_factory.mktemp("demo")
    result = run("demo", "--small", "--no-memory", "--threads", 1, "--out", out)
    assert result.exit_code == 0, result.output
    return out, json.loads((out / "metrics.json").read_text())


class TestDemo:
    def test_metrics(self, demo):
        _, metrics = demo
        assert set(metrics["variants"]) == {"nl", "dnl"}
        for entry in metrics["variants"].values():
            assert 0 <= entry["miou"] <= 1 and entry["seconds_per_step"] > 0
            assert 0 < entry["attention"]["same_class"] < 1
        for key in ("versions", "device", "threads", "shapes", "training", "data", "phases_seconds"):
            assert metrics[key]

    def test_picture(self, demo):
        with Image.open(demo[0] / "attention.png") as image:
            assert image.width > 1000 and image.height > 600
            assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 1000

    def test_report_shows_the_metrics(self, demo):
        out, metrics = demo
        text = (out / "report.md").read_text()
        assert "![" in text and "(attention.png)" in text and "cannot show" in text
        for entry in metrics["variants"].values():
            assert f"{100 * entry['miou']:.1f} %" in text
        assert f"seed {metrics['seed']}" in text

    def test_report_with_memory(self, demo):
        from dnl_ext.segmentation.experiments.demo_report import report

        metrics = json.loads(json.dumps(demo[1]))
        metrics["encoder_alone"]["full_step"] = {"peak_bytes": 100e6, "seconds": 1.0}
        for entry in metrics["variants"].values():
            entry["full_step"] = {
                "fused": {"peak_bytes": 123e6, "seconds": 2.0}, "reference": {"peak_bytes": 987e6, "seconds": 3.0},
            }  # fmt: skip
        text = report(metrics)
        assert "123 MB" in text and "987 MB" in text and "adds 23 MB" in text and "887 MB in plain" in text
        metrics["variants"]["dnl"]["full_step"]["reference"] = {"error": "ended by signal 9"}
        text = report(metrics)
        assert "did not run (ended by signal 9)" in text and "adds" not in text

    def test_on_a_folder(self, tmp_path):
        make_plain(tmp_path / "data")
        result = run(
            "demo", "--small", "--no-memory", "--threads", 1, "--data", tmp_path / "data", "--out", tmp_path / "out"
        )
        assert result.exit_code == 0, result.output
        metrics = json.loads((tmp_path / "out/metrics.json").read_text())
        assert metrics["data"]["name"] == "plain" and not metrics["data"]["builtin"]
        text = (tmp_path / "out/report.md").read_text()
        assert "mosaic" not in text and "held-out image 0" in text and (tmp_path / "out/attention.png").is_file()
        assert_one_line(run("demo", "--layout", "plain", "--out", tmp_path / "x"), "--layout", "belong to --data DIR")
        assert_one_line(run("demo", "--data", tmp_path / "no", "--out", tmp_path / "x"), "no does not exist")

    def test_out_is_a_file(self, tmp_path):
        (tmp_path / "out").write_text("")
        assert_one_line(run("demo", "--out", tmp_path / "out"), "cannot write to")


@pytest.mark.slow
class TestFullDemo:
    def test_demo(self, tmp_path):
        process = start("demo", "--out", tmp_path)
        output, errors = process.communicate(timeout=900)
        assert process.returncode == 0, output + errors
        metrics = json.loads((tmp_path / "metrics.json").read_text())
        nl, dnl = metrics["variants"]["nl"], metrics["variants"]["dnl"]
        assert min(nl["miou"], dnl["miou"]) > 0.5
        assert dnl["attention"]["same_class"] > nl["attention"]["same_class"] > dnl["attention"]["uniform"]
        for entry in (nl, dnl):
            assert entry["peak_step_bytes"]["fused"] < 0.4 * entry["peak_step_bytes"]["reference"]
