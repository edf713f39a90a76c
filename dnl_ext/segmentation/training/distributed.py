"""Several processes that train one network, started by ``torchrun``: what a trainer asks of torch.distributed.

Each process takes an equal share of every batch, the gradients are averaged by DistributedDataParallel, and the sums
that a result depends on (pixels that count, the loss, the confusion matrix) are taken over all processes. So the number
of processes changes the order of sums and nothing else. Without a group every function here is that of one process.

What one process alone learns, that a file cannot be read or that it was told to stop, would leave the others waiting
for it. `together` and `largest` are how they agree, and after each of them all processes take the same way.
"""

import atexit
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import InputError

__all__ = ["is_distributed", "is_main", "rank", "start", "world_size"]

Result = TypeVar("Result")


def is_distributed() -> bool:
    """Whether this process trains together with others.

    Example:
        >>> from dnl_ext.segmentation.training import distributed
        >>> distributed.is_distributed()  # not started by torchrun
        False
    """
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process in the group, from 0.

    Example:
        >>> from dnl_ext.segmentation.training import distributed
        >>> distributed.rank()
        0
    """
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes that train together.

    Example:
        >>> from dnl_ext.segmentation.training import distributed
        >>> distributed.world_size()
        1
    """
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and talks to the user.

    Example:
        >>> from dnl_ext.segmentation.training import distributed
        >>> if distributed.is_main():
        ...     print("said once")
        said once
    """
    return rank() == 0


def launched() -> tuple[int, int]:
    """(rank, number of processes) as a launcher has set them in the environment; (0, 1) where there was none.

    Raises:
        InputError: the variables are incomplete or contradict each other.
    """
    given = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    if given["RANK"] is None and given["WORLD_SIZE"] is None:
        return 0, 1
    number, size = 0, 1
    try:
        number, size = int(given["RANK"] or ""), int(given["WORLD_SIZE"] or "")
        sound = 0 <= number < size and (size == 1 or None not in given.values())
    except ValueError:
        sound = False
    if not sound:
        listed = ", ".join(f"{name} {'is not set' if value is None else value}" for name, value in given.items())
        raise InputError(f"start several processes with torchrun --nproc-per-node N -m dnl_ext train; found {listed}")
    return number, size


def start() -> None:
    """Join the other processes, where a launcher such as torchrun has started several; otherwise do nothing.

    Call it before the first :class:`~dnl_ext.segmentation.training.Trainer`. Tensors on the CPU are exchanged by gloo,
    those on a GPU by NCCL.

    Raises:
        InputError: the launcher's environment variables are incomplete, or the other processes cannot be reached.

    Example:
        >>> from dnl_ext.segmentation.training import distributed
        >>> distributed.start()  # torchrun --nproc-per-node 4 my_program.py
        >>> distributed.world_size()
        1
    """
    number, size = launched()
    if size == 1 or is_distributed():
        return
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, rank=number, world_size=size)
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise InputError(f"cannot join {size} processes at {place}: {' '.join(str(error).split())[:200]}") from None
    atexit.register(dist.destroy_process_group)


def local_rank() -> int:
    """Number of this process on this machine, from 0: of the GPU it takes."""
    return int(os.environ.get("LOCAL_RANK", rank()))


def share(size: int) -> range:
    """What this process takes of ``size`` items that are cut into equal runs: a range."""
    each = size // world_size()
    return range(rank() * each, (rank() + 1) * each)


def total(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all processes, in place."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def largest(number: int) -> int:
    """Largest of an integer over all processes."""
    if not is_distributed():
        return number
    value = torch.tensor(number, dtype=torch.int64)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def together(function: Callable[..., Result], *arguments: Any) -> Result:
    """``function(*arguments)``; an InputError in one process is raised in all. Every process must come here."""
    result: Any = None
    message = None
    try:
        result = function(*arguments)
    except InputError as error:
        if not is_distributed():
            raise
        message = str(error)
    if largest(int(message is not None)):
        messages = [None] * world_size()
        dist.all_gather_object(messages, message)
        raise InputError(next(text for text in messages if text is not None))
    return result


def wait() -> None:
    """Return when every process has come here."""
    largest(0)


def is_lost(error: BaseException) -> bool:
    """Whether an exception says that another process has ended."""
    return is_distributed() and (isinstance(error, dist.DistError) or "gloo/transport" in str(error))


def parallel(network: nn.Module, device: torch.device) -> nn.Module:
    """The network as DistributedDataParallel, which averages gradients over the processes; itself where it is alone."""
    if not is_distributed():
        return network
    return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
