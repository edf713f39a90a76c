"""The CPU kernels for Arm, cross-compiled and run in an emulator of the processor: `make arm-test`.

    python tests/arm.py [--compiler clang|gcc ...] [--cases 50] [--jobs 2]

- code: the share of multiply-adds in the inner loops (arm_budget.py);
- sets: which instruction set is chosen on a CPU with BF16 and on one without, and that it can be forced;
- conversions, products: exact, of NEON and of BF16;
- kernels: every operator of every set against plain loops in double, in fixed and in random cases;
- the operators' random cases of attention, values and gradients, against the bar of accuracy.py (arm_route.py).

Needs ziglang, which the extra dev brings, and qemu-aarch64 (Debian, Ubuntu: apt-get install qemu-user). What runs is
compiled by aarch64-linux-gnu-g++ where there is one (g++-aarch64-linux-gnu), else by ziglang, whose first link builds
its libraries for minutes; --compiler asks for either or both. Exits 1 if anything failed, 3 if something is missing.
Nothing of this measures speed.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import arm_budget
import commands
import compilers

ROOT = compilers.ROOT
QEMU = "qemu-aarch64"
NEEDS = {
    "ziglang": 'pip install -e ".[dev]" on Linux',
    QEMU: "apt-get install qemu-user on Debian and Ubuntu, or your system's package of QEMU's user-mode emulators",
}
FLAGS = (*arm_budget.FLAGS, f"-I{ROOT}/tests/cpp", "-w", "-pthread")
NEON, BF16 = "-DDNL_NEON", "-DDNL_BF16_PRODUCTS"
#: Programs of one source: name, source, flags.
SMALL = (
    ("conversions", "test_conversions", (NEON,)),
    ("products", "test_products", (NEON,)),
    ("products of bfloat16", "test_products", (NEON, BF16)),
)
KERNELS = sorted(path for path in (ROOT / "csrc/core/cpu").glob("*.cpp") if "avx" not in path.name)
#: Programs of all kernels: name, source of main().
MAINS = {"kernels": "test_cpu_kernels", "server": "pairwise_server"}
#: An emulated CPU with all that QEMU knows, and one of Armv8.0.
NEWEST, OLDEST = "max", "cortex-a72"
FIRST_CASE = 800_000


class Failed(RuntimeError):
    pass


def missing():
    """What is not here, a line each, and how to get it."""
    here = {"ziglang": find_spec("ziglang"), QEMU: shutil.which(QEMU)}
    return [f"needs {name}: {how}" for name, how in NEEDS.items() if not here[name]]


def compile_all(name, command, jobs):
    """The programs for one compiler, by name, in build/arm."""
    folder = ROOT / "build/arm" / name
    folder.mkdir(parents=True, exist_ok=True)

    def built(out, *arguments):
        done = subprocess.run([*command, *FLAGS, *arguments, "-o", out], capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"{out.name} does not compile: {done.stderr[-3000:]}")
        return out

    sources = (*KERNELS, *(ROOT / f"tests/cpp/{name}.cpp" for name in MAINS.values()))
    objects = [(folder / f"{path.stem}.o", "-c", path) for path in sources]
    small = [(folder / title, "-static", *flags, ROOT / f"tests/cpp/{source}.cpp") for title, source, flags in SMALL]
    # The first link builds zig's libraries, which others would wait for.
    first = built(*small[0])
    with ThreadPoolExecutor(jobs) as pool:
        files = list(pool.map(lambda item: built(*item), [*objects, *small[1:]]))
    programs = {path.name: path for path in (first, *files[len(objects) :])}
    kernels = files[: len(KERNELS)]
    for title, main in MAINS.items():
        programs[title] = built(folder / title, "-static", folder / f"{main}.o", *kernels)
    return programs


def run(program, *arguments, cpu=NEWEST, **environment):
    """(exit status, output) of a program on an emulated CPU."""
    command = [QEMU, "-cpu", cpu, program, *arguments]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("DNL_EXT_")}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=600, env=plain | environment
    )
    return done.returncode, done.stdout + done.stderr


def expect(program, *arguments, **options):
    """The output of a program that must succeed."""
    status, output = run(program, *arguments, **options)
    if status:
        raise Failed(f"{pathlib.Path(program).name} {' '.join(map(str, arguments))}: exit {status}\n{output[-3000:]}")
    return output


def check_operators(program, capability, dtype, count):
    """Random cases of the operators by the kernels of one set."""
    server = [QEMU, "-cpu", NEWEST, "-E", f"DNL_EXT_CPU_CAPABILITY={capability}", program]
    command = [sys.executable, ROOT / "tests/arm_route.py", FIRST_CASE, count, dtype, *server]
    status, output = commands.run(command, 600, OMP_NUM_THREADS="1")
    if status:
        raise Failed(f"exit {status}\n{output[-3000:]}")
    return output


def check_sets(program):
    """Which sets there are, and which is used, with BF16 and without."""
    right, wrong = [], []

    def same(wanted, got):
        kept = right if got.strip() == wanted else wrong
        kept.append(f"wanted {wanted!r}, got {got.strip()!r}")

    same("generic neon neon_bf16 neon_bf16", expect(program, "sets"))
    same("generic neon neon", expect(program, "sets", cpu=OLDEST))
    for name in ("generic", "neon"):
        same(f"generic neon neon_bf16 {name}", expect(program, "sets", DNL_EXT_CPU_CAPABILITY=name))
    status, output = run(program, "sets", cpu=OLDEST, DNL_EXT_CPU_CAPABILITY="neon_bf16")
    refusal = "DNL_EXT_CPU_CAPABILITY: neon_bf16 is not built or not supported by this CPU"
    same(f"2: generic neon {refusal}", f"{status}: {output}")
    if wrong:
        raise Failed("\n".join(wrong))
    return f"{len(right)} passed, 0 failed"


def checks_of(programs, cases):
    """(title, function that returns the program's last line or raises Failed)."""
    kernels, server = programs["kernels"], programs["server"]
    return [
        ("sets", lambda: check_sets(kernels)),
        *((title, lambda title=title: expect(programs[title])) for title, _, _ in SMALL),
        ("kernels, fixed cases", lambda: expect(kernels)),
        (f"kernels, {cases} random cases", lambda: expect(kernels, cases)),
        ("kernels without BF16, 20 random cases", lambda: expect(kernels, 20, 1_000_000, cpu=OLDEST)),
        (f"operators of neon, {4 * cases} random cases", lambda: check_operators(server, "neon", "any", 4 * cases)),
        (
            f"operators of neon_bf16, {4 * cases} random cases of bfloat16",
            lambda: check_operators(server, "neon_bf16", "bfloat16", 4 * cases),
        ),
    ]


def outcome(check):
    """(title, what it counted or how it failed, seconds) of one of checks_of()."""
    (title, function), began = check, time.time()
    try:
        counted = re.findall(r"\d+ passed(?:, \d+ failed)?", function())
        result = counted[-1] if counted else "FAILED: it counted nothing"
    except (Failed, subprocess.TimeoutExpired) as error:
        result = f"FAILED: {error}"
    return title, result, time.time() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compiler", nargs="+", choices=("clang", "gcc"), help="default: gcc, or clang without it")
    parser.add_argument(
        "--cases",
        type=int,
        default=50,
        help="random cases of attention on every set; four times as many of the operators",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.cases < 1 or options.jobs < 1:
        parser.error("--cases and --jobs: expected numbers from 1 on")
    if lacking := missing():
        print("\n".join(lacking), file=sys.stderr)
        return 3
    toolchains = arm_budget.toolchains()
    if unknown := set(options.compiler or ()) - set(toolchains):
        print(f"--compiler {' '.join(unknown)}: {arm_budget.GCC} is not here", file=sys.stderr)
        return 2
    failed = not arm_budget.check(print)
    for name in options.compiler or ("gcc" if "gcc" in toolchains else "clang",):
        command = toolchains[name]
        began = time.time()
        try:
            checks = checks_of(compile_all(name, command, options.jobs), options.cases)
        except Failed as error:
            print(f"{name}: {error}")
            failed = True
            continue
        print(f"{name}: compiled in {time.time() - began:.0f} s", flush=True)
        with ThreadPoolExecutor(options.jobs) as pool:
            for title, result, seconds in pool.map(outcome, checks):
                failed |= result.startswith("FAILED")
                print(f"{name}: {title}: {result}, {seconds:.0f} s", flush=True)
    print("FAIL" if failed else "PASS")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
