"""What instructions compute: integers, predicates and floats of a lane exactly enough to know addresses and branches.

`compile_instruction` makes a function of Registers and the lanes' mask out of an instruction. What it does not know
raises NotImplementedError, unless it writes nothing that an address or a branch could come from (matrix products and
conversions of data): those are in VALUES_UNKNOWN, and leave their registers as they are.
"""

import operator

import numpy as np

from . import registers as reg
from .integers import absolute, add, bits, extreme, logic, multiply_add, permute, shift, shift_left_add
from .registers import is_predicate, reader
from .values import U32, U64, lanes_of, predicate, predicate_writer, wide_writer, writer

VALUES_UNKNOWN = {
    "HMMA", "HGMMA", "IMMA", "MOVM", "DADD", "DMUL", "DFMA", "DSETP", "HADD2", "HMUL2", "HSETP2", "HMNMX2", "F2F",
    "F2FP", "FCHK", "FRND",
}  # fmt: skip
_COMPARE = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
_COMBINE = {"AND": operator.and_, "OR": operator.or_, "XOR": operator.xor}


def compare(x, operands):
    """ISETP, FSETP: two predicates from a comparison and a third predicate, .EX with the comparison of lower words."""
    first, second = predicate_writer(operands[0]), predicate_writer(operands[1])
    floats = x.opcode == "FSETP"
    a, b = reader(operands[2], floats), reader(operands[3], floats)
    with_ = predicate(operands[4])
    lower = predicate(operands[5]) if len(operands) > 5 else None
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
        result = lanes_of(s, result, bool)
        p = with_(s)
        first(s, mask, combine(result, p))
        second(s, mask, combine(~result, p))

    return run


def select(x, operands):
    write, floats = writer(operands[0]), x.opcode == "FSEL"
    a, b, p = reader(operands[1], floats), reader(operands[2], floats), predicate(operands[3])

    def run(s, mask):
        write(s, mask, np.where(p(s), a(s), b(s)).astype(U32))

    return run


def float_arithmetic(x, operands):
    write, values = writer(operands[0]), [reader(t, True) for t in operands[1:] if not is_predicate(t)]
    kind = x.opcode

    def run(s, mask):
        v = [np.asarray(f(s), U32).view(np.float32) for f in values]
        with np.errstate(all="ignore"):
            result = v[0] + v[1] if kind == "FADD" else v[0] * v[1]
            if kind == "FFMA":
                result = result + v[2]
        write(s, mask, lanes_of(s, result, np.float32).view(U32))

    return run


def special(x, operands):
    write, value = writer(operands[0]), reader(operands[1], True)
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
        write(s, mask, lanes_of(s, result, np.float32).view(U32))

    return run


def to_float(x, operands):
    wide = any(m in ("U64", "S64") for m in x.modifiers)
    write, value = writer(operands[0]), reader(operands[1], wide=wide)
    unsigned = any(m in ("U32", "U64", "U8", "U16") for m in x.modifiers)

    def run(s, mask):
        v = np.asarray(value(s))
        if not unsigned:
            v = v.view(np.int64 if wide else np.int32)
        exact = v.astype(np.float64)
        result = exact.astype(np.float32)
        if "RP" in x.modifiers:
            result = np.where(result.astype(np.float64) < exact, np.nextafter(result, np.float32(np.inf)), result)
        write(s, mask, lanes_of(s, result.astype(np.float32), np.float32).view(U32))

    return run


def to_integer(x, operands):
    wide = any(m in ("U64", "S64") for m in x.modifiers)
    unsigned = any(m in ("U32", "U64") for m in x.modifiers)
    write, value = (wide_writer if wide else writer)(operands[0]), reader(operands[1], True)
    dtype = (np.uint64 if unsigned else np.int64) if wide else (np.uint32 if unsigned else np.int32)
    limits = np.iinfo(dtype)

    def run(s, mask):
        v = np.nan_to_num(
            np.asarray(value(s), U32).view(np.float32).astype(np.float64), nan=0, posinf=2.0**70, neginf=-(2.0**70)
        )
        whole = [min(max(int(f), limits.min), limits.max) for f in lanes_of(s, np.trunc(v), np.float64)]
        result = np.array(whole, dtype)
        write(s, mask, result.view(U64 if wide else U32))

    return run


def move(x, operands):
    if x.opcode == "CS2R":
        write = wide_writer(operands[0]) if "32" not in x.modifiers else writer(operands[0])
        return lambda s, mask: write(s, mask, np.zeros(s.lanes, U64))
    write, value = writer(operands[0]), reader(operands[1])
    return lambda s, mask: write(s, mask, lanes_of(s, value(s)))


def half_constant(x, operands):
    """HFMA2 that adds two constants to nothing: how a constant is loaded on the float units."""
    if operands[1].lstrip("-") != "RZ" or len(operands) < 5:
        return lambda s, mask: None
    high, low = (reg.half_bits(float(t)) for t in operands[3:5])
    write, value = writer(operands[0]), U32(high << 16 | low)
    return lambda s, mask: write(s, mask, lanes_of(s, value))


def pack_predicates(x, operands):
    if x.opcode == "P2R":
        write, value, which = writer(operands[0]), reader(operands[2]), reader(operands[3])

        def run(s, mask):
            packed = sum(s.p[i].astype(U32) << U32(i) for i in range(7))
            m = np.asarray(which(s), U32)
            write(s, mask, (packed & m) | (np.asarray(value(s), U32) & ~m))

        return run
    value, which = reader(operands[1]), reader(operands[2])

    def unpack(s, mask):
        v, m = lanes_of(s, value(s)), lanes_of(s, which(s))
        for i in range(7):
            np.copyto(s.p[i], (v >> U32(i) & U32(1)).astype(bool), where=mask & (m >> U32(i) & U32(1)).astype(bool))

    return unpack


def vote(x, operands):
    write, condition = writer(operands[0]) if not is_predicate(operands[0]) else None, predicate(operands[-1])
    outs = [predicate_writer(t) for t in operands[:-1] if is_predicate(t)]
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
    out = predicate_writer(rest.pop(0)) if is_predicate(rest[0]) else None
    write, value, other = writer(rest[0]), reader(rest[1]), reader(rest[2])
    kind = x.modifiers[0]

    def run(s, mask):
        lanes = np.arange(s.lanes)
        v, b, lane = lanes_of(s, value(s)), lanes_of(s, other(s)).astype(int), lanes % reg.LANES
        source = {"BFLY": lane ^ b, "IDX": b, "UP": lane - b, "DOWN": lane + b}[kind]
        inside = (source >= 0) & (source < reg.LANES)
        write(s, mask, v[np.where(inside, lanes - lane + source, lanes)])
        if out:
            out(s, mask, inside)

    return run


def to_uniform(x, operands):
    rest = [t for t in operands if not is_predicate(t)]
    write, value = writer(rest[0]), reader(rest[1])

    def run(s, mask):
        write(s, mask, np.repeat(lanes_of(s, value(s))[s.first(mask)], reg.LANES))

    return run


def constant(x, operands):
    """LDC, ULDC, and the moves that read constant memory bytewise."""
    size = next((m for m in x.modifiers if m in ("64", "U8", "S8", "U16", "S16", "128")), "32")
    wide = size == "64"
    if size in ("U8", "U16", "S8", "S16"):
        match = reg.CONSTANT.fullmatch(operands[1])
        start, width = int(match[4] or match[3] or "0x0", 16), int(size[1:]) // 8
        index = reader(match[2]) if match[2] else lambda s: U32(0)
        write = writer(operands[0])

        def narrow(s, mask):
            at = (lanes_of(s, index(s)) + U32(start)) % U32(reg.CONSTANT_BYTES - 1)
            result = s.bytes[at].astype(U32)
            if width == 2:
                result |= s.bytes[at + 1].astype(U32) << U32(8)
            write(s, mask, result)

        return narrow
    value = reader(operands[1], wide=wide)
    write = wide_writer(operands[0]) if wide else writer(operands[0])
    return lambda s, mask: write(s, mask, lanes_of(s, value(s), U64 if wide else U32))


def elect(x, operands):
    outs = [predicate_writer(t) for t in operands if is_predicate(t)][:1]

    def run(s, mask):
        first = np.zeros(s.lanes, bool)
        first[s.first(mask)] = True
        for out in outs:
            out(s, mask, first)

    return run


HANDLERS = {
    "IABS": absolute, "IADD3": add, "VIADD": add, "IADD": add, "IMAD": multiply_add,
    "LEA": shift_left_add, "SHF": shift, "LOP3": logic, "PLOP3": logic, "ISETP": compare, "FSETP": compare,
    "SEL": select, "FSEL": select, "IMNMX": extreme, "VIMNMX": extreme, "VIADDMNMX": extreme, "FMNMX": extreme,
    "PRMT": permute, "FADD": float_arithmetic, "FMUL": float_arithmetic, "FFMA": float_arithmetic, "MUFU": special,
    "I2F": to_float, "I2FP": to_float, "F2I": to_integer, "POPC": bits, "FLO": bits, "BREV": bits, "MOV": move,
    "CS2R": move, "HFMA2": half_constant, "P2R": pack_predicates, "R2P": pack_predicates, "VOTE": vote, "VOTEU": vote,
    "SHFL": shuffle, "R2UR": to_uniform, "LDC": constant, "LDCU": constant, "ELECT": elect,
}  # fmt: skip


def compile_instruction(x):
    """A function of (Registers, mask)."""
    op = x.opcode
    if op in VALUES_UNKNOWN:
        return lambda s, mask: None
    handler = HANDLERS.get(op)
    if handler is None and op.startswith("U"):
        handler = HANDLERS.get(op[1:])
    if handler is None:
        raise NotImplementedError(x.text)
    return handler(x, tuple(t.replace(".reuse", "") for t in x.operands))
