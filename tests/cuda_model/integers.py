"""Integer instructions: functions of (Registers, mask of lanes), exact."""

import numpy as np

from .registers import is_predicate, reader
from .values import U32, U64, addend, lanes_of, predicate, predicate_writer, split, wide_writer, writer


def add(x, operands):
    written, carries, sources, taken = split(operands)
    write, terms = writer(written), [addend(t) for t in sources]
    extended = "X" in x.modifiers

    def run(s, mask):
        total = sum((t(s) for t in terms), np.zeros(s.lanes, U64))
        if extended:
            total = sum((p(s).astype(U64) for p in taken), total)
        write(s, mask, total.astype(U32))
        for i, carry in enumerate(carries):
            carry(s, mask, (total >> U64(32)) > i)

    return run


def multiply_add(x, operands):
    written, carries, sources, taken = split(operands)
    signed = not any(m.startswith("U32") for m in x.modifiers)
    wide, high = "WIDE" in x.modifiers, "HI" in x.modifiers
    a, b = reader(sources[0]), reader(sources[1])
    third = sources[2] if len(sources) > 2 else "RZ"
    long = wide or high
    c = reader(third, wide=True) if long and not third.lstrip("-~").startswith("0x") else addend(third)
    write = wide_writer(written) if wide else writer(written)

    def widen(value):
        value = np.asarray(value, U32)
        return value.view(np.int32).astype(np.int64).view(U64) if signed else value.astype(U64)

    def run(s, mask):
        with np.errstate(over="ignore"):
            product = widen(a(s)) * widen(b(s))
            addend = np.asarray(c(s), U64)
            total = lanes_of(s, product, U64) + addend
            if "X" in x.modifiers:
                total = total + taken[-1](s).astype(U64)
        if carries:
            carry = total < addend if long else (product & U64(0xFFFFFFFF)) + addend >= U64(1 << 32)
            carries[0](s, mask, carry)
        if wide:
            write(s, mask, total)
        else:
            write(s, mask, (total >> U64(32) if high else total).astype(U32))

    return run


def shift_left_add(x, operands):
    written, carries, sources, taken = split(operands)
    write, a, b = writer(written), sources[0], sources[1]
    high, signed = "HI" in x.modifiers, "SX32" in x.modifiers
    low_word, add_word = addend(a), addend(b)
    top = reader(sources[2]) if high and not signed and len(sources) > 3 else None
    shift = U64(int(sources[-1], 16))
    extended = "X" in x.modifiers

    def run(s, mask):
        value = low_word(s)
        if signed:
            value = value.astype(U32).view(np.int32).astype(np.int64).view(U64)
        elif top is not None:
            value = (value & U64(0xFFFFFFFF)) | np.asarray(top(s)).astype(U64) << U64(32)
        value = lanes_of(s, value, U64)
        part = (value << shift) >> U64(32) if high else value << shift
        total = (part & U64(0xFFFFFFFF)) + add_word(s)
        if extended:
            total = total + taken[-1](s).astype(U64)
        write(s, mask, lanes_of(s, total.astype(U32)))
        for carry in carries:
            carry(s, mask, total >> U64(32) > 0)

    return run


def shift(x, operands):
    """SHF: of the pair (third operand, first operand)."""
    write, low, amount, top = writer(operands[0]), *(reader(t) for t in operands[1:4])
    right, high = "R" in x.modifiers, "HI" in x.modifiers
    kind = next((m for m in x.modifiers if m[0] in "SU" and m[1:].isdigit()), "U32")
    wraps = "W" in x.modifiers

    def run(s, mask):
        count = np.asarray(amount(s), U32)
        count = count & U32(31 if kind.endswith("32") else 63) if wraps else np.minimum(count, U32(63))
        lower, upper = (np.asarray(f(s)).astype(U64) for f in (low, top))
        if kind.endswith("32") and right and high:  # of the upper word alone
            word = np.asarray(top(s), U32)
            if kind[0] == "S":
                result = word.view(np.int32) >> np.minimum(count, U32(31)).astype(np.int32)
                result = result.astype(np.int32).view(U32)
            else:
                result = (word.astype(U64) >> count.astype(U64)).astype(U32)
        else:
            pair = lanes_of(s, upper << U64(32) | lower, U64)
            if right:
                moved = (
                    (pair.view(np.int64) >> count.astype(np.int64)).view(U64)
                    if kind[0] == "S"
                    else pair >> count.astype(U64)
                )
            else:
                moved = pair << count.astype(U64)
            result = (moved >> U64(32) if high else moved).astype(U32)
        write(s, mask, lanes_of(s, result))

    return run


def logic(x, operands):
    rest = list(operands)
    out = []
    if x.opcode.endswith("PLOP3"):
        wp, wp2 = predicate_writer(rest[0]), predicate_writer(rest[1])
        inputs = [predicate(t) for t in rest[2:5]]
        tables = [int(t, 16) for t in rest[5:7]]

        def run(s, mask):
            index = sum(p(s).astype(int) << k for p, k in zip(inputs, (2, 1, 0), strict=True))
            for w, table in zip((wp, wp2), tables, strict=False):
                w(s, mask, (table >> index & 1).astype(bool))

        return run
    if is_predicate(rest[0]):
        out.append(predicate_writer(rest.pop(0)))
    write = writer(rest[0])
    a, b, c = (reader(t) for t in rest[1:4])
    table = int(rest[4], 16)

    def run(s, mask):
        A, B, C = (np.asarray(f(s), U32) for f in (a, b, c))
        result = np.zeros(s.lanes, U32)
        for minterm in range(8):
            if table >> minterm & 1:
                result |= (A if minterm & 4 else ~A) & (B if minterm & 2 else ~B) & (C if minterm & 1 else ~C)
        write(s, mask, result)
        for w in out:
            w(s, mask, result != 0)

    return run


def permute(x, operands):
    write, a, selector, b = writer(operands[0]), *(reader(t) for t in operands[1:4])

    def run(s, mask):
        low, high = (np.asarray(f(s)).astype(U64) for f in (a, b))
        pool, sel = lanes_of(s, low | high << U64(32), U64), lanes_of(s, selector(s))
        result = np.zeros(s.lanes, U32)
        for i in range(4):
            nibble = (sel >> U32(4 * i)) & U32(15)
            byte = (pool >> ((nibble & U32(7)).astype(U64) * U64(8))).astype(U32) & U32(255)
            sign = np.where(byte & U32(128), U32(255), U32(0))
            result |= np.where(nibble & U32(8), sign, byte) << U32(8 * i)
        write(s, mask, result)

    return run


def extreme(x, operands):
    """Minimum where the last predicate holds, else maximum."""
    write, floats = writer(operands[0]), x.opcode == "FMNMX"
    sources = operands[1:-1]
    if x.opcode == "VIADDMNMX":
        first, second = addend(sources[0]), addend(sources[1])
        values = [lambda s: (first(s) + second(s)).astype(U32), reader(sources[2])]
    else:
        values = [reader(t, floats) for t in sources]
    p = predicate(operands[-1])
    dtype = np.float32 if floats else U32 if "U32" in x.modifiers else np.int32

    def run(s, mask):
        a, b = (np.asarray(f(s), U32).view(dtype) for f in values)
        lesser, greater = (np.fmin, np.fmax) if floats else (np.minimum, np.maximum)
        result = np.where(p(s), lesser(a, b), greater(a, b)).astype(dtype)
        write(s, mask, result.view(U32))

    return run


def bits(x, operands):
    write, value = writer(operands[0]), reader(operands[-1])
    invert = "SH" in x.modifiers

    def count(v):
        if x.opcode.endswith("POPC"):
            return v.bit_count()
        if x.opcode.endswith("BREV"):
            return int(f"{v:032b}"[::-1], 2)
        top = v.bit_length() - 1  # FLO
        return 0xFFFFFFFF if top < 0 else (31 - top if invert else top)

    def run(s, mask):
        write(s, mask, np.array([count(int(v)) for v in lanes_of(s, value(s))], U32))

    return run


def absolute(x, operands):
    write, value = writer(operands[0]), reader(operands[1])
    return lambda s, mask: write(s, mask, np.abs(lanes_of(s, value(s)).view(np.int32)).view(U32))
