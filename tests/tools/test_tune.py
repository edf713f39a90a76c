"""`dnl-ext tune`: what it is asked, what it says and how it ends, on the emulated device."""

import pytest
import torch
from test_cli import assert_one_line, run

from dnl_ext import _C, _tuned, tuning
from dnl_ext._tuned import Machine
from dnl_ext.tuning import Target, trial, tuner

SMALL = ("--shape", "48,16,24", "--dtype", "bf16")


@pytest.fixture(autouse=True)
def own_file(monkeypatch, tmp_path, allow_tf32):
    monkeypatch.setenv("DNL_EXT_TUNE_FILE", str(tmp_path / "paths.json"))
    monkeypatch.delenv("DNL_EXT_CUDA_PATH", raising=False)
    allow_tf32(False)  # put back, whatever the command sets
    _tuned.forget()
    yield
    _tuned.forget()
    _C.forget_paths()


@pytest.fixture
def gpu(monkeypatch, emulated):
    """A GPU that is the emulated device, and made-up times."""
    target = Target(torch.device("cpu"), Machine("emulated", "1", "2", "3"), 80, 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    built = _C.build_info() | {"cuda": True}
    monkeypatch.setattr(_C, "build_info", lambda: built)
    monkeypatch.setattr(tuning.Target, "of", lambda device: target)
    times = {"chain": 2e-3, "fused": 1e-3}
    monkeypatch.setattr(tuner, "clock_for", lambda device: lambda call: (call(), times[call.args[0]])[1])


class TestTune:
    def test_says_what_was_found_and_keeps_it(self, gpu, tmp_path):
        result = run("tune", *SMALL)
        assert result.exit_code == 0, result.output
        forward, backward, kept = result.stdout.splitlines()
        assert "bfloat16 forward, batch 1, N = 48, (16, 24)" in forward
        assert forward.endswith("fused 1.000 ms, chain 2.000 ms -> fused") and "backward" in backward
        assert kept == f"kept in {tmp_path / 'paths.json'}"
        assert [record.path for record in _tuned.known().measured] == ["fused", "fused"]

    def test_a_wrong_path_is_said_with_its_reproducer_which_repeats_it(self, gpu, monkeypatch):
        right = trial.Trial.run
        wrong = lambda self, path: tuple(x * (1.05 if path == "fused" else 1) for x in right(self, path))  # noqa: E731
        monkeypatch.setattr(trial.Trial, "run", wrong)
        result = run(
            "tune", *SMALL, "--direction", "forward", "--layout", "rows,channel_first,rows", "--seed", "7", "--unary"
        )
        assert result.exit_code == 1 and "-> chain" in result.stdout
        said = result.stderr.split("[dnl-ext ")[1].split("]")[0].split()
        again = run(*said)
        assert again.exit_code == 1 and again.stderr == result.stderr and "--check-only" in said
        monkeypatch.setattr(trial.Trial, "run", right)
        assert run(*said).exit_code == 0

    def test_check_only_keeps_nothing(self, gpu, tmp_path):
        result = run("tune", *SMALL, "--check-only")
        assert result.exit_code == 0 and "right" in result.stdout and not (tmp_path / "paths.json").exists()

    def test_a_file_that_cannot_be_written(self, gpu, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setenv("DNL_EXT_TUNE_FILE", str(tmp_path / "file/paths.json"))
        result = run("tune", *SMALL)
        assert result.exit_code == 0 and "could not be written" in result.stderr

    def test_usual_calls(self):
        calls = tuning.usual_calls(("bfloat16",))
        assert len(calls) == 18 and {call.sizes[3:] for call in calls} == {(256, 256), (256, 512), (256, 1024)}
        assert {call.sizes[2] for call in calls} == {4096, 9409, 16384}


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--shape", "1,2"), ("shape",)),
        (("--shape", "a,b,c"), ()),
        (("--dtype", "int8"), ("dtype", "int8")),
        (("--direction", "up"), ("--direction", "'up'")),
        (("--layout", "rows,rows"), ("--layout",)),
        (("--path", "warp"), ("--path", "chain", "'warp'")),
        (("--device", "cpu"), ("--device", "'cpu'")),
    ],
)
def test_bad_arguments(arguments, parts):
    assert_one_line(run("tune", *arguments), *parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu():
    assert_one_line(run("tune"), "no GPU that torch can use")
