"""Reading and writing the registers of instructions: functions of (Registers, mask of lanes)."""

import numpy as np

from . import registers as reg
from .registers import is_predicate, predicate_row, reader, row_of

U32, U64 = np.uint32, np.uint64


def lanes_of(s, value, dtype=U32):
    if isinstance(value, np.ndarray) and value.dtype == dtype and value.ndim:
        return value
    return np.full(s.lanes, value, dtype)


def predicate(text):
    row, negated = predicate_row(text)
    return (lambda s: ~s.p[row]) if negated else (lambda s: s.p[row])


def writer(text):
    """A function that writes 32 bits a lane; uniform registers are written whole."""
    row = row_of(text.removesuffix(".reuse"))
    if row in (reg.RZ, reg.URZ):
        return lambda s, mask, value: None
    if row >= reg.UNIFORM:

        def uniform(s, mask, value):
            np.copyto(s.r[row], value, where=s.whole(mask))

        return uniform

    def vector(s, mask, value):
        np.copyto(s.r[row], value, where=mask)

    return vector


def wide_writer(text):
    row = row_of(text)
    low = writer(text)
    if row in (reg.RZ, reg.URZ):
        return lambda s, mask, value: None
    high = writer(f"UR{row - reg.UNIFORM + 1}" if row >= reg.UNIFORM else f"R{row + 1}")

    def write(s, mask, value):
        low(s, mask, value.astype(U32))
        high(s, mask, (value >> U64(32)).astype(U32))

    return write


def predicate_writer(text):
    row, _ = predicate_row(text)
    if row in (reg.PT, reg.UPT):
        return lambda s, mask, value: None
    if row > reg.PT:

        def uniform(s, mask, value):
            np.copyto(s.p[row], value, where=s.whole(mask))

        return uniform

    def vector(s, mask, value):
        np.copyto(s.p[row], value, where=mask)

    return vector


def split(operands):
    """(registers written, predicates written, sources without predicates, predicates read)."""
    written, rest = operands[0], list(operands[1:])
    out = []
    while rest and is_predicate(rest[0]) and not rest[0].startswith("!"):
        out.append(predicate_writer(rest.pop(0)))
    predicates = []
    while rest and is_predicate(rest[-1]):
        predicates.insert(0, predicate(rest.pop()))
    return written, out, rest, predicates


def addend(text):
    """64-bit reader of what an addition takes of an operand, such that the carry comes out of bit 32."""
    plain = reader(text.lstrip("-"))
    if text.startswith("-"):
        return lambda s: (~np.asarray(plain(s), U32)).astype(U64) + U64(1)
    value = reader(text)
    return lambda s: np.asarray(value(s)).astype(U64)
