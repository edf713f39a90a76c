"""Runs a block's integers, predicates and branches with a launch's real parameters: what each warp passes.

Of memory only spills are modelled: other loads bring zeros. So a branch on loaded data goes the way of zeros, and
addresses that come from memory are wrong; the kernels of this project have neither. Products of matrices and
conversions of data change nothing. Waits for an mbarrier succeed at once: in simulate.py they take their time.

Lanes that part run apart, those at the lowest address first, and meet again where BSYNC says.
"""

from dataclasses import dataclass, field

import numpy as np

from . import arithmetic, control, memory, registers
from .control import GONE
from .units import class_of
from .values import predicate, predicate_writer, writer

PARAMETERS_AT = {"8": 0x160, "9": 0x210, "10": 0x380, "12": 0x380}  # of constant bank 0, by major version
_SPECIAL = {"SR_LANEID": "lane", "SR_TID.X": "thread", "SR_CTAID.X": "block", "SR_LTMASK": "lower"}


@dataclass(frozen=True)
class Launch:
    """What a grid was launched with."""

    blocks: int
    threads: int
    shared: int
    parameters: bytes
    alignment: int = 8  # of the parameters

    @classmethod
    def of(cls, line):
        return cls(
            line["blocks"], line["threads"], line["shared"], bytes.fromhex(line["parameters"]), line["alignment"]
        )

    def constants(self, arch):
        """Constant bank 0: sizes of block and grid, then the parameters."""
        start = -(-PARAMETERS_AT[arch.split(".")[0]] // self.alignment) * self.alignment
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
        self.guards = [None if x.guard is None else predicate(x.guard) for x in self.code]
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
    if op in ("LDL", "STL"):
        return "local"
    if klass == "global":
        return "global"
    if op in ("SYNCS", "BAR", "USETMAXREG"):
        return op
    if klass in ("branch", "barrier", "cp.async", "wgmma") and op != "ELECT":
        return "nothing"
    return "arithmetic"


# Handlers run an instruction for the lanes of `mask` and return what is known of it per warp, or None.


def arithmetic_handler(program, x, i):
    run = arithmetic.compile_instruction(x)
    return lambda state, mask: run(state.registers, mask)


def nothing(program, x, i):
    return lambda state, mask: None


def grant(program, x, i):
    """setmaxnreg: the registers are there at the first try."""
    outs = [predicate_writer(t) for t in x.operands if registers.is_predicate(t)]

    def step(state, mask):
        for out in outs:
            out(state.registers, mask, True)

    return step


def special(program, x, i):
    write = writer(x.operands[0])
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


_MAKERS = {
    "nothing": nothing, "special": special, "USETMAXREG": grant, "WARPSYNC": nothing, "shared": memory.shared,
    "copy": memory.copy, "global": memory.global_memory, "local": memory.local_memory, "SYNCS": memory.syncs,
    "BAR": memory.named_barrier, "BRA": control.branch, "EXIT": control.leave, "CALL": control.call,
    "RET": control.come_back, "BSSY": control.part, "BSYNC": control.meet, "BREAK": control.give_up,
    "BMOV": control.board_move,
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
        self.local = {}


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
