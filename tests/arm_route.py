"""Random cases of pairwise attention by kernels that run in another process, in particular in an emulator of Arm.

    python tests/arm_route.py FIRST COUNT DTYPE COMMAND ...

DTYPE is one of torch's or "any". COMMAND starts tests/cpp/pairwise_server.cpp, which computes forward and backward; all
else of an operator (checks, layouts, the unary term, autograd) is the installed dnl_ext's. A case is a seed of
cases.py, and is held to the bar of accuracy.py. Prints how many passed and failed, and exits 1 if any failed.
"""

import contextlib
import itertools
import math
import struct
import subprocess
import sys
import warnings

import accuracy
import cases
import torch

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # DType of core/types.h
HEADER = "<9qd"
LARGEST_PRODUCT = 2_000_000  # multiply-adds; QEMU does about ten million a second of BFMMLA


def offsets(x, trailing):
    """Where the matrices begin that the last `trailing` dimensions of `x` are, in elements of its storage."""
    lead = list(zip(x.shape, x.stride(), strict=True))[: x.dim() - trailing]
    starts = (sum(places) for places in itertools.product(*(range(0, n * s, s) if s else [0] * n for n, s in lead)))
    return [x.storage_offset() + start for start in starts]


def memory(x):
    """All that the storage of `x` holds, as bytes."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).numpy().tobytes()


def slot(x, trailing):
    """`x` as the server takes it; None is absent."""
    if x is None or not x.numel():
        return struct.pack("<3q", 0, 0, 0)
    held, starts = memory(x), offsets(x, trailing)
    position, channel = (*x.stride()[x.dim() - trailing :], 0, 0)[:2]
    return struct.pack(f"<3q{len(starts)}q", len(held), position, channel, *starts) + held


class Server:
    """Forward and backward of PairwiseArgs (ops/pairwise/pairwise.h) in another process."""

    def __init__(self, command, threads=2):
        self.threads, self.calls = threads, 0
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def close(self):
        self.process.stdin.close()
        return self.process.wait(60)

    def call(self, backward, query, key, value, scale, whiten, slots, results):
        """Computes `results`, whose storages are replaced. slots: (tensor or None, trailing dimensions) of each."""
        batches, queries = query.shape[:-2].numel(), query.shape[-2]
        sizes = (batches, queries, key.shape[-2], query.shape[-1], value.shape[-1])
        scale = 0.0 if whiten and queries == 1 else scale  # as PairwiseCall has it
        parts = [struct.pack(HEADER, backward, TYPES.index(query.dtype), *sizes, bool(whiten), self.threads, scale)]
        parts += [slot(x, trailing) for x, trailing in slots]
        self.process.stdin.write(b"".join(parts))
        self.process.stdin.flush()
        for x in results:
            if x.numel():
                size = x.untyped_storage().nbytes()
                answer = self.process.stdout.read(size)
                if len(answer) != size:
                    raise RuntimeError(f"the server ended after {self.calls} calls: exit {self.process.wait(60)}")
                x.untyped_storage().copy_(torch.frombuffer(bytearray(answer), dtype=torch.uint8).untyped_storage())
        self.calls += 1


def poisoned(results):
    """Tensors like those, with NaN wherever a kernel must write."""
    return [torch.full_like(x, float("nan")) if x.numel() else x for x in results]


@contextlib.contextmanager
def route(command, threads=2):
    """While entered, the pairwise operators of CPU tensors compute in the process that `command` starts: its Server."""
    names = ("dnl_ext::pairwise_forward", "dnl_ext::pairwise_backward")
    own = {name: torch.library.get_kernel(name, "CPU") for name in names}
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    server = Server(command, threads)

    def empty(*tensors):
        return any(x.numel() == 0 for x in tensors)

    def forward(query, key, value, mask, scale, whiten, save_residual):
        *results, pooled, lse = own[names[0]].call_boxed(cpu, query, key, value, mask, scale, whiten, save_residual)
        if not empty(query, key, value):
            results = poisoned(results)
            unary = [(None, 1)] * 3 if mask is None else [(pooled, 1), (None, 1), (lse, 0)]
            slots = [(x, 2) for x in (query, key, value, *results)] + unary + [(None, 2)] * 5
            server.call(0, query, key, value, scale, whiten, slots, results)
        return *results, pooled, lse

    def backward(grad, query, key, value, mask, output, stats, residual, pooled, lse, scale, whiten, *needs):
        saved = (output, stats, residual, pooled, lse)
        results = own[names[1]].call_boxed(cpu, grad, query, key, value, mask, *saved, scale, whiten, *needs)
        if not empty(query, key, value):
            results = poisoned(results)
            unary = [(None, 1)] * 3 if mask is None else [(pooled.contiguous(), 1), (mask, 1), (lse.contiguous(), 0)]
            slots = [(x, 2) for x in (query, key, value, output, stats.contiguous(), residual)] + unary
            slots += [(x, 2) for x in (grad, *results[:3])] + [(results[3], 1)]
            server.call(1, query, key, value, scale, whiten, slots, results)
        return tuple(results)

    with torch.library._scoped_library("dnl_ext", "IMPL") as override:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for name, function in zip(names, (forward, backward), strict=True):
                override.impl(name.removeprefix("dnl_ext::"), function, "CPU", allow_override=True)
        try:
            yield server
        finally:
            status = server.close()
    if status:
        raise RuntimeError(f"the server ended with exit status {status}")


def small_cases(first, dtype):
    """Cases from seed `first` on, without those whose products an emulator would take minutes for."""
    for seed in itertools.count(first):
        case = cases.random_case(seed, op=cases.ATTENTION[seed % 2], dtype=dtype, large=0)
        query, key, value = (case.shapes[name] for name in ("query", "key", "value"))
        if math.prod(query[:-1]) * key[-2] * max(query[-1], value[-1]) <= LARGEST_PRODUCT:
            yield case


def main(first, count, dtype, command):
    torch.set_num_threads(1)
    failed = 0
    drawn = small_cases(first, None if dtype == "any" else getattr(torch, dtype))
    with route(command) as server:
        for case in itertools.islice(drawn, count):
            try:
                accuracy.check(case)
            except AssertionError as error:
                failed += 1
                print(error)
    if server.calls < 2 * count:
        raise RuntimeError(f"{server.calls} calls reached the server: fewer than a forward and a backward for a case")
    print(f"{count - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:]))
