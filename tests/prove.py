"""All that can be proven of the kernels without a GPU, in one run: `make prove`.

    python tests/prove.py [--only STAGE ...] [--scale 1.0] [--jobs 2] [--patience 1] [--json build/prove.json]

Prints a table: property, count reached, the count it claims, failures. A stage that has no time left stops, and says
how far it came. Exits 1 if anything failed or a count is short of its claim (times --scale, for a quick look).
`--list` names the stages. docs/reliability.md says what each of them shows and what only a GPU does.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests/gates")]

import commands  # noqa: E402
import compilers  # noqa: E402
import programs  # noqa: E402


@dataclass
class Outcome:
    stage: str
    what: str
    claimed: int
    count: int = 0
    failures: list = field(default_factory=list)
    seconds: float = 0
    note: str = ""

    @property
    def passes(self):
        return not self.failures and self.count >= self.claimed


@dataclass
class Context:
    scale: float
    jobs: int
    patience: float = 1  # times the seconds that a stage may take

    def scaled(self, count):
        return max(1, round(count * self.scale))


def each(context, function, items):
    with ThreadPoolExecutor(context.jobs) as pool:
        return list(pool.map(function, items))


def call(command, seconds, **environment):
    return commands.run(command, seconds, **programs.ENVIRONMENT, **environment)


def slices(count, at_once):
    return [(first, min(at_once, count - first)) for first in range(0, count, at_once)]


# ----------------------------------------------------------------------------------------------------------------------
# Programs of tests/gates
# ----------------------------------------------------------------------------------------------------------------------


def run_gates(context, outcome, mode, counts, seconds, at_once=100):
    """Random cases by family: `counts` maps a program to how many."""
    end = time.time() + seconds
    built = dict(
        zip(counts, each(context, lambda gate: programs.cached(programs.Program(gate, mode)), counts), strict=True)
    )
    work = [(gate, *part) for gate, count in counts.items() for part in slices(context.scaled(count), at_once)]
    # Families take turns, so that one which runs out of time is not the last of the list.
    work.sort(key=lambda item: item[1] / counts[item[0]])

    def one(item):
        gate, first, count = item
        if time.time() > end:
            return 0, None
        status, text = call([built[gate], count, first], 600)
        reached = re.search(r"(\d+) cases, (\d+) failed", text)
        if status or not reached:
            return int(reached[1]) if reached else 0, f"{gate} {mode} {first}+{count}: {text[-600:]}"
        return int(reached[1]), None

    for reached, failure in each(context, one, work):
        outcome.count += reached
        outcome.failures += [failure] if failure else []
    outcome.note += " + ".join(f"{gate} {context.scaled(count)}" for gate, count in counts.items())


def cpu_program(mode):
    """tests/cpp/test_cpu_kernels.cpp, built in `mode` by g++, whose pragmas choose the kernels' instruction sets."""
    purpose = {"asan": "asan", "tsan": "tsan-gnu"}[mode]
    if lacking := compilers.missing(purpose):
        raise programs.BuildError(f"needs {lacking}")
    folder = ROOT / "build/gates"
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted((ROOT / "csrc/core/cpu").glob("*.cpp"))
    out = folder / f"cpu-{mode}"
    newest = max(
        path.stat().st_mtime for path in [*(ROOT / "csrc").rglob("*.*"), ROOT / "tests/cpp/test_cpu_kernels.cpp"]
    )
    if not out.exists() or out.stat().st_mtime < newest:
        flags = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-w", "-pthread")
        command = [*compilers.find(purpose), *programs.MODES[mode][1:], "-std=c++17", *flags]
        command += [f"-I{ROOT}/csrc", f"-I{ROOT}/tests/cpp"]
        subprocess.run([*command, ROOT / "tests/cpp/test_cpu_kernels.cpp", *sources, "-o", out], check=True)
    return out


def run_cpu_kernels(context, outcome, mode, count, seconds):
    count = context.scaled(count)
    status, text = call([cpu_program(mode), count], seconds)
    reached = re.search(r"(\d+) cases\n", text)
    outcome.count += int(reached[1]) if reached else 0
    if status:
        outcome.failures.append(f"CPU kernels {mode}: {text[-600:]}")
    outcome.note += f" + CPU kernels {count}"


def emulated_values(context, outcome, seconds):
    run_gates(context, outcome, "fast", EMULATED, seconds)


def bounds(context, outcome, seconds):
    run_gates(context, outcome, "asan", BOUNDS, seconds, 50)
    run_cpu_kernels(context, outcome, "asan", 100, 600)


def races(context, outcome, seconds):
    run_gates(context, outcome, "tsan", RACES, seconds, 20)
    run_cpu_kernels(context, outcome, "tsan", 100, 600)
    outcome.note += f"; {'ziglang' if 'ziglang' in compilers.find('tsan') else 'clang++'}, CPU kernels g++"


def overflow(context, outcome, seconds):
    status, text = call([programs.cached(programs.Program("overflow")), 1], seconds)
    reached = re.search(r"(\d+) cases, (\d+) failed", text)
    outcome.count = int(reached[1]) if reached else 0
    if status:
        outcome.failures.append(text[-600:])


def mutants(context, outcome, seconds):
    path = ROOT / "build/mutants.json"
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    command = [sys.executable, ROOT / "tests/mutants/run.py", "--json", path, "--jobs", context.jobs]
    command += ["--seconds", seconds, *(["--short"] if context.scale < 1 else [])]
    status, text = call(command, seconds + 300)
    results = json.loads(path.read_text()) if path.exists() else []
    outcome.count = sum(r["passes"] for r in results if "gate" in r)
    outcome.failures = [f"{r['name']}: {r.get('error') or r['found'] or 'missed'}" for r in results if not r["passes"]]
    if status and not outcome.failures and not outcome.count:
        outcome.failures = [text[-600:]]
    outcome.note = f"{sum('gate' not in r for r in results)} checks of the original"


# ----------------------------------------------------------------------------------------------------------------------
# Python suites
# ----------------------------------------------------------------------------------------------------------------------


def python_cases(context, outcome, kind, count, seconds, at_once, first=0, **environment):
    end = time.time() + seconds

    def one(part):
        left = end - time.time()
        if left <= 0:
            return 0, []
        begin, size = part
        command = [sys.executable, "prove_cases.py", kind, first + begin, size, f"{left:.0f}"]
        status, text = call(command, left + 300, **environment)
        try:
            result = json.loads(text.strip().splitlines()[-1])
        except (json.JSONDecodeError, IndexError):
            return 0, [f"{kind} {part}, exit {status}: {text[-600:]}"]
        return result["cases"], result["failed"]

    for reached, failed in each(context, one, slices(context.scaled(count), at_once)):
        outcome.count += reached
        outcome.failures += failed


def pytest_counts(outcome, *arguments, seconds):
    status, text = call([sys.executable, "-m", "pytest", "-q", *arguments], seconds)
    passed = re.search(r"(\d+) passed", text)
    outcome.count += int(passed[1]) if passed else 0
    if status:
        outcome.failures += re.findall(r"^FAILED (.*)", text, re.MULTILINE) or [text[-600:]]


def random_cpu(context, outcome, seconds):
    python_cases(context, outcome, "random", outcome_target("random"), seconds, 500, first=100_000)


def large_logits(context, outcome, seconds):
    python_cases(context, outcome, "large", outcome_target("large"), seconds, 500, first=500_000)


def emulated_routes(context, outcome, seconds):
    part = outcome_target("routes") // 4
    # One after the other: the first call builds the library of the route.
    python_cases(context, outcome, "emulated", 1 / context.scale, 300, 1)
    for kind, first in (("emulated", 200_000), ("emulated-large", 400_000)):
        python_cases(context, outcome, kind, part, seconds / 4, 50, first=first)
        # More seeds than wanted: some are wider than the fused forward takes.
        python_cases(
            context, outcome, kind, 2 * part, seconds / 4, 50, first=first + 100_000, DNL_EXT_CUDA_PATH="fused"
        )


def plain(context, outcome, seconds):
    part = outcome_target("plain") // 2
    for kind, first in (("random", 600_000), ("large", 700_000)):
        python_cases(context, outcome, kind, part, seconds / 2, 250, first=first, DNL_EXT_KERNELS="off")


def positions(context, outcome, seconds):
    python_cases(context, outcome, "positions", outcome_target("positions"), seconds, 250)


def determinism(context, outcome, seconds):
    python_cases(context, outcome, "repeats", outcome_target("determinism"), seconds, 5)
    outcome.note = "shapes, each 250 times, forward and backward"


def gradients(context, outcome, seconds):
    of_ops = (f"ops/test_{name}.py" for name in ("autograd", "second", "second_accuracy", "second_methods", "third"))
    pytest_counts(outcome, *of_ops, "pytorch/test_func.py", "modules/test_modules.py", seconds=seconds)


def bad_inputs(context, outcome, seconds):
    of_ops = (f"ops/test_{name}.py" for name in ("errors", "errors_of_shape", "errors_of_options", "empty"))
    pytest_counts(outcome, *of_ops, seconds=seconds)


def launches(context, outcome, seconds):
    pytest_counts(outcome, "kernels/test_launches.py", seconds=seconds)


EMULATED = {"whiten": 8000, "standardise": 8000, "unary": 10_000, "chain": 12_000, "fused": 12_000, "hopper": 1000}
BOUNDS = {"whiten": 1000, "standardise": 1000, "unary": 1000, "chain": 1000, "fused": 1000, "hopper": 40}
RACES = {"whiten": 200, "standardise": 200, "unary": 200, "chain": 200, "fused": 200, "hopper": 12}

# name: property, count it claims, seconds it may take, function. Seconds add up to at most 60 minutes.
STAGES = {
    "launches": ("launches: lint of every kernel file", 1, 30, launches),
    "overflow": ("index overflow: kernel families x 2 sizes", 38, 30, overflow),
    "mutants": ("planted faults found", 271, 900, mutants),
    "values": ("values, emulated kernels", sum(EMULATED.values()), 420, emulated_values),
    "bounds": ("out of bounds: ASAN + UBSAN", sum(BOUNDS.values()) + 100, 280, bounds),
    "races": ("races: TSAN, 3 thread orders", sum(RACES.values()) + 100, 250, races),
    "routes": ("values, emulated operators in Python", 400, 120, emulated_routes),
    "random": ("values and gradients, CPU", 20_000, 360, random_cpu),
    "large": ("values and gradients, large logits, CPU", 20_000, 590, large_logits),
    "plain": ("values and gradients, plain PyTorch", 2000, 180, plain),
    "positions": ("NaN and infinity positions", 500, 30, positions),
    "determinism": ("determinism, CPU", 20, 180, determinism),
    "gradients": ("gradients: gradcheck and derivative tests", 200, 180, gradients),
    "inputs": ("bad inputs raise", 500, 40, bad_inputs),
}


def outcome_target(name):
    return STAGES[name][1]


def claim(name, context):
    fixed = ("launches", "overflow", "gradients", "inputs")
    if name == "mutants" and context.scale < 1:
        return 7
    return STAGES[name][1] if name in fixed else min(STAGES[name][1], context.scaled(STAGES[name][1]))


def table(outcomes):
    lines = [f"{'property':46} {'reached':>8} {'claimed':>8} {'failures':>8} {'seconds':>8}  note"]
    for o in outcomes:
        mark = "" if o.passes else "  <- FAILED" if o.failures else "  <- SHORT"
        lines.append(f"{o.what:46} {o.count:8} {o.claimed:8} {len(o.failures):8} {o.seconds:8.0f}  {o.note}{mark}")
    return "\n".join(lines)


def prove(names, context, say=print):
    outcomes = []
    for name in names:
        what, _, seconds, function = STAGES[name]
        outcome, began = Outcome(name, what, claim(name, context)), time.time()
        try:
            function(context, outcome, seconds * context.patience)
        except Exception as error:  # a stage that cannot run has failed; the others go on
            outcome.failures.append(f"{type(error).__name__}: {error}")
        outcome.seconds = time.time() - began
        outcomes.append(outcome)
        say(f"{name}: {outcome.count} of {outcome.claimed}, {len(outcome.failures)} failures, {outcome.seconds:.0f} s")
        for failure in outcome.failures[:5]:
            say(f"  {failure}")
    return outcomes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the counts, for a quick look")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--patience", type=float, default=1.0, help="factor of what a stage may take")
    parser.add_argument("--json", type=pathlib.Path, default=ROOT / "build/prove.json")
    parser.add_argument("--list", action="store_true", help="name the stages and end")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{name:12} {what}, {count}" for name, (what, count, _, _) in STAGES.items()))
        return 0
    began = time.time()
    context = Context(options.scale, options.jobs, options.patience)
    outcomes = prove(options.only, context, lambda line: print(line, flush=True))
    print("\n" + table(outcomes))
    passes = all(o.passes for o in outcomes)
    print(f"{time.time() - began:.0f} s in all, scale {options.scale:g}: {'PASS' if passes else 'FAIL'}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    report = {"scale": options.scale, "passes": passes, "seconds": time.time() - began}
    options.json.write_text(json.dumps({**report, "stages": [asdict(o) for o in outcomes]}, indent=1))
    return 0 if passes else 1


if __name__ == "__main__":
    sys.exit(main())
