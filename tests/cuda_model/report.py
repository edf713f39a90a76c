"""Tables of the shipped kernels, and their budget."""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

from . import bounds, calibrate, calls, kernels, machine, sass

BUDGET = kernels.ROOT / "tests/cuda_model_budget.json"
CYCLE_SLACK, INSTRUCTION_SLACK = 0.05, 0.02  # the order in which warps take turns moves cycles by some percent
ARCHS = ("8.0", "9.0")
BUDGETED = kernels.SHAPES[:2]


def compile_kernels(arch, nvcc, folder):
    """The cubins of an architecture's kernels: from the folder, else compiled into it."""
    found = []
    for name, macros in ((arch, []), (f"{arch}a", ["-DDNL_HOPPER"])):
        if macros and "hopper" not in kernels.paths_of(arch):
            continue
        path = folder / f"{name}.cubin"
        found.append(path)
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        number = name.replace(".", "")
        flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-cubin", *macros, f"-I{kernels.ROOT}/csrc"]
        target = f"-gencode=arch=compute_{number},code=sm_{number}"
        subprocess.run([nvcc, *flags, target, f"{kernels.ROOT}/tests/cuda_kernels.cu", "-o", path], check=True)
    return found


def figures(tile):
    """What the budget keeps of a launches.Tile."""
    return {
        "instructions": round(tile.instructions),
        "cycles": round(tile.cycles),
        "share": round(tile.share, 3),
        "bound": bounds.bound(tile.result),
    }


def model_calls(arch, cubins, wanted, positions):
    """[CallCost] of calls at several numbers of positions."""
    code = kernels.Code(cubins, arch)
    model = calls.Model(code, machine.MACHINES[arch])
    return [model.call(call, n) for call in wanted for n in positions]


def calls_of(paths, shapes):
    return [
        kernels.Call(direction, path, layout, width, channels)
        for direction in ("forward", "backward")
        for width, channels in shapes
        for layout in kernels.LAYOUTS
        for path in paths
    ]


def budget_of(costs):
    """{call: {kernel: figures}}."""
    found = {}
    for cost in costs:
        found.setdefault(cost.call.name, {}).update({name: figures(tile) for name, tile in cost.tiles.items()})
    return found


def worse(budget, built):
    """What is worse than the budget: messages. Both are {arch: {call: {kernel: figures}}}."""
    found = []
    for arch, by_call in built.items():
        for call in sorted(set(by_call) | set(budget.get(arch, {}))):
            by_kernel, wanted = by_call.get(call, {}), budget.get(arch, {}).get(call, {})
            for name in sorted(set(by_kernel) | set(wanted)):
                where = f"{call}, {name} for {arch}"
                if name not in wanted or name not in by_kernel:
                    found.append(f"{where}: {'has no budget' if name in by_kernel else 'is gone'}")
                    continue
                for key, slack in (("instructions", INSTRUCTION_SLACK), ("cycles", CYCLE_SLACK)):
                    new, old = by_kernel[name][key], wanted[name][key]
                    if new > old * (1 + slack):
                        found.append(f"{where}: {new} {key} a tile, budget {old} + {slack:.0%}")
    return found


def tile_table(built):
    lines = ["| architecture | call | kernel | instructions | cycles | tensor cores | bound |", "|" + "---|" * 7]
    for arch, by_call in built.items():
        for call, by_kernel in by_call.items():
            for name, x in by_kernel.items():
                cells = (arch, call, f"`{name}`", x["instructions"], x["cycles"], f"{x['share']:.0%}", x["bound"])
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def call_table(arch, costs):
    """Modelled milliseconds of each path beside eager's: of both directions, and of the best of each together."""
    device = machine.MACHINES[arch]
    rows, by_key, together = [], {}, {}
    for cost in costs:
        key = (cost.call.direction, cost.call.width, cost.call.channels, cost.call.layout, cost.positions)
        by_key.setdefault(key, {})[cost.call.path] = cost
    for (direction, width, channels, layout, n), paths in by_key.items():
        eager = calls.eager(device, direction, n, width, channels)
        cells = [f"{c.seconds * 1e3:.2f}" if (c := paths.get(path)) else "-" for path in ("chain", "fused", "hopper")]
        best = min(c.seconds for c in paths.values())
        shape = f"({width}, {channels}) {layout} | {n}"
        rows.append(
            f"| {device.name} | {direction} {shape} | {eager * 1e3:.2f} | {' | '.join(cells)} | {best / eager:.2f} |"
        )
        both = together.setdefault(shape, [0.0, 0.0])
        both[0] += best
        both[1] += eager
    head = "| GPU | call | positions | eager | chain | fused | hopper | best / eager |"
    training = [
        f"| {device.name} | {shape} | {eager * 1e3:.2f} | {best * 1e3:.2f} | {best / eager:.2f} |"
        for shape, (best, eager) in together.items()
    ]
    training_head = "| GPU | forward + backward | positions | eager | best path of each | best / eager |"
    return "\n".join([head, "|" + "---|" * 8, *rows, "", training_head, "|" + "---|" * 6, *training])


def calibration_table(rows):
    lines = ["| kernel | GPU | width | published TFLOP/s | modelled | off | bound |", "|" + "---|" * 7]
    for x in rows:
        cells = (x["kernel"], x["gpu"], x["width"], x["published"], x["modelled"], f"{x['off']:+.0%}", x["bound"])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def with_tables(page, tables):
    """The page with each table between its marks."""
    for name, table in tables.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        before, _, rest = page.partition(begin)
        if end not in rest:
            raise ValueError(f"no place for the table of {name}: {begin.strip()}, {end}")
        page = f"{before}{begin}\n{table}\n\n{end}{rest.partition(end)[2]}"
    return page


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="what the shipped kernels cost, without a GPU", prog="python -m cuda_model"
    )
    parser.add_argument("--check", action="store_true", help="compare with the budget")
    parser.add_argument("--write", action="store_true", help="rewrite the budget")
    parser.add_argument("--calibrate", metavar="DIR", help="with checkouts of flash-attention and cutlass")
    parser.add_argument("--page", type=pathlib.Path, help="a page whose tables are to be rewritten")
    parser.add_argument("--archs", default=",".join(ARCHS))
    parser.add_argument("--cubins", type=pathlib.Path, help="folder of ARCH.cubin; compiled by default")
    parser.add_argument("--nvcc", default=shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    options = parser.parse_args(argv)
    if sass.cuobjdump() is None:
        print(f"cuda_model: no cuobjdump here: {sass.HOW_TO_GET}", file=sys.stderr)
        return 3
    if options.calibrate:
        calibrate.write(calibrate.calibrate(options.calibrate, options.nvcc))
        print(calibration_table(calibrate.read()))
        return 0
    archs = options.archs.split(",")
    if not shutil.which(options.nvcc):
        print("cuda_model: no nvcc here (--nvcc)", file=sys.stderr)
        return 3
    folder = options.cubins or kernels.cubins(options.nvcc)
    cubins = [compile_kernels(arch, options.nvcc, folder) for arch in archs]
    kernels.recorder()
    everything = options.page or not (options.check or options.write)
    shapes, positions = (kernels.SHAPES, kernels.POSITIONS) if everything else (BUDGETED, (16384,))
    wanted = [calls_of([p for p in kernels.paths_of(x) if everything or p != "chain"], shapes) for x in archs]
    with ProcessPoolExecutor(min(len(archs), os.cpu_count() or 1)) as pool:
        modelled = dict(zip(archs, pool.map(model_calls, archs, cubins, wanted, [positions] * len(archs)), strict=True))
    built = {arch: budget_of([x for x in costs if x.call.path != "chain"]) for arch, costs in modelled.items()}
    tables = {"tiles": tile_table(built)}
    if everything:
        tables["calls"] = "\n\n".join(call_table(arch, costs) for arch, costs in modelled.items())
        tables["calibration"] = calibration_table(calibrate.read())
    print("\n\n".join(tables.values()))
    if options.page:
        options.page.write_text(with_tables(options.page.read_text(), tables))
    names = {call.name for call in calls_of(("fused",), BUDGETED)}
    budgeted = {arch: {call: x for call, x in by_call.items() if call in names} for arch, by_call in built.items()}
    compiler = release(options.nvcc)
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    if options.write:
        budget = {**budget, **budgeted, "nvcc": compiler}
        BUDGET.write_text(json.dumps(budget, indent=1, sort_keys=True) + "\n")
        print(f"wrote {BUDGET}")
    return compare(budget, budgeted, compiler) if options.check else 0


def release(nvcc):
    """Of the compiler, "13.0"; None where it does not say."""
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    match = re.search(r"release (\S+),", done.stdout)
    return match[1] if match else None


def compare(budget, built, compiler):
    """Exit status of a check. Another release of the compiler makes another kernel: it is told, and does not fail."""
    problems = worse(budget, built)
    print("\n".join(problems))
    print(f"{sum(map(len, built.values()))} calls, {len(problems)} worse than the budget")
    if problems and compiler != budget.get("nvcc"):
        print(f"the budget is of nvcc {budget.get('nvcc')}, this is {compiler}: no failure")
        return 0
    return 1 if problems else 0
