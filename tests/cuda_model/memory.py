"""Accesses to memory: what is known of them per warp, and zeros for what is loaded.

Functions of (State, mask of lanes)."""

import numpy as np

from . import banks, registers
from .units import width_of
from .values import predicate, predicate_writer, writer


def _zero(x, width):
    """Writers that bring zeros to the registers of a load."""
    target = x.operands[0]
    if not registers.is_register(target) or registers.row_of(target) == registers.RZ:
        return []
    row = registers.row_of(target)
    return [writer(f"R{row + k}") for k in range(max(1, width // 4))]


def _by_warp(where, state):
    return where(state.registers).astype(np.int64).reshape(-1, registers.LANES)


def shared(program, x, i):
    where = registers.address(next(t for t in x.operands if "[" in t))
    load = x.opcode not in ("STS", "STSM")
    matrices = int(x.modifiers[-1]) if x.opcode in ("LDSM", "STSM") else 0
    width = 4 * matrices if matrices else width_of(x)
    zeros = _zero(x, width) if load else []

    def step(state, mask):
        addresses = _by_warp(where, state)
        for write in zeros:
            write(state.registers, mask, np.uint32(0))
        lanes = mask.reshape(addresses.shape)
        counts = banks.matrix(addresses, matrices) if matrices else banks.shared(addresses, width, lanes)
        return [{"wavefronts": int(n)} for n in counts]

    return step


def copy(program, x, i):
    to, source = registers.address(x.operands[0]), registers.address(x.operands[1])
    width = width_of(x)
    filled = predicate(x.operands[2]) if len(x.operands) > 2 else None

    def step(state, mask):
        addresses = _by_warp(to, state)
        written = banks.shared(addresses, width, mask.reshape(addresses.shape))
        reads = mask & filled(state.registers) if filled else mask
        sizes = banks.SECTOR * banks.sectors(_by_warp(source, state), width, reads.reshape(addresses.shape))
        return [{"wavefronts": int(w), "bytes": int(b)} for w, b in zip(written, sizes, strict=True)]

    return step


def global_memory(program, x, i):
    where = registers.address(next(t for t in x.operands if "[" in t))
    width = width_of(x)
    zeros = [] if x.opcode.startswith(("ST", "RED")) else _zero(x, width)

    def step(state, mask):
        addresses = _by_warp(where, state)
        for write in zeros:
            write(state.registers, mask, np.uint32(0))
        counts = banks.sectors(addresses, width, mask.reshape(addresses.shape))
        first = addresses.ravel()[state.registers.first(mask)]
        return [
            {"wavefronts": max(1, -(-int(n) // 4)), "bytes": banks.SECTOR * int(n), "at": int(a)}
            for n, a in zip(counts, first, strict=True)
        ]

    return step


def local_memory(program, x, i):
    """Spills: what a thread stores at an address of its own, it loads again."""
    where = registers.address(next(t for t in x.operands if "[" in t))
    width = width_of(x)
    store = x.opcode == "STL"
    rows = [
        registers.row_of(x.operands[1 if store else 0].removesuffix(".reuse")) + k for k in range(max(1, width // 4))
    ]
    writers = [] if store else [writer(f"R{row}") for row in rows]

    def step(state, mask):
        first = int(where(state.registers)[int(mask.argmax())])
        for k, row in enumerate(rows):
            kept = state.local.setdefault(first + 4 * k, np.zeros(state.registers.lanes, np.uint32))
            if store:
                np.copyto(kept, state.registers.r[row], where=mask)
            else:
                writers[k](state.registers, mask, kept)
        return [{"wavefronts": max(1, width // 4), "bytes": 0}] * state.registers.warps

    return step


def named_barrier(program, x, i):
    """BAR: which barrier, and how many warps have to come."""
    number = registers.reader(x.operands[0]) if x.operands else None
    threads = registers.reader(x.operands[1]) if len(x.operands) > 1 else None

    def step(state, mask):
        if number is None or not {"SYNC", "ARV"} & set(x.modifiers):
            return None
        first = state.registers.first(mask)
        numbers = np.broadcast_to(number(state.registers), mask.shape)[first]
        if threads is None:
            return [{"barrier": (int(n), state.registers.warps)} for n in numbers]
        counts = np.broadcast_to(threads(state.registers), mask.shape)[first] // registers.LANES
        return [{"barrier": (int(n), int(c))} for n, c in zip(numbers, counts, strict=True)]

    return step


def syncs(program, x, i):
    """mbarrier: the predicate of a wait comes out true; what is done, the address and the operand go into the trace."""
    where = registers.address(next(t for t in x.operands if "[" in t))
    last = x.operands[-1]
    operand = registers.reader(last)
    out = predicate_writer(x.operands[0]) if "PHASECHK" in x.modifiers else None

    def step(state, mask):
        first = state.registers.first(mask)
        addresses = where(state.registers)[first]
        values = np.broadcast_to(operand(state.registers), mask.shape)[first]
        lanes = mask.reshape(-1, registers.LANES).sum(axis=1)
        if out:
            out(state.registers, mask, True)
        kind = "wait" if out else "init" if "EXCH" in x.modifiers else "arrive" if "A1T0" in x.modifiers else "expect"
        return [{"mbarrier": (kind, int(a), int(v), int(n))} for a, v, n in zip(addresses, values, lanes, strict=True)]

    return step
