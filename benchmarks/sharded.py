"""Time, messages and memory of attention over sharded positions, forward and backward, on every rank of a group.

    torchrun --nproc-per-node 4 benchmarks/sharded.py --positions 16384 --widths 256,512 --dtype float32

On CPUs the group is gloo's, on GPUs NCCL's, one GPU a rank. Rank 0 prints a line for each exchange, with --alone one
for the operator on all positions in one process too: seconds of the slowest rank, the best of the repetitions; for the
ring what rank 0 sent in one call, as counted where it is sent.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dnl_ext
from dnl_ext import distributed
from dnl_ext.distributed import _exchange


class Sent:
    """Counts the messages of a ring, and the bytes in them, while entered."""

    def __enter__(self):
        self.messages = self.bytes = 0
        self.pass_on = _exchange._pass_on

        def counted(shards, tag, outgoing, incoming):
            self.messages += outgoing.numel() > 0
            self.bytes += outgoing.numel() * outgoing.element_size()
            return self.pass_on(shards, tag, outgoing, incoming)

        _exchange._pass_on = counted
        return self

    def __exit__(self, *_):
        _exchange._pass_on = self.pass_on


def inputs(count, width, channels, dtype, device):
    """query, key, value, mask logits as leaves, and a gradient; channel-first, as convolutions give them."""

    def draw(d):
        return torch.randn(1, d, count, device=device).to(dtype).transpose(1, 2)

    leaves = [draw(width), draw(width), draw(channels), torch.randn(1, count, device=device).to(dtype)]
    return [x.requires_grad_() for x in leaves], draw(channels)


def seconds(step, device, repeat):
    """Best time of the slowest rank."""
    times = []
    for _ in range(repeat + 1):  # the first connects and warms up
        dist.barrier()
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    best = torch.tensor(min(times[1:]), device=device)
    dist.all_reduce(best, dist.ReduceOp.MAX)
    return float(best)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=16_384, help="of all ranks together")
    parser.add_argument("--widths", default="256,512", help="channels of query and key, and of the value")
    parser.add_argument("--dtype", choices=("float64", "float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="all positions in rank 0's process first, the others idle")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    width, channels = (int(x) for x in args.widths.split(","))
    dtype = getattr(torch, args.dtype)

    def report(name, spent, sent=None):
        if rank == 0:
            more = f", {sent.messages} messages, {sent.bytes / 2**20:.1f} MiB sent by rank 0" if sent else ""
            print(f"{name}: {spent:.3f} s{more}", flush=True)

    if args.alone:
        leaves, grad = inputs(args.positions if rank == 0 else 1, width, channels, dtype, device)
        report(
            "one process", seconds(lambda: dnl_ext.disentangled_attention(*leaves).backward(grad), device, args.repeat)
        )
    count = args.positions * (rank + 1) // world - args.positions * rank // world
    leaves, grad = inputs(count, width, channels, dtype, device)
    for exchange in ("ring", "gather"):

        def step(exchange=exchange):
            distributed.disentangled_attention(*leaves, exchange=exchange).backward(grad)

        spent = seconds(step, device, args.repeat)
        with Sent() as sent:
            step()
        report(f"{exchange} over {world}", spent, sent if exchange == "ring" else None)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
