"""The self-check's own process: what becomes of one that dies, hangs or says something else, and the sizes it tries."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from dnl_ext import _C, tuning
from dnl_ext._tuned import Call, Machine
from dnl_ext.tuning import child, trial, tuner

CALL = Call("bfloat16", False, (1, 40, 56, 16, 24))
PROBLEM = trial.Problem(CALL, torch.device("cpu"))
H100 = tuning.Target(torch.device("cuda", 0), Machine("an H100", "1", "2", "3"), 90, 132)
TILE = 128  # queries, and keys, of the largest tiles of any kernel
LAYOUT = ("query_channel_first", "key_channel_first", "value_channel_first")


def prints(**what):
    return f"print({child.MARK + json.dumps(what)!r}, flush=True); "


CHAIN, PATH = prints(stage="chain"), prints(stage="the command")


def found(monkeypatch, script, seconds=0.5):
    monkeypatch.setattr(child, "PROGRAM", f"import os, signal, sys, time; {script}")
    monkeypatch.setattr(child, "START", 2.0)
    monkeypatch.setattr(child, "PATIENCE", 0.5)
    return child.first_fault_of_child("hopper", [PROBLEM], seconds)


@pytest.mark.parametrize("backward", [False, True])
def test_a_path_that_is_right(backward):
    """On this CPU, where every path is the same: the task, and the result, come across."""
    call = Call("bfloat16", backward, CALL.sizes, (True, False, True))
    problem = trial.Problem(call, torch.device("cpu"), unary=True, seed=3)
    assert child._problem(child._plain(problem)) == problem
    assert child.first_fault_of_child("chain", [problem]) == ""


def test_a_path_that_ends_its_process(monkeypatch):
    reason = found(
        monkeypatch,
        f"{CHAIN}{PATH}print('CUDA error: an illegal memory access', file=sys.stderr, flush=True); os._exit(7)",
    )
    assert (
        reason == "the self-check's process ended with exit code 7: CUDA error: an illegal memory access [the command]"
    )
    assert "exit code -6" in found(monkeypatch, f"{CHAIN}{PATH}os.abort()")


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("os._exit(7)", "ended with exit code 7"),
        (f"{CHAIN}{PATH}{CHAIN}os._exit(7)", "ended with exit code 7"),
        ("""print('{"reason": "of a logger"}')""", "ended with exit code 0"),
        (prints(unchecked="out of GPU memory"), "out of GPU memory"),
        (f"{CHAIN}{PATH}time.sleep(60)", "took more than 3 s"),
        *((f"{CHAIN}{PATH}os.kill(os.getpid(), signal.{name})", "exit code -") for name in ("SIGTERM", "SIGKILL")),
    ],
)
def test_what_is_not_the_paths_fault_is_no_verdict(monkeypatch, script, why):
    with pytest.raises(tuning.Unchecked, match=why):
        found(monkeypatch, script)


@pytest.mark.parametrize("name", ["python-that-is-not-there", "application", "", None])
def test_no_process(monkeypatch, tmp_path, name):
    monkeypatch.setattr(sys, "executable", name and str(tmp_path / name))
    with pytest.raises(tuning.Unchecked, match=r"no (process|Python) for the self-check"):
        child.first_fault_of_child("hopper", [PROBLEM])


def test_imports_what_the_parent_has(monkeypatch, tmp_path):
    """Whatever lies in the folder in which the program was started."""
    for name in ("json.py", "torch.py"):
        (tmp_path / name).write_text("raise ImportError('another one')")
    monkeypatch.chdir(tmp_path)
    assert child.first_fault_of_child("chain", [PROBLEM]) == ""


def test_its_own_calls_are_not_checked(monkeypatch):
    monkeypatch.setenv(child.IN_CHILD, "1")
    assert tuning.advise(0, 90, 132, "bfloat16", False, (1, 4096, 4096, 256, 512), dict.fromkeys(LAYOUT, True)) == (
        "chain",
        False,
    )


def test_a_chain_that_fails_clears_the_path(monkeypatch):
    monkeypatch.setattr(trial, "fault", lambda problem, path, *rest: f"{path} is off")
    with pytest.raises(tuning.Unchecked, match="chain is off"):
        trial.first_fault("hopper", [PROBLEM])


def test_every_block_works_through_several_tiles():
    """Of the larger problems, in the order of the call: the first tile of a block tells little of the others."""
    problems = tuner.check_problems(replace(CALL, channel_first=(False, True, True)), H100)[2:]
    for problem in problems:
        assert problem.call.channel_first == (False, True, True)
        _, queries, keys, _, _ = problem.call.sizes
        assert keys / TILE >= 6 and keys % TILE and queries % TILE
        assert -(-queries // TILE) * (keys // TILE) >= 6 * H100.multiprocessors  # of the map, in the backward
        for channels in (256, 512, 1024):
            plan = _C.cuda_plan(
                "bfloat16", 1, queries, keys, 256, channels, **dict.fromkeys(LAYOUT, True),
                backward=False, capability=80, multiprocessors=H100.multiprocessors, tf32=False, path="fused",
            )  # fmt: skip
            assert plan["splits"] == 1  # the same rule as of Hopper's kernels
