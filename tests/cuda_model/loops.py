"""Loops of any compiled kernel on one multiprocessor, walked instead of run.

    PYTHONPATH=tests python -m cuda_model FILE.cubin --kernel NAME --arch 8.0 [--warps 8] [--blocks 1]
                     [--loop 0xADDRESS] [--trips 0xADDRESS=N ...] [--taken 0xADDRESS ...] [--false P3 ...] [--listing]

Prints every loop of the kernels whose name has NAME in it: instructions of a turn by class, cycles of a turn with all
warps in rotation, tensor cores' share, and what bounds it. Loops within a loop are gone through as often as --trips
says for the address at which they start (once by default); branches forward are not taken unless they are unguarded or
named by --taken. Instructions guarded by a predicate of --false are issued, but do nothing.
"""

import argparse
import sys

from . import bounds, flow, launches, machine, sass, simulate, units

TURNS = 6


def run_loop(code, loop, device, options):
    """(indices of a turn, Result of TURNS turns less one of one turn) of a loop."""
    trips = {int(a, 16): int(n) for a, n in (x.split("=") for x in options.trips)}
    path = flow.walk(code, loop, trips, {int(x, 16) for x in options.taken}, {int(x, 16) for x in options.skip})
    steps = []
    for i in path:
        timing = units.timing_of(code[i], i, device)
        steps.append((timing, {"active": False} if code[i].guard in options.false else None))
    results = [
        simulate.Multiprocessor(device).run([[steps * turns] * options.warps] * options.blocks)
        for turns in (2, 2 + TURNS)
    ]
    return path, results


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python -m cuda_model")
    parser.add_argument("file")
    parser.add_argument("--kernel", default="", help="part of the mangled name")
    parser.add_argument("--arch", default="8.0", choices=machine.MACHINES)
    parser.add_argument("--warps", type=int, default=8, help="warps of a block")
    parser.add_argument("--blocks", type=int, default=1, help="blocks of a multiprocessor")
    parser.add_argument("--loop", help="address at which the loop starts; all by default")
    parser.add_argument("--least", type=int, default=1, help="tensor instructions a loop must have to be shown")
    parser.add_argument("--trips", nargs="*", default=[], metavar="ADDRESS=N")
    parser.add_argument("--taken", nargs="*", default=[], metavar="ADDRESS")
    parser.add_argument("--skip", nargs="*", default=[], metavar="ADDRESS", help="leave these instructions out")
    parser.add_argument("--false", nargs="*", default=[], metavar="GUARD", help="guards that do not hold: P3, !P0")
    parser.add_argument(
        "--listing", action="store_true", help="print the instructions of a turn with their control codes"
    )
    options = parser.parse_args(argv)
    device = machine.machine_of(options.arch)
    try:
        functions = sass.disassemble(options.file)
    except RuntimeError as error:
        print(f"cuda_model: {error}", file=sys.stderr)
        return 3
    shown = 0
    for name, code in functions.items():
        if options.kernel not in name:
            continue
        print(f"{name}: {len(code)} instructions")
        for loop in flow.loops_of(code):
            first, last = code[loop.first].address, code[loop.last].address
            if options.loop and int(options.loop, 16) != first:
                continue
            classes = [units.class_of(x) for x in code[loop.first : loop.last + 1]]
            if not options.loop and sum(c in ("tensor", "wgmma") for c in classes) < options.least:
                continue
            shown += 1
            path, (one, many) = run_loop(code, loop, device, options)
            run = launches.difference(one, many)
            share = bounds.shares(run)
            print(
                f"{'  ' * loop.depth}loop {first:#x} to {last:#x}: {len(path)} instructions a warp and turn, "
                f"{run.cycles / TURNS:.0f} cycles, tensor cores {max(share['tensor'], share['wgmma']):.0%}, "
                f"issue {share['issue']:.0%}; {bounds.bound(run)}"
            )
            print(f"{'  ' * loop.depth}  {bounds.mix(run.by_class, TURNS, options.warps * options.blocks)}")
            waits = sorted(run.waits.items(), key=lambda x: -x[1])
            total = simulate.SCHEDULERS * run.cycles
            text = ", ".join(f"{name} {cycles / total:.0%}" for name, cycles in waits if cycles / total > 0.005)
            print(f"{'  ' * loop.depth}  waits: {text}")
            if options.listing:
                for i in path:
                    c = code[i].control
                    boards = f"W{c.write_barrier}" if c.write_barrier < 6 else "  "
                    boards += f" R{c.read_barrier}" if c.read_barrier < 6 else "   "
                    turn = "-" if c.stay else "Y"
                    print(f"  {code[i].address:#06x} {c.stall:2} {turn} {boards} {c.wait:06b} {code[i].text}")
    if not shown:
        print("cuda_model: no loop found; --least 0 shows those without tensor instructions", file=sys.stderr)
        return 1
    return 0
