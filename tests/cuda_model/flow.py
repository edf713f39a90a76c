"""Loops of a kernel, and traces of a warp that are walked rather than run: trip counts are given, or guessed as one."""

import bisect
from dataclasses import dataclass


@dataclass(frozen=True)
class Loop:
    """Instructions from `first` to `last`, as indices, `last` a branch back to `first`."""

    first: int
    last: int
    depth: int

    def __contains__(self, index):
        return self.first <= index <= self.last


def loops_of(code):
    """All loops, outermost first where they nest. A jump of an instruction to itself, which ends a kernel, is none."""
    addresses = [x.address for x in code]
    ranges = {}
    for i, x in enumerate(code):
        if x.opcode == "BRA" and x.target is not None and x.target < x.address:
            first = bisect.bisect_left(addresses, x.target)
            ranges[first] = max(ranges.get(first, 0), i)
    found = []
    for first, last in sorted(ranges.items(), key=lambda x: (x[0], -x[1])):
        depth = sum(a <= first and last <= b and (a, b) != (first, last) for a, b in ranges.items())
        found.append(Loop(first, last, depth))
    return found


def walk(code, loop, trips, taken=(), skipped=()):
    """Indices that a warp passes in one turn of the loop.

    Branches back go as often as `trips` says (address of the branch's target: turns, else one); branches forward are
    not taken, but for unguarded ones and those at addresses in `taken`. Instructions at addresses in `skipped` are left
    out.
    """
    at_address = {x.address: i for i, x in enumerate(code)}
    path, turns, i = [], {}, loop.first
    while i <= loop.last:
        x = code[i]
        if x.address not in skipped:
            path.append(i)
        if i == loop.last:
            break
        if x.opcode == "BRA" and x.target is not None:
            back = x.target <= x.address
            if back:
                turns[i] = turns.get(i, 0) + 1
                go = turns[i] < trips.get(x.target, 1)
                if not go:
                    turns[i] = 0
            else:
                unconditional = x.guard is None and not any(o.startswith(("P", "!P", "UP", "!UP")) for o in x.operands)
                go = x.address in taken or unconditional
            if go:
                if x.target not in at_address or at_address[x.target] not in loop:
                    break
                i = at_address[x.target]
                continue
        i += 1
        if len(path) > 1_000_000:
            raise RuntimeError("a walk through the loop does not end: give trips or taken branches")
    return path
