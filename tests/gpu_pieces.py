"""What gpu_check.py measures of single pieces: library products, the host's share, large means, the first call.

    python tests/gpu_pieces.py PIECE [--device cuda] [--small]

Prints a JSON object a line, as soon as it is known: {"what", "value", "unit", "ok"}; ok is None where nothing is right
or wrong. --small: sizes for a CPU, on which the tests run every piece.
"""

import argparse
import json
import time
from dataclasses import replace

import torch

import dnl_ext
from dnl_ext.benchmark.case import Case, make_inputs
from dnl_ext.benchmark.check import Truth
from dnl_ext.benchmark.memory import call
from dnl_ext.benchmark.timing import Entry, clock_for, interleave

WIDTH, CHANNELS, ROWS = 256, 512, 4096
#: Error of sums in float of products of 16-bit values, which are exact: of their order alone.
SUMS = 1e-5
#: Mean of query and key, in deviations: tensor cores truncate as they add, which a mean lays bare.
MEAN = 30.0
QUEUED = 20  # calls that the host asks for before it waits


def line(what, value=None, unit="", ok=None):
    print(json.dumps({"what": what, "value": value, "unit": unit, "ok": ok}), flush=True)


def layouts(rows, columns, batch, device, dtype):
    """A matrix by rows and, transposed, by columns: the two orders in which a library takes an operand."""
    x = torch.randn(batch, rows, columns).to(device, dtype)
    return {"rows": x, "columns": x.mT.contiguous().mT}


def wide_product(a, b):
    """Float results of 16-bit operands."""
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())  # a CPU has no such product


def products(device, small):
    """bmm.dtype_out, 16 bits in and float out, in every order of operands, also where N is odd."""
    for n in (40, 41) if small else (9408, 9409):
        for batch in (1, 3):
            for dtype in (torch.bfloat16, torch.float16):
                left = layouts(24 if small else 512, WIDTH, batch, device, dtype)
                right = layouts(WIDTH, n, batch, device, dtype)
                for (first, a), (second, b) in ((x, y) for x in left.items() for y in right.items()):
                    what = f"{str(dtype).removeprefix('torch.')} {first} x {second}, N = {n}, batch {batch}"
                    exact = a.double() @ b.double()
                    error = ((wide_product(a, b) - exact).norm() / exact.norm()).item()
                    line(what, error, "relative error", error <= SUMS)


def library(device, small):
    """The chain's products alone: logits in float and in bfloat16, P V in chunks of two sizes."""
    n = 64 if small else 16384
    rows = (16, n) if small else (ROWS, n)
    q, k, v = (torch.randn(1, n, c).to(device, torch.bfloat16) for c in (WIDTH, WIDTH, CHANNELS))
    p = torch.rand(1, n, n, device=device).to(torch.bfloat16)

    entries = [
        Entry(f"logits of {rows[0]} rows, float out", lambda: wide_product(q[:, : rows[0]], k.mT)),
        Entry(f"logits of {rows[0]} rows, bfloat16 out", lambda: torch.bmm(q[:, : rows[0]], k.mT)),
        *(Entry(f"P V of {r} rows, float out", lambda r=r: wide_product(p[:, :r], v)) for r in rows),
    ]
    for entry in entries:
        entry.call()
    for entry in interleave(entries, clock_for(device), 0.0 if small else 2.0):
        line(f"{entry.name}, N = {n}", 1e3 * entry.best, "ms")


def step_of(n, direction, device):
    case = Case(WIDTH, CHANNELS, n, n, "bf16", direction, device)
    inputs = make_inputs(case)

    def attention(query, key, value, mask):
        return dnl_ext.disentangled_attention(query, key, value, mask, scale=case.scale)

    grad = torch.randn(1, 1, n, CHANNELS).to(device, torch.bfloat16) if case.training else None
    return lambda: call(case, attention, inputs, grad)


def host(device, small):
    """Time in which the host asks for a call, however long the GPU takes for it."""
    for n in (32, 64) if small else (1024, 4096):
        for direction in ("forward", "training"):
            step = step_of(n, direction, device)
            for _ in range(3):
                step()
            synchronize(device)
            start = time.perf_counter()
            for _ in range(QUEUED):
                step()
            took = time.perf_counter() - start
            synchronize(device)
            line(f"host, {direction}, N = {n}", 1e6 * took / QUEUED, "us a call")


def means(device, small):
    """Errors on inputs whose mean is MEAN deviations, as multiples of plain PyTorch's."""
    n = 96 if small else 16384
    case = Case(WIDTH, CHANNELS, n, n, "bf16", "forward", device)
    inputs = make_inputs(case)
    signs = torch.randn(WIDTH, device=device).sign() * MEAN
    moved = replace(
        inputs, query=(inputs.query + signs).to(torch.bfloat16), key=(inputs.key + signs).to(torch.bfloat16)
    )
    truth = Truth(case, moved)
    output = dnl_ext.disentangled_attention(*moved, scale=case.scale)
    errors, ratios, wrong = truth.verdict({"output": output}, own=True)
    line(f"output at a mean of {MEAN:.0f}, N = {n}", ratios["output"], "of plain PyTorch's error", wrong is None)
    line(f"output at a mean of {MEAN:.0f}, N = {n}", errors["output"], "relative error")


def first(device, small):
    """The first call of a process, beyond what torch itself needs for its first product."""
    x = torch.randn(64, 64, device=device, dtype=torch.bfloat16)
    (x @ x).sum().item()
    step = step_of(64 if small else 4096, "training", device)
    for number in ("first", "second"):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        line(f"{number} call", 1e3 * (time.perf_counter() - start), "ms")


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


PIECES = {"products": products, "library": library, "host": host, "means": means, "first": first}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("piece", choices=PIECES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    PIECES[options.piece](options.device, options.small)


if __name__ == "__main__":
    main()
