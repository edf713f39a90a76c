"""Registers of a warp, and operands of instructions as functions of them.

Rows of one array hold the vector registers, then the uniform ones; a column is a lane. Predicates likewise."""

import re
import struct

import numpy as np

RZ, UNIFORM, URZ, NOWHERE, ROWS = 255, 256, 319, 320, 322
PT, UPT = 7, 15
LANES = 32
CONSTANT_BYTES = 1 << 16

_REGISTER = re.compile(r"(U?)R(\d+|Z)((?:\.\w+)*)")
CONSTANT = re.compile(r"c\[(0x[0-9a-f]+)\]\[(?:(U?R\d+|U?RZ)(?:\+(0x[0-9a-f]+))?|(0x[0-9a-f]+))\]")
_FLOATS = {"+INF": np.inf, "INF": np.inf, "-INF": -np.inf, "+QNAN": np.nan, "QNAN": np.nan, "-QNAN": np.nan}


class Registers:
    """State of some warps side by side. `constants` is the constant bank 0 as bytes."""

    def __init__(self, constants, warps=1):
        self.warps, self.lanes = warps, LANES * warps
        self.r = np.zeros((ROWS, self.lanes), np.uint32)
        self.p = np.zeros((17, self.lanes), bool)
        self.p[PT] = self.p[UPT] = True
        self.words = np.frombuffer(constants.ljust(CONSTANT_BYTES, b"\0"), np.uint32)
        self.bytes = np.frombuffer(constants.ljust(CONSTANT_BYTES, b"\0"), np.uint8)

    def whole(self, mask):
        """All lanes of the warps that `mask` has lanes of."""
        return np.repeat(mask.reshape(self.warps, LANES).any(axis=1), LANES)

    def first(self, mask):
        """Per warp, the place of its first lane in `mask`."""
        return mask.reshape(self.warps, LANES).argmax(axis=1) + LANES * np.arange(self.warps)


def row_of(text):
    """Row of a register's name, with suffixes; RZ and URZ are rows of zeros."""
    uniform, number, _ = _REGISTER.match(text).groups()
    if number == "Z":
        return URZ if uniform else RZ
    return int(number) + (UNIFORM if uniform else 0)


def is_register(text):
    return bool(_REGISTER.fullmatch(text.lstrip("-~|!").rstrip("|")))


def predicate_row(text):
    """(row, negated) of P0, !PT, UP3."""
    plain = text.removeprefix("!")
    uniform = plain.startswith("U")
    name = plain[2:] if uniform else plain[1:]
    return (PT if name == "T" else int(name)) + (8 if uniform else 0), text.startswith("!")


def is_predicate(text):
    return bool(re.fullmatch(r"!?U?P(\d|T)", text))


def half_bits(value):
    return int(np.float16(value).view(np.uint16))


def float_bits(value):
    return struct.unpack("<I", struct.pack("<f", value))[0]


def literal(text, as_float=False):
    """The 32 bits of an immediate, None if it is none."""
    if re.fullmatch(r"-?0x[0-9a-f]+", text):
        return int(text, 16) & 0xFFFFFFFF
    if text in _FLOATS:
        return float_bits(_FLOATS[text])
    try:
        value = float(text)
    except ValueError:
        return None
    if as_float:
        return float_bits(value) if abs(value) < 3.5e38 else float_bits(np.inf)
    return int(value) & 0xFFFFFFFF


def reader(text, as_float=False, wide=False):
    """A function of Registers: 32 bits a lane, or 64 with `wide`, with what negates or inverts them applied.

    Negations of a float flip the sign; of an integer they are two's complement."""
    negated, inverted = text.startswith("-"), text.startswith("~")
    plain = text.lstrip("-~")
    absolute = plain.startswith("|")
    plain = plain.strip("|")
    bits = literal(text, as_float)
    if bits is not None:
        value = np.uint64(bits) if wide else np.uint32(bits)
        return lambda s: value
    if match := CONSTANT.fullmatch(plain):
        base = _constant_reader(match, wide)
    elif _REGISTER.fullmatch(plain):
        base = _register_reader(plain, wide)
    elif is_predicate(plain):
        row, not_ = predicate_row(plain)
        return lambda s: (s.p[row] ^ not_).astype(np.uint32)
    else:
        raise NotImplementedError(f"operand {text}")
    if not (negated or inverted or absolute):
        return base
    if as_float:
        sign = np.uint32(0x80000000)

        def signed(s):
            value = base(s) & ~sign if absolute else base(s)
            return value ^ sign if negated else value

        return signed
    if inverted:
        return lambda s: ~base(s)
    if absolute:
        magnitude = lambda s: np.abs(base(s).view(np.int32)).view(np.uint32)  # noqa: E731
        return (lambda s: np.negative(magnitude(s))) if negated else magnitude
    return lambda s: np.negative(base(s)) if isinstance(base(s), np.ndarray) else type(base(s))(0) - base(s)


def _register_reader(plain, wide):
    row = row_of(plain)
    if wide:
        high = row if row in (RZ, URZ) else row + 1
        return lambda s: s.r[row].astype(np.uint64) | s.r[high].astype(np.uint64) << np.uint64(32)
    return lambda s: s.r[row]


def _constant_reader(match, wide):
    bank, register, offset, fixed = match.groups()
    if bank != "0x0":
        return lambda s: np.uint64(0) if wide else np.uint32(0)
    start = int(fixed or offset or "0x0", 16)
    if register is None:
        if wide:
            return lambda s: np.uint64(s.words[start // 4]) | np.uint64(s.words[start // 4 + 1]) << np.uint64(32)
        return lambda s: s.words[start // 4]
    row = row_of(register)

    def indexed(s):
        words = (s.r[row] + np.uint32(start)) // 4 % np.uint32(CONSTANT_BYTES // 4 - 1)
        if wide:
            return s.words[words].astype(np.uint64) | s.words[words + 1].astype(np.uint64) << np.uint64(32)
        return s.words[words]

    return indexed


def address(text):
    """A function of Registers: 64-bit addresses a lane, of [R2.64+0x80] or desc[UR8][R12.64]."""
    groups = re.findall(r"\[([^\]]*)\]", text)
    terms, wide = [], False
    for term in re.split(r"(?<=[\w\]])\+", groups[-1]):
        if match := _REGISTER.fullmatch(term.lstrip("-")):
            long = ".64" in match[3]
            wide |= long
            terms.append(reader(re.sub(r"\.\w+", "", term), wide=long))
        elif (bits := literal(term)) is not None:
            offset = np.int64(np.uint32(bits).view(np.int32)).view(np.uint64)
            terms.append(lambda s, offset=offset: offset)
        else:
            raise NotImplementedError(f"address {text}")

    def value(s):
        total = np.zeros(s.lanes, np.uint64)
        for term in terms:
            total = total + np.asarray(term(s)).astype(np.uint64)
        return total if wide else total & np.uint64(0xFFFFFFFF)

    return value
