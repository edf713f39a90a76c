"""Runs a warp's integers, predicates and branches with a launch's real parameters: the trace of what it passes.

Memory is not modelled: loads bring zeros. So a branch on loaded data goes the way of zeros, and addresses that come from
memory are wrong; the kernels of this project have neither. Products of matrices and conversions of data change nothing.
Waits for an mbarrier succeed at once: in simulate.py they take their time.

Lanes that part run apart, those at the lowest address first, and meet again where BSYNC says.
"""

from dataclasses import dataclass, field

import numpy as np

from . import arithmetic, banks, registers
from .units import class_of, width_of

PARAMETERS_AT = {"8": 0x160, "9": 0x210, "10": 0x380, "12": 0x380}  # of constant bank 0, by major version
GONE = 1 << 30  # address of a lane that has left
_SPECIAL = {"SR_LANEID": "lane", "SR_TID.X": "thread", "SR_CTAID.X": "block", "SR_LTMASK": "lower"}


@dataclass(frozen=True)
class Launch:
    """What a grid was launched with."""

    blocks: int
    threads: int
    shared: int
    parameters: bytes

    @classmethod
    def of(cls, line):
        return cls(line["blocks"], line["threads"], line["shared"], bytes.fromhex(line["parameters"]))

    def constants(self, arch):
        """Constant bank 0: sizes of block and grid, then the parameters."""
        start = PARAMETERS_AT[arch.split(".")[0]]
        head = np.zeros(start // 4, np.uint32)
        head[0:3] = self.threads, 1, 1
        head[3:6] = self.blocks, 1, 1
        head[0x28 // 4] = 0xFFFFF0  # top of the stack
        return head.tobytes() + self.parameters


@dataclass
class Program:
    """A kernel, compiled for the interpreter."""

    code: list
    arch: str
    at: dict = field(init=False)
    run: list = field(init=False)

    def __post_init__(self):
        self.at = {x.address: i for i, x in enumerate(self.code)}
        self.run = [None] * len(self.code)
        self.guards = [None if x.guard is None else arithmetic._predicate(x.guard) for x in self.code]
        self.kinds = [_kind(x) for x in self.code]

    def handler(self, i):
        if self.run[i] is None:
            self.run[i] = _MAKERS.get(self.kinds[i], arithmetic_handler)(self, self.code[i], i)
        return self.run[i]


def _kind(x):
    op = x.opcode
    if op in ("BRA", "EXIT", "CALL", "RET", "BSSY", "BSYNC", "BREAK", "BMOV", "WARPSYNC"):
        return op
    if op in ("S2R", "S2UR"):
        return "special"
    klass = class_of(x)
    if klass in ("ldsm", "lds", "sts"):
        return "shared" if op != "MOVM" else "nothing"
    if op == "LDGSTS":
        return "copy"
    if klass == "global":
        return "global"
    if op == "SYNCS":
        return op
    if klass in ("branch", "barrier", "cp.async", "wgmma") and op != "ELECT" or op == "UCGABAR_ARV":
        return "nothing"
    return "arithmetic"


# Handlers run an instruction for the lanes of `mask` and return what is known of it per warp, or None.


def arithmetic_handler(program, x, i):
    run = arithmetic.compile_instruction(x)
    return lambda state, mask: run(state.registers, mask)


def nothing(program, x, i):
    return lambda state, mask: None


def special(program, x, i):
    write = arithmetic._write(x.operands[0])
    name = _SPECIAL.get(x.operands[1])

    def step(state, mask):
        thread = np.arange(state.registers.lanes, dtype=np.uint32)
        lane = thread % np.uint32(32)
        value = {
            "lane": lane,
            "thread": thread,
            "block": np.uint32(state.block),
            "lower": (np.uint32(1) << lane) - np.uint32(1),
        }.get(name, np.uint32(0))
        write(state.registers, mask, value)

    return step


def _zero(x, width):
    """Writers that bring zeros to the registers of a load."""
    target = x.operands[0]
    if not registers.is_register(target) or registers.row_of(target) == registers.RZ:
        return []
    row = registers.row_of(target)
    return [arithmetic._write(f"R{row + k}") for k in range(max(1, width // 4))]


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
    filled = arithmetic._predicate(x.operands[2]) if len(x.operands) > 2 else None

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


def branch(program, x, i):
    conditions = [arithmetic._predicate(t) for t in x.operands if registers.is_predicate(t)]
    target = program.at.get(x.target)
    diverges = "DIV" in x.modifiers  # taken where a warp's lanes have parted, which min-address order makes rare

    def step(state, mask):
        go = mask.copy()
        for condition in conditions:
            go &= condition(state.registers)
        if not diverges:
            state.pc[go] = target

    return step


def leave(program, x, i):
    def step(state, mask):
        state.pc[mask] = GONE

    return step


def call(program, x, i):
    target = program.at[int(x.operands[-1], 16)]

    def step(state, mask):
        state.pc[mask] = target

    return step


def come_back(program, x, i):
    register, _, base = " ".join(x.operands).replace(".reuse", "").partition(" ")
    value, base = registers.reader(register), int(base or "0x0", 16)

    def step(state, mask):
        addresses = value(state.registers)
        for address in np.unique(addresses[mask]):
            state.pc[mask & (addresses == address)] = program.at[int(address) + base]

    return step


def _board(text):
    return int(text.removeprefix("B"))


def part(program, x, i):
    """BSSY: these lanes will meet again."""
    board = _board(x.operands[0])

    def step(state, mask):
        np.copyto(state.meet[board], mask, where=state.registers.whole(mask))

    return step


def meet(program, x, i):
    """BSYNC: wait for the lanes that BSSY saw and that have not gone."""
    board = _board(x.operands[0])

    def step(state, mask):
        held = state.held[board]
        held |= mask
        state.waiting |= mask
        missing = state.meet[board] & ~held & (state.pc != GONE)
        complete = state.registers.whole(mask) & ~state.registers.whole(missing)
        state.waiting &= ~(complete & held)
        held &= ~complete
        state.meet[board] &= ~complete

    return step


def give_up(program, x, i):
    """BREAK: these lanes will not come to the meeting."""
    board = _board(x.operands[-1])

    def step(state, mask):
        state.meet[board] &= ~mask

    return step


def board_move(program, x, i):
    """BMOV: a board to a register or back."""
    to, source = (t.replace(".reuse", "") for t in x.operands)
    places = np.arange(registers.LANES, dtype=np.uint64)

    def step(state, mask):
        if to.startswith("B"):
            words = state.registers.r[registers.row_of(source)][state.registers.first(mask)]
            members = (words[:, None] >> places.astype(np.uint32) & np.uint32(1)).astype(bool)
            np.copyto(state.meet[_board(to)], members.ravel(), where=state.registers.whole(mask))
        else:
            members = state.meet[_board(source)].reshape(-1, registers.LANES).astype(np.uint64)
            words = (members << places).sum(axis=1).astype(np.uint32)
            np.copyto(state.registers.r[registers.row_of(to)], np.repeat(words, registers.LANES), where=mask)

    return step


def syncs(program, x, i):
    """mbarrier: the predicate of a wait comes out true; address and operand go into the trace."""
    where = registers.address(next(t for t in x.operands if "[" in t))
    last = x.operands[-1]
    operand = registers.reader(last) if registers.is_register(last) else None
    out = arithmetic._write_predicate(x.operands[0]) if "PHASECHK" in x.modifiers else None

    def step(state, mask):
        first = state.registers.first(mask)
        addresses = where(state.registers)[first]
        values = np.broadcast_to(operand(state.registers) if operand else np.uint32(0), mask.shape)[first]
        lanes = mask.reshape(-1, registers.LANES).sum(axis=1)
        if out:
            out(state.registers, mask, True)
        kind = "wait" if out else "init" if "EXCH" in x.modifiers else "arrive"
        return [
            {"mbarrier": (kind, int(a), int(v), int(n))} for a, v, n in zip(addresses, values, lanes, strict=True)
        ]

    return step


_MAKERS = {
    "arithmetic": arithmetic_handler, "nothing": nothing, "special": special, "shared": shared, "copy": copy,
    "global": global_memory, "BRA": branch, "EXIT": leave, "CALL": call, "RET": come_back, "BSSY": part, "BSYNC": meet,
    "BREAK": give_up, "BMOV": board_move, "WARPSYNC": nothing, "SYNCS": syncs,
}  # fmt: skip
_JUMPS = {"BRA", "EXIT", "CALL", "RET", "BSYNC"}
INACTIVE = {"active": False}


class State:
    """Where the lanes of a block are."""

    def __init__(self, constants, warps, block):
        self.registers = registers.Registers(constants, warps)
        self.block = block
        self.pc = np.zeros(32 * warps, np.int64)
        self.waiting = np.zeros(32 * warps, bool)
        self.meet = np.zeros((16, 32 * warps), bool)
        self.held = np.zeros((16, 32 * warps), bool)


def trace(program, launch, block=0, most=400_000):
    """Per warp of a block, [(index of an instruction, what is known of its execution or None)] to its end.

    RuntimeError after `most` instructions."""
    warps = launch.threads // 32
    state = State(launch.constants(program.arch), warps, block)
    found = [[] for _ in range(warps)]
    everyone = np.ones(32 * warps, bool)
    together, at = True, 0  # all lanes at one address: the common case, without a look at every lane
    guards, kinds = program.guards, program.kinds
    with np.errstate(all="ignore"):
        for _ in range(most):
            if together:
                lanes = everyone
            else:
                ready = (state.pc != GONE) & ~state.waiting
                if not ready.any():
                    if not state.waiting.any():
                        return found
                    state.waiting[:] = state.held[:] = False  # those they wait for have gone
                    continue
                at = int(state.pc[ready].min())
                lanes = ready & (state.pc == at)
            mask = lanes if guards[at] is None else lanes & guards[at](state.registers)
            jumps = kinds[at] in _JUMPS
            if jumps or not together:
                state.pc[lanes] = at + 1
            known = program.handler(at)(state, mask) if guards[at] is None or mask.any() else None
            _record(found, at, lanes, mask, known, together)
            if jumps or not together:
                first = int(state.pc[0])
                together, at = bool((state.pc == first).all()) and not state.waiting.any(), first
                if together and at == GONE:
                    return found
            else:
                at += 1
    raise RuntimeError(f"a warp passed {most} instructions, last {program.code[at].text}")


def _record(found, at, lanes, mask, known, together):
    if mask is lanes and together:
        if known is None:
            for steps in found:
                steps.append((at, None))
        else:
            for steps, extra in zip(found, known, strict=True):
                steps.append((at, extra))
        return
    came = lanes.reshape(len(found), 32).any(axis=1)
    active = mask.reshape(len(found), 32).any(axis=1)
    for w, steps in enumerate(found):
        if came[w]:
            steps.append((at, (known[w] if known else None) if active[w] else INACTIVE))
