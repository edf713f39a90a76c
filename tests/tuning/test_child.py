"""The self-check's own process: what becomes of one that dies, hangs or says something else, and the sizes it tries."""

import json
import sys

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
    return f"print({json.dumps(what)!r}, flush=True); "


CHAIN, PATH = prints(stage="chain"), prints(stage="the command")


def found(monkeypatch, script, seconds=0.5):
    monkeypatch.setattr(child, "COMMAND", (sys.executable, "-c", f"import os, sys, time; {script}"))
    monkeypatch.setattr(child, "START", 2.0)
    return child.first_fault_of_child("hopper", [PROBLEM], seconds)


@pytest.mark.parametrize("backward", [False, True])
def test_a_path_that_is_right(backward):
    """On this CPU, where every path is the same: the task, and the result, come across."""
    call = Call("bfloat16", backward, CALL.sizes, (True, False, True))
    problem = trial.Problem(call, torch.device("cpu"), unary=True, seed=3)
    assert child._problem(child._plain(problem)) == problem
    assert child.first_fault_of_child("chain", [problem]) == ""


def test_a_path_that_ends_its_process(monkeypatch):
    reason = found(monkeypatch, f"{CHAIN}{PATH}sys.stderr.write('CUDA error: an illegal memory access'); os._exit(7)")
    assert reason == "its process was ended with exit code 7: CUDA error: an illegal memory access [the command]"


def test_a_path_that_never_ends(monkeypatch):
    assert "ended by the check, after 3 s [the command]" in found(monkeypatch, f"{CHAIN}{PATH}time.sleep(60)")


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("os._exit(7)", "ended with exit code 7"),
        (f"{CHAIN}{PATH}{CHAIN}os._exit(7)", "ended with exit code 7"),
        ("print('hello', 3)", "ended with exit code 0"),
        (prints(unchecked="out of GPU memory"), "out of GPU memory"),
        (f"{CHAIN}time.sleep(60)", "ended by the check"),
    ],
)
def test_what_is_not_the_paths_fault_is_no_verdict(monkeypatch, script, why):
    with pytest.raises(tuning.Unchecked, match=why):
        found(monkeypatch, script)


def test_no_process(monkeypatch, tmp_path):
    monkeypatch.setattr(child, "COMMAND", (str(tmp_path / "nothing"),))
    with pytest.raises(tuning.Unchecked, match="no process for the self-check"):
        child.first_fault_of_child("hopper", [PROBLEM])


def test_a_chain_that_fails_clears_the_path(monkeypatch):
    monkeypatch.setattr(trial, "fault", lambda problem, path, *rest: f"{path} is off")
    with pytest.raises(tuning.Unchecked, match="chain is off"):
        trial.first_fault("hopper", [PROBLEM])


def test_every_block_works_through_several_tiles():
    """Of the larger problems, in both orders: the first tile of a block tells little of the others."""
    problems = tuner.check_problems(CALL, H100)[2:]
    assert [problem.call.channel_first[0] for problem in problems] == [True, False]
    for problem in problems:
        _, queries, keys, _, _ = problem.call.sizes
        assert keys / TILE >= 6 and keys % TILE and queries % TILE
        assert -(-queries // TILE) * (keys // TILE) >= 6 * H100.multiprocessors  # of the map, in the backward
        for channels in (256, 512, 1024):
            plan = _C.cuda_plan(
                "bfloat16", 1, queries, keys, 256, channels, **dict.fromkeys(LAYOUT, problem.call.channel_first[0]),
                backward=False, capability=80, multiprocessors=H100.multiprocessors, tf32=False, path="fused",
            )  # fmt: skip
            assert plan["splits"] == 1  # the same rule as of Hopper's kernels
