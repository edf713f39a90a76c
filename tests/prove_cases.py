"""Long runs of the Python suites' random cases, for prove.py: one kind, a range of seeds, an end in time.

    python tests/prove_cases.py KIND FIRST COUNT SECONDS

Prints one JSON object: cases that ran, and what failed. Kinds:

- ``random``     every operator on the CPU against the bar of accuracy.py, values and gradients;
- ``emulated``   the same by the emulated CUDA route; DNL_EXT_CUDA_PATH=fused takes the fused kernels where they can,
                 with TF32 allowed;
- ``large``, ``emulated-large``    as ``random`` and ``emulated``, with logits of any size that their type holds;
- ``positions``  NaN and infinities come out where the reference has them;
- ``repeats``    a case is a shape: forward and backward 250 times, bit-equal;
- ``cuda``, ``cuda-repeats``    as ``emulated`` and ``repeats``, on a GPU.
"""

import json
import os
import sys
import time

import torch

import dnl_ext

REPEATS = 250
FUSED = (torch.bfloat16, torch.float16, torch.float32)
WIDEST = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 176}  # of query and key, with tiles on every GPU


def repeat(seed, fused=False):
    generator = torch.Generator().manual_seed(seed)
    every = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    dtype = FUSED[seed % 3] if fused else every[seed % 4]
    n, m, d, c = 17 + 11 * (seed % 10), 29 + 13 * (seed % 7), 8 + 3 * (seed % 20), 5 + 7 * (seed % 6)
    sizes = ((2, n, d), (2, m, d), (2, m, c), (2, m))
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in sizes]
    grad = torch.randn((2, n, c), generator=generator, dtype=torch.float64).to(dtype)
    torch.set_num_threads(1 + seed % 2)

    def step():
        output = dnl_ext.disentangled_attention(*inputs)
        return output.detach(), *torch.autograd.grad(output, inputs, grad)

    first = step()
    for number in range(REPEATS):
        names = ("output", "query", "key", "value", "mask_logits")
        for name, x, y in zip(names, step(), first, strict=True):
            assert torch.equal(x, y), f"shape {seed}, repeat {number}: {name} differs"


def fused_case(seed, **draw):
    """A random case that the fused kernels take; None if this seed's is wider."""
    import cases

    dtype = FUSED[seed % 3]
    case = cases.random_case(seed, op="disentangled_attention", dtype=dtype, large=0, **draw)
    return case if case.shapes["query"][-1] <= WIDEST[dtype] and case.shapes["value"][-1] else None


def checks(kind):
    """The route that tensors take (routes.py), and what checks a seed: it returns "left out" for what is no case."""
    import accuracy
    import cases

    fused = os.environ.get("DNL_EXT_CUDA_PATH") == "fused"
    torch.backends.cuda.matmul.allow_tf32 = fused  # for float32, which is fused in TF32 alone
    route, _, what = kind.partition("-")

    def random(seed):
        if route == "random":
            return accuracy.check(cases.random_case(seed))
        draw = {"hot": 1} if what == "large" or route == "large" else {}
        case = fused_case(seed, **draw) if fused else cases.random_case(seed, large=0, **draw)
        return accuracy.check(case) if case else "left out"

    if kind in ("random", "large", "emulated", "emulated-large", "cuda"):
        return "cpu" if route in ("random", "large") else route, random
    if kind == "positions":
        return "cpu", accuracy.check_poisoned
    if kind in ("repeats", "cuda-repeats"):
        return "cpu" if kind == "repeats" else route, lambda seed: repeat(seed, fused=fused and what == "repeats")
    raise SystemExit(f"no kind '{kind}'")


def main(kind, first, count, seconds):
    import routes

    torch.set_num_threads(1)
    end, done, failed = time.time() + seconds, 0, []
    route, check = checks(kind)
    with routes.route(route):
        for seed in range(first, first + count):
            if time.time() > end:
                break
            try:
                done += check(seed) != "left out"
            except Exception as error:
                done += 1
                failed.append(f"seed {seed}: {str(error)[:400]}")
    print(json.dumps({"cases": done, "failed": failed}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
