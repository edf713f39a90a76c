"""Prints registers, spills and shared memory of every kernel from the log of a build with -Xptxas=-v.

    python tests/ptxas_table.py BUILD_LOG

Exits 1 if the log names no kernel: a table of nothing would look like a table without spills.
"""

import re
import shutil
import subprocess
import sys
from typing import NamedTuple

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(sm_\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def demangle(names):
    tool = shutil.which("c++filt")
    if not tool:
        return list(names)
    return subprocess.run([tool], input="\n".join(names), text=True, capture_output=True).stdout.splitlines()


class Row(NamedTuple):
    kernel: str  # mangled
    arch: str
    registers: int
    stack: int  # bytes of a thread, as are spills
    spill: int
    shared: int  # bytes of a block


def parse(lines):
    """Rows in the order of the log."""
    rows, kernel, stack, spill = [], None, 0, 0
    for line in lines:
        if match := ENTRY.search(line):
            kernel, stack, spill = match.groups(), 0, 0
        elif match := SPILLS.search(line):
            stack, spill = int(match[1]), int(match[2]) + int(match[3])
        elif kernel and (match := USED.search(line)):
            shared = SHARED.search(line)
            rows.append(Row(*kernel, int(match[1]), stack, spill, int(shared[1]) if shared else 0))
            kernel = None
    return rows


def main():
    with open(sys.argv[1]) as log:
        rows = parse(log)
    if not rows:
        sys.exit(f"{sys.argv[1]}: no kernel found; was it built with -Xptxas=-v?")
    names = [re.sub(r"^void |dnl::|\(.*", "", name) for name in demangle([row.kernel for row in rows])]
    print(f"{'kernel':60} {'arch':8} {'registers':>9} {'spill bytes':>11} {'shared bytes':>12}")
    for name, (_, arch, registers, _, spill, shared) in zip(names, rows, strict=True):
        print(f"{name:60} {arch:8} {registers:9} {spill:11} {shared:12}")
    print(f"{len(rows)} kernels, {sum(row.spill > 0 for row in rows)} with spills")


if __name__ == "__main__":
    main()
