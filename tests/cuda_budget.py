"""What the compiler makes of every CUDA kernel, against a committed budget (cuda_budget.json). Needs nvcc, no GPU.

    python tests/cuda_budget.py [--write] [--archs 8.0,9.0] [--nvcc nvcc] [--cubins FOLDER]

Compiles tests/cuda_kernels.cu, which names every kernel: all of them for 8.0 and 9.0, the fused ones for 8.9, 10.0 and
12.0 too, Hopper's for 9.0a alone. Per kernel and architecture: registers of a thread, bytes of stack and of spills,
static shared memory of a block, occupancy, and how many tensor-core instructions (HMMA, HGMMA) its machine code has,
where cuobjdump is found (cuda_model/sass.py); without it no budget is written. Exits 1 where a build is worse than the
budget:

- spills or stack beyond it;
- registers above it by more than REGISTER_SLACK, or occupancy below it;
- static shared memory above it;
- fewer HMMA;
- wgmma that the assembler does not leave asynchronous, registers that it does not hand over;
- a kernel that has no budget, or a budget whose kernel is gone (`make cuda-budget` rewrites it).

Occupancy is the share of a multiprocessor's warps that registers, threads and static shared memory allow: blocks =
min(most blocks, most threads / threads, registers / (threads * registers of a thread rounded up to 8), shared memory /
(static + 1 KiB that the system keeps)), as in the CUDA occupancy calculator. Dynamic shared memory is left out, since
it depends on the call: kernels that ask for it have fewer blocks.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import ptxas_table
from cuda_model import sass

ROOT = pathlib.Path(__file__).parents[1]
BUDGET = ROOT / "tests/cuda_budget.json"
EVERY_KERNEL, FUSED_ONLY, HOPPER_ONLY = ("8.0", "9.0"), ("8.9", "10.0", "12.0"), ("9.0a",)
#: Architectures of which some kernels are compiled: the macro that says so, and how their names begin.
PART = dict.fromkeys(FUSED_ONLY, ("DNL_FUSED", "fused_")) | dict.fromkeys(HOPPER_ONLY, ("DNL_HOPPER", "hopper_"))
REGISTER_SLACK = 8  # what another release of the compiler may cost

THREADS = 256  # of a block (core/cuda/device.cuh)
HOPPER_THREADS = 384  # ops/pairwise/hopper/ring.cuh
# CUDA C++ programming guide, technical specifications: most threads, blocks and KiB of shared memory of a
# multiprocessor. It has 65,536 registers everywhere, given out in units of 8 per thread.
LIMITS = {
    "8.0": (2048, 32, 164),
    "8.9": (1536, 24, 100),
    "9.0": (2048, 32, 228),
    "9.0a": (2048, 32, 228),
    "10.0": (2048, 32, 228),
    "12.0": (1536, 24, 100),
}


def occupancy(arch, registers, shared, threads=THREADS):
    most_threads, most_blocks, shared_kib = LIMITS[arch]
    blocks = min(
        most_blocks,
        most_threads // threads,
        65536 // (threads * -(-registers // 8) * 8),
        shared_kib * 1024 // (shared + 1024),
    )
    return blocks * threads / most_threads


def short(names):
    """Readable names: without namespace, return type and arguments."""
    # Template arguments have casts, (bool)1 or (dnl::Moment)0; after those, the first parenthesis opens the arguments.
    plain = [re.sub(r"\((?:dnl::)?\w+\)(?=[\w-])", "", name) for name in ptxas_table.demangle(names)]
    return [re.sub(r"^void |dnl::|\(.*", "", name) for name in plain]


def tensor_instructions(text):
    """HMMA and local loads and stores of each function of a `cuobjdump -sass` listing, by mangled name."""
    counts, name = {}, None
    for line in text.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            name = match[1]
            counts[name] = 0
        elif name and re.search(r"\b[HQ]?(HMMA|HGMMA|QMMA)\b", line):
            counts[name] += 1
    return counts


def lost(log):
    """What ptxas says it had to give up, by line: products made synchronous ("serialized"), setmaxnreg left out."""
    return [line for line in log.splitlines() if "Potential Performance Loss" in line]


def compile_arch(arch, nvcc, folder):
    """{kernel: figures} of one architecture."""
    cubin = pathlib.Path(folder) / f"{arch}.cubin"
    flags = [
        "-std=c++17",
        "-O3",
        "--expt-relaxed-constexpr",
        "-Xptxas=-v",
        "-cubin",
        f"-arch=sm_{arch.replace('.', '')}",
    ]
    macro, prefix = PART.get(arch, (None, ""))
    command = [nvcc, *flags, *([f"-D{macro}"] if macro else []), f"-I{ROOT}/csrc", f"{ROOT}/tests/cuda_kernels.cu"]
    done = subprocess.run([*command, "-o", cubin], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"cuda_budget: {arch} does not compile:\n{done.stderr[-4000:]}")
    log = done.stdout + done.stderr
    if found := lost(log):
        raise SystemExit(f"cuda_budget: {arch}: {found[0]}")
    rows = ptxas_table.parse(log.splitlines())
    threads = HOPPER_THREADS if arch in HOPPER_ONLY else THREADS
    counts = tensor_instructions(sass.listing(cubin, "-sass")) if sass.cuobjdump() else {}
    figures = {}
    for name, row in zip(short([row.kernel for row in rows]), rows, strict=True):
        if not name.startswith(prefix):
            continue
        if name in figures:
            raise SystemExit(f"cuda_budget: two kernels of {arch} are called {name}")
        figures[name] = {
            "registers": row.registers,
            "stack": row.stack,
            "spill": row.spill,
            "shared": row.shared,
            "occupancy": round(occupancy(arch, row.registers, row.shared, threads), 4),
            "hmma": counts.get(row.kernel),
        }
    return figures


def worse(budget, built):
    """What is worse than the budget: messages. Both are {arch: {kernel: figures}}."""
    found = []
    for arch, kernels in built.items():
        wanted = budget.get(arch, {})
        for name in sorted(set(kernels) | set(wanted)):
            where = f"{name} for {arch}"
            if name not in wanted or name not in kernels:
                found.append(f"{where}: {'has no budget' if name in kernels else 'is gone'}")
                continue
            old, new = wanted[name], kernels[name]
            found += [
                f"{where}: {k} {new[k]}, budget {old[k]}" for k in ("spill", "stack", "shared") if new[k] > old[k]
            ]
            if new["registers"] > old["registers"] + REGISTER_SLACK:
                found.append(f"{where}: registers {new['registers']}, budget {old['registers']} + {REGISTER_SLACK}")
            if new["occupancy"] < old["occupancy"]:
                found.append(f"{where}: occupancy {new['occupancy']:.0%}, budget {old['occupancy']:.0%}")
            if None not in (new["hmma"], old["hmma"]) and new["hmma"] < old["hmma"]:
                found.append(f"{where}: {new['hmma']} HMMA, budget {old['hmma']}")
    return found


def table(built):
    lines = [f"{'kernel':76} {'arch':>5} {'regs':>5} {'stack':>5} {'spill':>5} {'shared':>6} {'occ.':>5} {'HMMA':>5}"]
    for arch, kernels in built.items():
        for name, x in sorted(kernels.items()):
            hmma = "-" if x["hmma"] is None else x["hmma"]
            lines.append(
                f"{name[:76]:76} {arch:>5} {x['registers']:5} {x['stack']:5} {x['spill']:5} {x['shared']:6}"
                f" {x['occupancy']:5.0%} {hmma:>5}"
            )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="rewrite the budget from this build")
    parser.add_argument("--archs", default=",".join((*EVERY_KERNEL, *PART)))
    parser.add_argument("--cubins", help="folder to keep the compiled kernels in, as ARCH.cubin")
    parser.add_argument("--nvcc", default=shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    options = parser.parse_args()
    if not shutil.which(options.nvcc):
        print("cuda_budget: no nvcc here (--nvcc)", file=sys.stderr)
        return 3
    if options.write and sass.cuobjdump() is None:
        print(f"cuda_budget: no cuobjdump here, and a budget counts HMMA: {sass.HOW_TO_GET}", file=sys.stderr)
        return 3
    built = {}
    archs = options.archs.split(",")
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = pathlib.Path(options.cubins or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        compiled = pool.map(partial(compile_arch, nvcc=options.nvcc, folder=folder), archs)
        for arch, kernels in zip(archs, compiled, strict=True):
            built[arch] = kernels
            if not kernels:
                raise SystemExit(f"cuda_budget: no kernel found for {arch}")
            if options.write:  # after each: an end in between keeps what there is
                old = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
                BUDGET.write_text(json.dumps({**old, **built}, indent=1, sort_keys=True) + "\n")
    print(table(built))
    if sass.cuobjdump() is None:
        print("no cuobjdump here: HMMA were not counted")
    if options.write:
        print(f"wrote {BUDGET}")
        return 0
    problems = worse(json.loads(BUDGET.read_text()), built)
    print("\n".join(problems))
    kernels = sum(map(len, built.values()))
    spilling = sum(x["spill"] > 0 for figures in built.values() for x in figures.values())
    print(f"{kernels} kernels, {spilling} with spills, {len(problems)} worse than the budget")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
