"""tests/processes.py itself: results, the failure that is shown, time limits, nothing left behind."""

import multiprocessing
import os
import signal
import time

import processes
import pytest
import torch
import torch.distributed as dist


def rank_sum(rank, world_size, tensor):
    total = tensor * (rank + 1)
    dist.all_reduce(total)
    return rank, dist.get_world_size(), total, torch.get_num_threads()


def fail_on_one(rank, world_size, failing, how):
    if rank == failing:
        if how == "raise":
            raise ZeroDivisionError("planted")
        if how == "exit":
            os._exit(7)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()  # which never comes


def sleep_on_one(rank, world_size, pids):
    (pids / str(os.getpid())).touch()
    if rank == 1:
        time.sleep(1000)
    dist.barrier()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class TestRun:
    @pytest.mark.parametrize("world_size", [1, 2, 3])
    def test_results_in_the_order_of_ranks(self, world_size):
        results = processes.run(rank_sum, world_size, torch.ones(2))
        total = world_size * (world_size + 1) / 2
        for rank, result in enumerate(results):
            assert result[:2] == (rank, world_size) and result[3] == 1
            assert torch.equal(result[2], torch.full((2,), total))

    @pytest.mark.parametrize("failing", [0, 1])
    @pytest.mark.parametrize(
        ("how", "message"),
        [
            ("raise", r"failed\n(?s:.*)in fail_on_one\n(?s:.*)ZeroDivisionError: planted"),
            ("exit", "died with exit code 7"),
            ("kill", "died with exit code -9"),
        ],
    )
    def test_the_first_failure_is_shown(self, failing, how, message):
        with pytest.raises(processes.RankError, match=f"^rank {failing} of 2 {message}"):
            processes.run(fail_on_one, 2, failing, how)
        assert not multiprocessing.active_children()

    def test_time_limit(self, tmp_path):
        with pytest.raises(processes.RankError, match=r"^rank [01] of 2 ran out of time\n(?s:.*)in sleep_on_one"):
            processes.run(sleep_on_one, 2, tmp_path, timeout=5)
        pids = [int(path.name) for path in tmp_path.iterdir()]
        assert len(pids) == 2 and not any(map(alive, pids))
