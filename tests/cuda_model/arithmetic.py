"""What instructions compute: integers, predicates and floats of a lane exactly enough to know addresses and branches.

`compile_instruction` makes a function of Registers and the lanes' mask out of an instruction. What it does not know
raises NotImplementedError, unless it writes nothing that an address or a branch could come from (matrix products and
conversions of data): those are in VALUES_UNKNOWN, and leave their registers as they are.
"""

import operator

import numpy as np

from . import registers as reg
from .registers import is_predicate, predicate_row, reader, row_of

VALUES_UNKNOWN = {
    "HMMA", "HGMMA", "IMMA", "MOVM", "DADD", "DMUL", "DFMA", "DSETP", "HADD2", "HMUL2", "HSETP2", "HMNMX2", "F2FP", "FCHK",
    "FRND", "FSWZADD", "MUFU64",
}  # fmt: skip
U32, U64 = np.uint32, np.uint64
_COMPARE = {"LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "EQ": operator.eq, "NE": operator.ne}
_COMBINE = {"AND": operator.and_, "OR": operator.or_, "XOR": operator.xor}


def _lanes(s, value, dtype=U32):
    return np.broadcast_to(np.asarray(value, dtype), (s.lanes,))


def _predicate(text):
    row, negated = predicate_row(text)
    return (lambda s: ~s.p[row]) if negated else (lambda s: s.p[row])


def _write(text):
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


def _write_wide(text):
    row = row_of(text)
    low = _write(text)
    if row in (reg.RZ, reg.URZ):
        return lambda s, mask, value: None
    high = _write(f"UR{row - reg.UNIFORM + 1}" if row >= reg.UNIFORM else f"R{row + 1}")

    def write(s, mask, value):
        low(s, mask, value.astype(U32))
        high(s, mask, (value >> U64(32)).astype(U32))

    return write


def _write_predicate(text):
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


def _split(operands):
    """(registers written, predicates written, sources without predicates, predicates read)."""
    written, rest = operands[0], list(operands[1:])
    out = []
    while rest and is_predicate(rest[0]) and not rest[0].startswith("!"):
        out.append(_write_predicate(rest.pop(0)))
    predicates = []
    while rest and is_predicate(rest[-1]):
        predicates.insert(0, _predicate(rest.pop()))
    return written, out, rest, predicates


def _addend(text):
    """64-bit reader of what an addition takes of an operand, such that the carry comes out of bit 32."""
    plain = reader(text.lstrip("-"))
    if text.startswith("-"):
        return lambda s: (~np.asarray(plain(s), U32)).astype(U64) + U64(1)
    value = reader(text)
    return lambda s: np.asarray(value(s)).astype(U64)


def add(x, operands):
    written, carries, sources, taken = _split(operands)
    write, terms = _write(written), [_addend(t) for t in sources]
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
    written, carries, sources, taken = _split(operands)
    signed = not any(m.startswith("U32") for m in x.modifiers)
    wide, high = "WIDE" in x.modifiers, "HI" in x.modifiers
    a, b = reader(sources[0]), reader(sources[1])
    third = sources[2] if len(sources) > 2 else "RZ"
    long = wide or high
    if third.lstrip("-~")[:2] in ("0x",) or not long:
        c = _addend(third)
    else:
        c = reader(third, wide=True)
    write = _write_wide(written) if wide else _write(written)

    def widen(value):
        value = np.asarray(value, U32)
        return value.view(np.int32).astype(np.int64).view(U64) if signed else value.astype(U64)

    def run(s, mask):
        with np.errstate(over="ignore"):
            product = widen(a(s)) * widen(b(s))
            addend = np.asarray(c(s), U64)
            total = _lanes(s, product, U64) + addend
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
    written, carries, sources, taken = _split(operands)
    write, a, b = _write(written), sources[0], sources[1]
    high, signed = "HI" in x.modifiers, "SX32" in x.modifiers
    low_word, add_word = _addend(a), _addend(b)
    top = reader(sources[2]) if high and not signed and len(sources) > 3 else None
    shift = U64(int(sources[-1], 16))
    extended = "X" in x.modifiers

    def run(s, mask):
        value = low_word(s)
        if signed:
            value = value.astype(U32).view(np.int32).astype(np.int64).view(U64)
        elif top is not None:
            value = (value & U64(0xFFFFFFFF)) | np.asarray(top(s)).astype(U64) << U64(32)
        value = _lanes(s, value, U64)
        part = (value << shift) >> U64(32) if high else value << shift
        total = (part & U64(0xFFFFFFFF)) + add_word(s)
        if extended:
            total = total + taken[-1](s).astype(U64)
        write(s, mask, _lanes(s, total.astype(U32)))
        for carry in carries:
            carry(s, mask, total >> U64(32) > 0)

    return run


def shift(x, operands):
    """SHF: of the pair (third operand, first operand)."""
    write, low, amount, top = _write(operands[0]), *(reader(t) for t in operands[1:4])
    right, high = "R" in x.modifiers, "HI" in x.modifiers
    kind = next((m for m in x.modifiers if m[0] in "SU" and m[1:].isdigit()), "U32")
    wraps = "W" in x.modifiers

    def run(s, mask):
        count = np.asarray(amount(s), U32)
        count = count & U32(31 if kind.endswith("32") else 63) if wraps else np.minimum(count, U32(63))
        l, t = (np.asarray(f(s)).astype(U64) for f in (low, top))
        if kind.endswith("32") and right and high:  # of the upper word alone
            word = np.asarray(top(s), U32)
            if kind[0] == "S":
                result = word.view(np.int32) >> np.minimum(count, U32(31)).astype(np.int32)
                result = result.astype(np.int32).view(U32)
            else:
                result = (word.astype(U64) >> count.astype(U64)).astype(U32)
        else:
            pair = _lanes(s, t << U64(32) | l, U64)
            if right:
                moved = (pair.view(np.int64) >> count.astype(np.int64)).view(U64) if kind[0] == "S" else pair >> count.astype(U64)
            else:
                moved = pair << count.astype(U64)
            result = (moved >> U64(32) if high else moved).astype(U32)
        write(s, mask, _lanes(s, result))

    return run


def logic(x, operands):
    rest = list(operands)
    out = []
    if x.opcode == "PLOP3":
        wp, wp2 = _write_predicate(rest[0]), _write_predicate(rest[1])
        inputs = [_predicate(t) for t in rest[2:5]]
        tables = [int(t, 16) for t in rest[5:7]]

        def run(s, mask):
            index = sum(p(s).astype(int) << k for p, k in zip(inputs, (2, 1, 0), strict=True))
            for w, table in zip((wp, wp2), tables, strict=False):
                w(s, mask, (table >> index & 1).astype(bool))

        return run
    if is_predicate(rest[0]):
        out.append(_write_predicate(rest.pop(0)))
    write = _write(rest[0])
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


def compare(x, operands):
    """ISETP, FSETP: two predicates from a comparison and a third predicate, .EX with the comparison of lower words."""
    first, second = _write_predicate(operands[0]), _write_predicate(operands[1])
    floats = x.opcode == "FSETP"
    a, b = reader(operands[2], floats), reader(operands[3], floats)
    with_ = _predicate(operands[4])
    lower = _predicate(operands[5]) if len(operands) > 5 else None
    name = x.modifiers[0]
    combine = next(_COMBINE[m] for m in x.modifiers if m in _COMBINE)
    unordered = floats and name.endswith("U") and name[:-1] in _COMPARE
    test = _COMPARE.get(name.removesuffix("U") if unordered else name)
    signed = "U32" not in x.modifiers

    def run(s, mask):
        A, B = np.asarray(a(s), U32), np.asarray(b(s), U32)
        if floats:
            A, B = A.view(np.float32), B.view(np.float32)
            nan = np.isnan(A) | np.isnan(B)
            if test is None:
                result = {"NAN": nan, "NUM": ~nan, "T": ~nan | nan, "F": nan & ~nan}[name]
            else:
                result = test(A, B) | nan if unordered else test(A, B) & ~nan
        else:
            if signed:
                A, B = A.view(np.int32), B.view(np.int32)
            if lower is None:
                result = test(A, B)
            elif name == "NE":
                result = (A != B) | lower(s)
            else:
                strict = _COMPARE[{"LE": "LT", "GE": "GT"}.get(name, name)]
                result = (strict(A, B) if name != "EQ" else False) | ((A == B) & lower(s))
        result = _lanes(s, result, bool)
        p = with_(s)
        first(s, mask, combine(result, p))
        second(s, mask, combine(~result, p))

    return run


def select(x, operands):
    write, floats = _write(operands[0]), x.opcode == "FSEL"
    a, b, p = reader(operands[1], floats), reader(operands[2], floats), _predicate(operands[3])

    def run(s, mask):
        write(s, mask, np.where(p(s), a(s), b(s)).astype(U32))

    return run


def extreme(x, operands):
    """Minimum where the last predicate holds, else maximum."""
    write, floats = _write(operands[0]), x.opcode == "FMNMX"
    sources = operands[1:-1]
    if x.opcode == "VIADDMNMX":
        first, second = _addend(sources[0]), _addend(sources[1])
        values = [lambda s: (first(s) + second(s)).astype(U32), reader(sources[2])]
    else:
        values = [reader(t, floats) for t in sources]
    p = _predicate(operands[-1])
    dtype = np.float32 if floats else U32 if "U32" in x.modifiers else np.int32

    def run(s, mask):
        a, b = (np.asarray(f(s), U32).view(dtype) for f in values)
        lesser, greater = (np.fmin, np.fmax) if floats else (np.minimum, np.maximum)
        result = np.where(p(s), lesser(a, b), greater(a, b)).astype(dtype)
        write(s, mask, result.view(U32))

    return run


def permute(x, operands):
    write, a, selector, b = _write(operands[0]), *(reader(t) for t in operands[1:4])

    def run(s, mask):
        low, high = (np.asarray(f(s)).astype(U64) for f in (a, b))
        pool, sel = _lanes(s, low | high << U64(32), U64), _lanes(s, selector(s))
        result = np.zeros(s.lanes, U32)
        for i in range(4):
            nibble = (sel >> U32(4 * i)) & U32(15)
            byte = (pool >> ((nibble & U32(7)).astype(U64) * U64(8))).astype(U32) & U32(255)
            sign = np.where(byte & U32(128), U32(255), U32(0))
            result |= np.where(nibble & U32(8), sign, byte) << U32(8 * i)
        write(s, mask, result)

    return run


def float_arithmetic(x, operands):
    write, values = _write(operands[0]), [reader(t, True) for t in operands[1:] if not is_predicate(t)]
    kind = x.opcode

    def run(s, mask):
        v = [np.asarray(f(s), U32).view(np.float32) for f in values]
        with np.errstate(all="ignore"):
            result = v[0] + v[1] if kind == "FADD" else v[0] * v[1]
            if kind == "FFMA":
                result = result + v[2]
        write(s, mask, _lanes(s, result, np.float32).view(U32))

    return run


def special(x, operands):
    write, value = _write(operands[0]), reader(operands[1], True)
    kind = x.modifiers[0]
    functions = {
        "RCP": lambda v: 1 / v, "EX2": np.exp2, "LG2": np.log2, "RSQ": lambda v: 1 / np.sqrt(v), "SQRT": np.sqrt,
        "SIN": np.sin, "COS": np.cos, "TANH": np.tanh,
    }  # fmt: skip
    if kind not in functions:
        return lambda s, mask: None

    def run(s, mask):
        with np.errstate(all="ignore"):
            result = functions[kind](np.asarray(value(s), U32).view(np.float32)).astype(np.float32)
        write(s, mask, _lanes(s, result, np.float32).view(U32))

    return run


def to_float(x, operands):
    wide = any(m in ("U64", "S64") for m in x.modifiers)
    write, value = _write(operands[0]), reader(operands[1], wide=wide)
    unsigned = any(m in ("U32", "U64", "U8", "U16") for m in x.modifiers)

    def run(s, mask):
        v = np.asarray(value(s))
        if not unsigned:
            v = v.view(np.int64 if wide else np.int32)
        exact = v.astype(np.float64)
        result = exact.astype(np.float32)
        if "RP" in x.modifiers:
            result = np.where(result.astype(np.float64) < exact, np.nextafter(result, np.float32(np.inf)), result)
        write(s, mask, _lanes(s, result.astype(np.float32), np.float32).view(U32))

    return run


def to_integer(x, operands):
    wide = any(m in ("U64", "S64") for m in x.modifiers)
    unsigned = any(m in ("U32", "U64") for m in x.modifiers)
    write, value = (_write_wide if wide else _write)(operands[0]), reader(operands[1], True)
    dtype = (np.uint64 if unsigned else np.int64) if wide else (np.uint32 if unsigned else np.int32)
    limits = np.iinfo(dtype)

    def run(s, mask):
        v = np.nan_to_num(np.asarray(value(s), U32).view(np.float32).astype(np.float64), nan=0, posinf=2.0**70, neginf=-(2.0**70))
        whole = [min(max(int(f), limits.min), limits.max) for f in _lanes(s, np.trunc(v), np.float64)]
        result = np.array(whole, dtype)
        write(s, mask, result.view(U64 if wide else U32))

    return run


def bits(x, operands):
    write, value = _write(operands[0]), reader(operands[-1])
    invert = "SH" in x.modifiers

    def count(v):
        if x.opcode == "POPC":
            return v.bit_count()
        if x.opcode == "BREV":
            return int(f"{v:032b}"[::-1], 2)
        top = v.bit_length() - 1  # FLO
        return 0xFFFFFFFF if top < 0 else (31 - top if invert else top)

    def run(s, mask):
        write(s, mask, np.array([count(int(v)) for v in _lanes(s, value(s))], U32))

    return run


def move(x, operands):
    if x.opcode == "CS2R":
        write = _write_wide(operands[0]) if "32" not in x.modifiers else _write(operands[0])
        return lambda s, mask: write(s, mask, np.zeros(s.lanes, U64))
    write, value = _write(operands[0]), reader(operands[1])
    return lambda s, mask: write(s, mask, _lanes(s, value(s)))


def half_constant(x, operands):
    """HFMA2 that adds two constants to nothing: how a constant is loaded on the float units."""
    if operands[1].lstrip("-") != "RZ" or len(operands) < 5:
        return lambda s, mask: None
    high, low = (reg.half_bits(float(t)) for t in operands[3:5])
    write, value = _write(operands[0]), U32(high << 16 | low)
    return lambda s, mask: write(s, mask, _lanes(s, value))


def pack_predicates(x, operands):
    if x.opcode == "P2R":
        write, value, which = _write(operands[0]), reader(operands[2]), reader(operands[3])

        def run(s, mask):
            packed = sum(s.p[i].astype(U32) << U32(i) for i in range(7))
            m = np.asarray(which(s), U32)
            write(s, mask, (packed & m) | (np.asarray(value(s), U32) & ~m))

        return run
    value, which = reader(operands[1]), reader(operands[2])

    def unpack(s, mask):
        v, m = _lanes(s, value(s)), _lanes(s, which(s))
        for i in range(7):
            np.copyto(s.p[i], (v >> U32(i) & U32(1)).astype(bool), where=mask & (m >> U32(i) & U32(1)).astype(bool))

    return unpack


def vote(x, operands):
    write, condition = _write(operands[0]) if not is_predicate(operands[0]) else None, _predicate(operands[-1])
    outs = [_write_predicate(t) for t in operands[:-1] if is_predicate(t)]
    places = np.arange(reg.LANES, dtype=U64)

    def run(s, mask):
        shape = (s.warps, reg.LANES)
        votes, members = (condition(s) & mask).reshape(shape), mask.reshape(shape)
        if write:
            words = (votes.astype(U64) << places).sum(axis=1).astype(U32)
            write(s, mask, np.repeat(words, reg.LANES))
        if "ALL" in x.modifiers:
            result = (votes == members).all(axis=1)
        else:
            result = votes.any(axis=1) if "ANY" in x.modifiers else np.ones(s.warps, bool)
        for out in outs:
            out(s, mask, np.repeat(result, reg.LANES))

    return run


def shuffle(x, operands):
    rest = list(operands)
    out = _write_predicate(rest.pop(0)) if is_predicate(rest[0]) else None
    write, value, other = _write(rest[0]), reader(rest[1]), reader(rest[2])
    kind = x.modifiers[0]

    def run(s, mask):
        lanes = np.arange(s.lanes)
        v, b, lane = _lanes(s, value(s)), _lanes(s, other(s)).astype(int), lanes % reg.LANES
        source = {"BFLY": lane ^ b, "IDX": b, "UP": lane - b, "DOWN": lane + b}[kind]
        inside = (source >= 0) & (source < reg.LANES)
        write(s, mask, v[np.where(inside, lanes - lane + source, lanes)])
        if out:
            out(s, mask, inside)

    return run


def to_uniform(x, operands):
    rest = [t for t in operands if not is_predicate(t)]
    write, value = _write(rest[0]), reader(rest[1])

    def run(s, mask):
        write(s, mask, np.repeat(_lanes(s, value(s))[s.first(mask)], reg.LANES))

    return run


def constant(x, operands):
    """LDC, ULDC, and the moves that read constant memory bytewise."""
    size = next((m for m in x.modifiers if m in ("64", "U8", "S8", "U16", "S16", "128")), "32")
    wide = size == "64"
    if size in ("U8", "U16", "S8", "S16"):
        match = reg.CONSTANT.fullmatch(operands[1])
        start, width = int(match[4] or match[3] or "0x0", 16), int(size[1:]) // 8
        index = reader(match[2]) if match[2] else lambda s: U32(0)
        write = _write(operands[0])

        def narrow(s, mask):
            at = (_lanes(s, index(s)) + U32(start)) % U32(reg.CONSTANT_BYTES - 1)
            result = s.bytes[at].astype(U32)
            if width == 2:
                result |= s.bytes[at + 1].astype(U32) << U32(8)
            write(s, mask, result)

        return narrow
    value = reader(operands[1], wide=wide)
    write = _write_wide(operands[0]) if wide else _write(operands[0])
    return lambda s, mask: write(s, mask, _lanes(s, value(s), U64 if wide else U32))


def elect(x, operands):
    outs = [_write_predicate(t) for t in operands if is_predicate(t)][:1]

    def run(s, mask):
        first = np.zeros(s.lanes, bool)
        first[s.first(mask)] = True
        for out in outs:
            out(s, mask, first)

    return run


HANDLERS = {
    "IADD3": add, "VIADD": add, "IADD": add, "IMAD": multiply_add, "LEA": shift_left_add, "SHF": shift, "LOP3": logic, "PLOP3": logic,
    "ISETP": compare, "FSETP": compare, "SEL": select, "FSEL": select, "IMNMX": extreme, "VIMNMX": extreme,
    "VIADDMNMX": extreme, "FMNMX": extreme, "PRMT": permute, "FADD": float_arithmetic, "FMUL": float_arithmetic,
    "FFMA": float_arithmetic, "MUFU": special, "I2F": to_float, "I2FP": to_float, "F2I": to_integer, "POPC": bits, "FLO": bits,
    "BREV": bits, "MOV": move, "CS2R": move, "HFMA2": half_constant, "P2R": pack_predicates, "R2P": pack_predicates,
    "VOTE": vote, "SHFL": shuffle, "R2UR": to_uniform, "LDC": constant, "LDCU": constant, "ELECT": elect,
}  # fmt: skip


def absolute(x, operands):
    write, value = _write(operands[0]), reader(operands[1])
    return lambda s, mask: write(s, mask, np.abs(_lanes(s, value(s)).view(np.int32)).view(U32))


HANDLERS["IABS"] = absolute


def compile_instruction(x):
    """A function of (Registers, mask)."""
    op = x.opcode
    if op in VALUES_UNKNOWN or op == "F2F":
        return lambda s, mask: None
    if op == "IMAD" and x.modifiers[:1] in (("MOV",), ("IADD",), ("SHL",)):
        pass
    handler = HANDLERS.get(op)
    if handler is None and op.startswith("U"):
        handler = HANDLERS.get(op[1:])
    if handler is None:
        raise NotImplementedError(x.text)
    return handler(x, tuple(t.replace(".reuse", "") for t in x.operands))
