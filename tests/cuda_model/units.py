"""Which unit an instruction takes, for how long, and what releases its scoreboards."""

from dataclasses import dataclass

CLASSES = ("tensor", "wgmma", "ldsm", "lds", "sts", "cp.async", "global", "shuffle", "mufu", "float", "imad", "integer",
           "move", "uniform", "barrier", "branch")  # fmt: skip

_FLOAT = {"FADD", "FMUL", "FFMA", "HADD2", "HMUL2", "HFMA2"}
_MOVES = {"MOV", "CS2R", "SEL", "P2R", "R2P", "PRMT", "FSEL", "VOTE", "VOTEU"}
_SPECIAL = {"MUFU", "F2F", "F2I", "I2F", "FRND", "POPC", "FLO", "BREV", "I2I", "FCHK"}
_SLOW_MOVES = {"S2R", "S2UR", "R2UR", "REDUX", "B2R", "R2B", "MATCH"}
_BRANCHES = {"BRA", "EXIT", "CALL", "RET", "BSSY", "BSYNC", "BREAK", "WARPSYNC", "NOP", "YIELD", "BRX", "JMP", "BMOV",
             "NANOSLEEP", "ERRBAR", "CCTL", "MEMBAR", "FENCE", "ACQBULK", "PREEXIT", "USETMAXREG", "ENDCOLLECTIVE",
             "ELECT", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "UCGABAR_ARV", "UCGABAR_WAIT", "KILL", "BPT"}  # fmt: skip
_GLOBAL = {"LDG", "STG", "LD", "ST", "LDL", "STL", "RED", "ATOM", "ATOMG", "REDG"}


def class_of(instruction):
    """One of CLASSES, for the tables."""
    op, name = instruction.opcode, instruction.name
    if op in ("HMMA", "IMMA", "DMMA", "QMMA"):
        return "tensor"
    if op in ("HGMMA", "QGMMA", "IGMMA"):
        return "wgmma"
    if op in ("LDSM", "STSM", "MOVM"):
        return "ldsm"
    if op in ("LDGSTS", "UTMALDG", "UTMASTG", "UBLKCP", "UTMAREDG", "UTMAPF", "UTMACMDFLUSH"):
        return "cp.async"
    if op in ("LDS", "ATOMS"):
        return "lds"
    if op == "STS":
        return "sts"
    if op in _GLOBAL:
        return "global"
    if op == "SHFL":
        return "shuffle"
    if op in _SPECIAL:
        return "mufu"
    if op in ("BAR", "SYNCS", "B2R"):
        return "barrier"
    if op in _FLOAT:
        return "float"
    if op in _MOVES or name.startswith("IMAD.MOV") or op == "F2FP":
        return "move"
    if op in ("IMAD", "IDP"):
        return "imad"
    if op in _BRANCHES:
        return "branch"
    if op.startswith("U") or op in _SLOW_MOVES or op in ("LDC", "LDCU"):
        return "uniform"
    return "integer"


@dataclass(slots=True)
class Timing:
    """What the simulator needs of an instruction."""

    index: int
    klass: int  # of CLASSES
    kind: str  # fixed, shared, global, copy, group, depbar, barrier, wgmma, wgmma_wait, phase
    pipe: int  # of PIPES, -1: none
    busy: float  # cycles of the pipe
    stall: int
    stay: bool
    wait: tuple[int, ...]
    write: int  # scoreboard or -1
    read: int
    latency: float
    wavefronts: float  # of shared memory
    bytes: int  # from or to L2, of a warp
    argument: tuple = ()


PIPES = ("tensor", "fma", "fma lite", "alu", "special", "uniform")
_TENSOR, _FMA, _LITE, _ALU, _XU, _UNIFORM = range(len(PIPES))


def width_of(instruction):
    """Bytes that a lane loads or stores."""
    for modifier in instruction.modifiers:
        if modifier in ("128", "64"):
            return int(modifier) // 8
        if modifier in ("U16", "S16", "16"):
            return 2
        if modifier in ("U8", "S8", "8"):
            return 1
    return 4


def _hmma_fma(instruction):
    """Products of a warp's HMMA: 16816 is 16 x 8 x 16. Of TF32 they count twice, since it runs at half the rate."""
    for modifier in instruction.modifiers:
        if modifier in ("16816", "1688", "16832"):
            depth = {"16816": 16, "1688": 8, "16832": 32}[modifier]
            return 128 * depth * (2 if "TF32" in instruction.modifiers else 1)
    return 2048


def timing_of(instruction, index, machine):
    """Timing of one instruction, as if every lane took part and no banks met."""
    op, modifiers, control, latency = instruction.opcode, instruction.modifiers, instruction.control, machine.latency
    t = Timing(
        index=index,
        klass=CLASSES.index(class_of(instruction)),
        kind="fixed",
        pipe=_ALU,
        busy=2,
        stall=control.stall,
        stay=control.stay,
        wait=tuple(i for i in range(6) if control.wait >> i & 1),
        write=control.write_barrier if control.write_barrier < 6 else -1,
        read=control.read_barrier if control.read_barrier < 6 else -1,
        latency=latency["move"],
        wavefronts=0,
        bytes=0,
    )
    klass = class_of(instruction)
    if klass == "tensor":
        t.pipe, t.busy, t.latency = _TENSOR, _hmma_fma(instruction) / machine.mma_fma, 33
    elif klass == "wgmma":
        t.kind, t.pipe = "wgmma", -1
        shape = next(x for x in modifiers if x.startswith("64x"))
        _, n, k = map(int, shape.split("x"))
        from_registers = not instruction.operands[1].startswith("gdesc")
        # A warpgroup's product takes all four schedulers' tensor cores; B, and A where it lies there, come from shared
        # memory at 128 bytes a clock.
        elements = 64 * n * k / (4 * machine.tensor_fma)
        t.busy = max(elements, (n + (0 if from_registers else 64)) * k * 2 / 128)
        t.latency = latency["wgmma"]
        ends = any(x.startswith("gsb") for x in instruction.operands)
        t.argument = (ends, n * 64 * k)
    elif klass in ("ldsm", "lds", "sts", "shuffle"):
        t.kind, t.pipe = "shared", -1
        if klass == "ldsm":
            t.wavefronts = int(modifiers[-1]) if modifiers and modifiers[-1] in "124" else 1
            t.latency = latency["matrix"]
        elif klass == "shuffle":
            t.wavefronts, t.latency = 1, latency["shuffle"]
        else:
            t.wavefronts = max(1, width_of(instruction) // 4)
            t.latency = latency["shared" if klass == "lds" else "store"]
    elif op == "LDGSTS":
        t.kind, t.pipe, t.latency = "copy", -1, latency["global"]
        t.bytes = 32 * width_of(instruction)
        t.wavefronts = max(1, width_of(instruction) // 4)
    elif klass == "global":
        t.kind, t.pipe, t.latency = "global", -1, latency["global"]
        t.bytes = 32 * width_of(instruction)
        t.wavefronts = max(1, width_of(instruction) // 4)
    elif op == "LDGDEPBAR":
        t.kind, t.pipe = "group", -1
    elif op == "DEPBAR" and instruction.operands:
        t.kind, t.pipe = "depbar", -1
        board = int(instruction.operands[0].removeprefix("SB"))
        left = int(instruction.operands[1], 16) if len(instruction.operands) > 1 else 0
        t.argument = (board, left)
    elif op == "WARPGROUP":
        t.pipe = -1
        if "DEPBAR" in modifiers:
            t.kind, t.argument = "wgmma_wait", (int(instruction.operands[1], 16),)
    elif op == "BAR":
        t.pipe = -1
        if "SYNC" in modifiers or "ARV" in modifiers:
            t.kind = "barrier"
            t.argument = (instruction.operands[0], "SYNC" in modifiers)
    elif op == "SYNCS":
        t.kind, t.pipe, t.latency = "phase", -1, latency["phase"]
    elif klass == "mufu":
        t.pipe, t.busy, t.latency = _XU, 8, latency["special"]
    elif klass == "float":
        t.pipe = _FMA if machine.fma_pipes == 1 else _LITE
    elif op in ("IMAD", "IDP"):
        t.pipe = _FMA
        if "HI" in modifiers or "WIDE" in modifiers:
            t.busy = 4
    elif klass == "uniform":
        t.pipe = _UNIFORM
        if op in ("LDC", "LDCU") or op.startswith("ULDC"):
            t.latency = latency["constant"]
    elif klass == "branch":
        t.pipe = -1
    return t
