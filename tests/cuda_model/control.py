"""Branches, calls, and lanes that part and meet. Functions of (State, mask of lanes) that move State.pc."""

import numpy as np

from . import registers
from .values import predicate

GONE = 1 << 30  # address of a lane that has left


def branch(program, x, i):
    conditions = [predicate(t) for t in x.operands if registers.is_predicate(t)]
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
