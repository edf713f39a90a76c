"""How much of a product's inner loop on Arm is multiply-adds, against a committed budget (arm_budget.json).

    python tests/arm_budget.py [--write]

Compiles tests/cpp/neon_blocks.cpp to assembly with ziglang's clang, and with aarch64-linux-gnu-g++ where there is one.
Of every block it takes the innermost loop with the most multiply-adds (FMLA, BFMMLA), and exits 1 where

- they are less than three quarters of the loop's instructions,
- they are a smaller share than the budget has, if the compiler is the one that it was written with, or
- the loop moves anything to or from the stack, which is to say that its sums do not fit in the registers.
"""

import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass

import compilers

ROOT = compilers.ROOT
BUDGET = ROOT / "tests/arm_budget.json"
LEAST_SHARE = 0.75
GCC = "aarch64-linux-gnu-g++"
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", f"-I{ROOT}/csrc")
MULTIPLY_ADDS = ("fmla", "bfmmla")
TYPES = {"f": "float32", "d": "float64", "NS0_4bf16E": "bfloat16"}
INTO = ("store", "add", "rescale")
# block<E, rows, into> of product.h, as both compilers mangle its name.
BLOCK = re.compile(r"_ZN3dnl\d+\w+?5blockI(f|d|NS0_4bf16E)Li(\d+)ELNS0_4IntoE(\d)EEE")
# A loop ends in a conditional branch; a plain one goes back from code that was moved out of the way.
BRANCH = re.compile(r"b\.?(eq|ne|cs|hs|cc|lo|mi|pl|vs|vc|hi|ls|ge|lt|gt|le)|cbn?z|tbn?z")


@dataclass(frozen=True)
class Loop:
    instructions: int
    multiply_adds: int
    stack: int  # instructions that name the stack pointer

    @property
    def share(self):
        return self.multiply_adds / self.instructions


def functions(assembly):
    """(name, lines) of every function."""
    name, lines = None, []
    for line in assembly.splitlines():
        if match := re.match(r"(_Z\w+):", line):
            name, lines = match[1], []
        elif name and re.match(r"\s*\.(size|cfi_endproc)\b", line):
            yield name, lines
            name = None
        elif name:
            lines.append(line)


def innermost_loops(lines):
    """The loops of a function that hold no other: what lies between a label and a branch back to it."""
    instructions, labels, loops = [], {}, []
    for line in lines:
        code = re.split(r"//|\s#", line)[0]
        if match := re.match(r"(\.\w+):", code):
            labels[match[1]] = len(instructions)
        elif match := re.match(r"\s+([a-z][\w.]*)\s*(.*)", code):
            instructions.append((match[1], match[2].strip()))
    for end, (name, operands) in enumerate(instructions):
        target = operands.split(",")[-1].strip()
        if BRANCH.fullmatch(name) and labels.get(target, end + 1) <= end:
            loops.append((labels[target], end + 1))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [instructions[begin:end] for begin, end in inner]


def measure(instructions):
    return Loop(
        len(instructions),
        sum(name in MULTIPLY_ADDS for name, _ in instructions),
        sum(bool(re.search(r"\bsp\b", operands)) for _, operands in instructions),
    )


def blocks(assembly):
    """{"float32 store": Loop, ...} of the blocks in what a compiler wrote."""
    found = {}
    for name, lines in functions(assembly):
        if match := BLOCK.match(name):
            loops = [measure(loop) for loop in innermost_loops(lines)]
            kernel = f"{TYPES[match[1]]} {INTO[int(match[3])]}"
            found[kernel] = max(loops, key=lambda loop: loop.multiply_adds, default=Loop(1, 0, 0))
    return found


def toolchains():
    """{name: command} of the compilers for Arm that are here."""
    found = {"clang": compilers.zig("aarch64-linux-musl")}
    if shutil.which(GCC):
        found["gcc"] = (GCC,)
    return found


def version(command):
    """Of a compiler, as its first line has it, without what a distribution adds."""
    lines = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()
    return re.search(r"\d+\.\d+\.\d+", lines[0])[0]


def compiled(command):
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder, "blocks.s")
        source = ROOT / "tests/cpp/neon_blocks.cpp"
        done = subprocess.run([*command, *FLAGS, "-w", "-S", source, "-o", out], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile:\n{done.stderr[-3000:]}")
        return out.read_text()


def worse(loops, budget):
    """What is wrong with `loops`, a line each. `budget`: shares by name, or None where another compiler wrote them."""
    lines = [f"{name}: no such block" for name in sorted(set(budget or loops) - set(loops))]
    for name, loop in sorted(loops.items()):
        what = f"{name}: {loop.multiply_adds} of {loop.instructions} instructions are multiply-adds"
        least = max(LEAST_SHARE, (budget or {}).get(name, LEAST_SHARE))
        if budget is not None and name not in budget:
            lines.append(f"{name}: no budget: python tests/arm_budget.py --write")
        if round(loop.share, 3) < least:
            lines.append(f"{what}, {loop.share:.3f}, less than {least}")
        if loop.stack:
            lines.append(f"{name}: {loop.stack} instructions of the loop use the stack")
    return lines


def check(say=print, write=False):
    """Whether every compiler here keeps the budget."""
    budget, wrong = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}, []
    for name, command in toolchains().items():
        loops, release = blocks(compiled(command)), version(command)
        if write:
            shares = {block: round(loop.share, 3) for block, loop in sorted(loops.items())}
            budget[name] = {"version": release, "share": shares}
        same = budget.get(name, {}).get("version") == release
        wrong += [f"{name} {release}, {line}" for line in worse(loops, budget[name]["share"] if same else None)]
        for block, loop in sorted(loops.items()):
            parts = f"{loop.multiply_adds:3} of {loop.instructions:3}"
            say(f"{name} {release:8} {block:18} {parts} instructions are multiply-adds, {loop.share:.3f}")
    for line in wrong:
        say(f"  {line}")
    if write and not wrong:
        BUDGET.write_text(json.dumps(budget, indent=1, sort_keys=True) + "\n")
    return not wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="rewrite the budget of the compilers that are here")
    return 0 if check(write=parser.parse_args().write) else 1


if __name__ == "__main__":
    sys.exit(main())
