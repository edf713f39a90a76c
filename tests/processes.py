"""Functions run in several processes of one torch.distributed group, for tests.

``run`` starts one process per rank, joins them to a group and calls a top-level function in each. Processes come from a
fork server that has torch imported, so that a group takes well under a second to start, and never from a fork of the
test's own process, whose OpenMP threads a fork would lose. Ranks meet through a file in a temporary folder: no port to
choose. Every process has one thread and ends by itself at the time limit, whatever became of its parent.
"""

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

#: What the fork server imports. The last two, of a second each, come with a first optimizer and a first sharding.
PRELOAD = ["torch", "torch.distributed", "dnl_ext", "torch._dynamo", "torch.distributed.fsdp"]
#: Seconds beyond the time limit for a process to start, and to end.
GRACE = 30
#: Seconds after the first failure in which an earlier one may still be reported.
SETTLE = 0.3


class RankError(Exception):
    """A rank raised, died or ran out of time. The message has its number, and its traceback where there is one."""


def run(function, world_size, *args, timeout=300, backend="gloo"):
    """Call ``function(rank, world_size, *args)`` in every process of a group.

    Args:
        function: defined at the top level of a module. It finds the default group of torch.distributed initialised.
        world_size: number of processes.
        args: pickled, as are the results; tensors are copied.
        timeout: seconds that the function may take in a process, and that joining the group may take before it.
        backend: ``"gloo"``, or ``"nccl"``, where the current CUDA device is the rank's number.

    Returns:
        What the ranks returned, a list in their order.

    Raises:
        RankError: the failure that was first in time. The other processes have been ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    processes, pipes = [], {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world_size):
                # Pickled here: Process and Pipe would share the memory of tensors, which dies with its owner.
                call = pickle.dumps((function, args))
                receiver, sender = context.Pipe(duplex=False)
                pipes[receiver] = rank
                process = context.Process(
                    target=_process, args=(sender, call, rank, world_size, folder, timeout, backend), daemon=True
                )
                process.start()
                processes.append(process)
                sender.close()
            return _gather(processes, pipes, time.monotonic() + 2 * timeout + GRACE, folder)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
                process.close()
            for pipe in pipes:
                pipe.close()


def _gather(processes, pipes, deadline, folder):
    """The results in the order of ranks; raises the first failure. ``pipes``: receiving ends, each with its rank."""
    results, failures, waiting = {}, [], dict(pipes)
    while waiting:
        ready = multiprocessing.connection.wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                moment, failure, results[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                moment, failure = 0.0, _death(processes[rank], _stack(folder, rank))
            if failure:
                failures.append((moment, f"rank {rank} of {len(processes)} {failure}"))
                # A rank that fails takes the connections of the others along: their reports may arrive before its own.
                deadline = min(deadline, time.monotonic() + SETTLE)
    if failures:
        raise RankError(min(failures)[1])
    if waiting:
        raise RankError(f"ranks {sorted(waiting.values())} of {len(processes)} did not end in time")
    return [results[rank] for rank in range(len(processes))]


def _death(process, stack):
    """Why a process ended without a report; ``stack`` is where its watchdog writes."""
    process.join(GRACE)
    where = stack.read_text() if stack.is_file() else ""
    return f"ran out of time\n{where}" if where else f"died with exit code {process.exitcode}"


def _stack(folder, rank):
    return Path(folder) / f"stack{rank}"


def _process(sender, call, rank, world_size, folder, timeout, backend):
    """Body of a rank: sends (time, traceback or None, result), pickled."""
    with open(_stack(folder, rank), "w") as stack:
        faulthandler.dump_traceback_later(timeout, exit=True, file=stack)
        try:
            torch.set_num_threads(1)
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            if backend == "nccl":
                torch.cuda.set_device(rank)
            store = dist.FileStore(str(Path(folder) / "store"), world_size)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
            function, args = pickle.loads(call)
            faulthandler.dump_traceback_later(timeout, exit=True, file=stack)
            report = (time.monotonic(), None, function(rank, world_size, *args))
            # Without it, the first rank to end could end a collective that another is still in.
            dist.barrier()
        except BaseException:  # SystemExit and pytest's outcomes too: whatever it is, the parent must hear of it
            report = (time.monotonic(), f"failed\n{traceback.format_exc()}", None)
        sender.send_bytes(pickle.dumps(report))
        faulthandler.cancel_dump_traceback_later()
        if report[1] is None:
            dist.destroy_process_group()
