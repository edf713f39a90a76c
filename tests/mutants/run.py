"""Plants faults into copies of the kernels and checks that the host tests reject each, and accept the original.

    python tests/mutants/run.py [--kernels cuda|cpu] [--short] [--only TEXT] [--jobs 1] [--seconds 3600] [--json FILE]

A mutant is compiled together with one program of tests/gates or, of a CPU kernel, of tests/cpp, which must fail; the
same program over the unmodified source must pass the same cases. Exits 1 if a mutant is missed, its text is not found
exactly once, it does not compile, the original is rejected, or the time ran out. The mutants are in table.py,
which gathers them, and cpu.py; those that need a tool that is not here are left out, which is said.
"""

import argparse
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1] / "gates")]

import cpu  # noqa: E402
import programs  # noqa: E402
import table  # noqa: E402

ORDERS = ("ascending", "descending", "random")
REPORTS = (
    ("AddressSanitizer", r"ERROR: AddressSanitizer: (\S+)"),
    ("UndefinedBehaviorSanitizer", r"runtime error: (.*)"),
    ("ThreadSanitizer", r"WARNING: ThreadSanitizer: (data race)"),
    ("emulator", r"(?m)gate.h:\d+: false  (.*?)(?: at | \[block|$)"),
    ("promise", r"cuda_host.h:\d+: .*?  (.*)"),
    ("values", r"gate.h:\d+: error <= bar  (.*?): error"),
    ("plan", r"plan_checks.h:\d+: .*?  (.*)"),
    ("operands", r"fused.cpp:\d+: .*?  (.*?): operand"),
    ("overflow", r"overflow.cpp:\d+: .*?  (.*)"),
    ("check", r"test_\w+.cpp:\d+: .*?  (.*)"),
)


def planted(mutant, folder):
    """A copy of csrc in `folder` with the mutant's fault."""
    csrc = pathlib.Path(folder) / "csrc"
    shutil.copytree(programs.ROOT / "csrc", csrc)
    path = csrc / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise LookupError(f"its text occurs {text.count(mutant.old)} times in {mutant.file}, expected once")
    path.write_text(text.replace(mutant.old, mutant.new))
    return csrc


def verdict(program, cases, order):
    """None if the program accepts the kernels, else what it found."""
    try:
        done = subprocess.run(
            [program, str(cases), "0", order],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=300,
            env={**os.environ, **programs.ENVIRONMENT},
        )
    except subprocess.TimeoutExpired:
        return "no end within 300 s"
    if done.returncode == 0:
        return None
    output = done.stdout + done.stderr
    for name, pattern in REPORTS:
        if match := re.search(pattern, output):
            return f"{name}: {match[1][:60]}"
    if done.returncode < 0:
        return f"signal {-done.returncode}"
    return f"exit {done.returncode}"


def findings(mutant, program):
    orders = ORDERS if mutant.mode == "order" else ("all",)
    found = {order: verdict(program, mutant.cases, order) for order in orders}
    if mutant.mode != "order":
        return found["all"]
    hits = [order for order in orders if found[order]]
    return f"{found[hits[0]]} ({', '.join(hits)})" if hits else None


def program_of(mutant):
    return programs.Program(mutant.gate, "plain" if mutant.mode == "order" else mutant.mode, mutant.type)


def twins_of(mutants):
    """One mutant per distinct check of the original: the one with the most cases."""
    twins = {}
    for mutant in mutants:
        key = program_of(mutant), mutant.mode == "order"
        if key not in twins or twins[key].cases < mutant.cases:
            twins[key] = mutant
    return list(twins.values())


def check_original(mutant):
    began = time.time()
    try:
        found = findings(mutant, programs.cached(program_of(mutant)))
    except programs.BuildError as error:
        found = f"does not compile: {error}"
    return {
        "name": f"original, {mutant.gate} {mutant.mode} {mutant.type} x {mutant.cases}",
        "passes": found is None,
        "found": found,
        "seconds": time.time() - began,
    }


def check_mutant(mutant):
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        try:
            program = programs.build(program_of(mutant), planted(mutant, folder), pathlib.Path(folder) / "program")
            found, error = findings(mutant, program), None
        except (LookupError, programs.BuildError) as failure:
            found, error = None, str(failure)
    return {
        "name": mutant.name,
        "gate": mutant.gate,
        "mode": mutant.mode,
        "passes": found is not None,
        "found": found,
        "error": error,
        "seconds": time.time() - began,
    }


def run(mutants, jobs=1, say=print, seconds=math.inf):
    """Results for the originals and for the mutants that were begun within `seconds`."""
    results, end = [], time.time() + seconds
    with ThreadPoolExecutor(jobs) as pool:
        for check, items in ((check_original, twins_of(mutants)), (check_mutant, mutants)):
            for result in pool.map(lambda item, check=check: check(item) if time.time() < end else None, items):
                if result is None:
                    continue
                results.append(result)
                if check is check_original:
                    text = "accepted" if result["passes"] else f"FALSE ALARM: {result['found']}"
                else:
                    text = result["found"] or f"MISSED {(result['error'] or '')[:500]}"
                say(f"{result['name']:78} {result['seconds']:5.1f} s  {text}")
    return results


def runnable(mutants, say=print):
    """Those whose programs can be built and run here. Says which are left out."""
    lacking = {gate: programs.lacking(programs.Program(gate)) for gate in {m.gate for m in mutants} & set(programs.CPU)}
    for what in sorted({what for what in lacking.values() if what}):
        count = sum(lacking.get(m.gate) == what for m in mutants)
        say(f"{count} mutants are left out, for they need {what}")
    return [m for m in mutants if not lacking.get(m.gate)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--short", action="store_true", help="a few mutants, one of each kind")
    parser.add_argument("--only", default="", help="those whose name or gate contains this text")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing after this time")
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    listed = cpu if options.kernels == "cpu" else table
    mutants = [
        m
        for m in listed.MUTANTS
        if (not options.short or m.name in listed.SHORT) and (options.only in m.name or options.only in m.gate)
    ]
    mutants = runnable(mutants)
    results = run(mutants, options.jobs, lambda line: print(line, flush=True), options.seconds)
    originals = [r for r in results if "gate" not in r]
    found = sum(r["passes"] for r in results) - sum(r["passes"] for r in originals)
    alarms = sum(not r["passes"] for r in originals)
    print(f"{found} of {len(mutants)} mutants found, {alarms} false alarms in {len(originals)} checks of the original")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return 0 if found == len(mutants) > 0 and not alarms else 1


if __name__ == "__main__":
    sys.exit(main())
