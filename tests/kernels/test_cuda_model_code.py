"""What the model of a multiprocessor reads and runs: its decoder on known words, bank conflicts, its interpreter
against Python's integers, loops."""

import numpy as np
import pytest
from cuda_model import arithmetic, banks, flow, interpret, sass
from cuda_model.registers import Registers
from cuda_programs import WAIT, program, traced

LISTING = """
		Function : _Z1fPf
        /*0000*/                   S2R R2, SR_CTAID.X ;                        /* 0x0000000000027919 */
                                                                               /* 0x000e220000002500 */
        /*0010*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;     /* 0x00000a00ff017624 */
                                                                               /* 0x000fe400078e00ff */
        /*0020*/              @!P0 BRA 0x1b0 ;                                 /* 0x000000e000008947 */
                                                                               /* 0x000fea0003800000 */
        /*0030*/                   IMAD.MOV.U32 R16, RZ, RZ, R2 ;              /* 0x000000ffff107224 */
                                                                               /* 0x001fe200078e0002 */
        /*0040*/                   LDSM.16.M88.4 R4, [R3+UR4+0x700] ;          /* 0x0000000000000000 */
                                                                               /* 0x000fe40000000200 */
"""


class TestDecoder:
    def test_words_of_a_listing(self):
        code = sass.parse(LISTING)["_Z1fPf"]
        assert [x.address for x in code] == [0, 0x10, 0x20, 0x30, 0x40]
        special, first, branch, waits, load = code
        assert special.control == sass.Control(stall=1, stay=True, write_barrier=0, read_barrier=7, wait=0, reuse=0)
        assert (first.opcode, first.modifiers, first.control.stall) == ("IMAD", ("MOV", "U32"), 2)
        assert (branch.guard, branch.target, branch.control.stall) == ("!P0", 0x1B0, 5)
        assert waits.control.wait == 1
        assert load.operands == ("R4", "[R3+UR4+0x700]")

    def test_operands_in_brackets_are_one(self):
        assert sass.split_operands("[R194], desc[UR8][R12.64+0x10], !P1") == ("[R194]", "desc[UR8][R12.64+0x10]", "!P1")

    def test_resources(self):
        text = "Function f:\n  REG:48 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:1432\n"
        assert sass.parse_resources(text) == {"f": (48, 1024)}


class TestBanks:
    LANES = np.arange(32)
    ALL = np.ones((1, 32), bool)

    @pytest.mark.parametrize(("stride", "want"), [(4, 1), (8, 2), (128, 32), (132, 1), (0, 1)])
    def test_words(self, stride, want):
        assert banks.shared((self.LANES * stride)[None], 4, self.ALL).tolist() == [want]

    @pytest.mark.parametrize(("pitch", "want"), [(128, 32), (144, 4), (256, 32), (528, 4)])
    def test_matrices(self, pitch, want):
        """Eight rows at a pitch of whole 128 bytes lie in the same banks; an odd number of 16 bytes parts them."""
        rows = (self.LANES % 16 * pitch + self.LANES // 16 * 16)[None]
        assert banks.matrix(rows, 4).tolist() == [want]

    def test_lines_of_16_bytes_take_a_quarter_of_a_warp_each(self):
        assert banks.shared((self.LANES * 16)[None], 16, self.ALL).tolist() == [4]

    def test_sectors(self):
        assert banks.sectors((self.LANES * 4)[None], 4, self.ALL).tolist() == [4]
        assert banks.sectors((self.LANES * 64)[None], 4, self.ALL).tolist() == [32]
        assert banks.sectors((self.LANES * 64)[None], 4, self.ALL & (self.LANES < 2)).tolist() == [2]


def values(text, **registers):
    """Registers after one instruction, from named ones before it."""
    state = Registers(b"")
    for name, value in registers.items():
        state.r[int(name[1:])] = np.asarray(value, np.uint64).astype(np.uint32)
    (x,) = program(text)
    arithmetic.compile_instruction(x)(state, np.ones(32, bool))
    return state


class TestArithmetic:
    """Against Python's integers, on random words and the edges of their range."""

    generator = np.random.default_rng(1)
    A, B, C = generator.integers(0, 1 << 32, (3, 32), np.uint64)
    A[:4], B[:4] = (0, 0xFFFFFFFF, 0x80000000, 1), (0xFFFFFFFF, 0xFFFFFFFF, 0x7FFFFFFF, 0)

    @pytest.mark.parametrize(
        ("text", "want"),
        [
            ("IADD3 R0, R1, R2, R3", lambda a, b, c: a + b + c),
            ("IADD3 R0, R1, -R2, RZ", lambda a, b, c: a - b),
            ("IMAD R0, R1, R2, R3", lambda a, b, c: a * b + c),
            ("IMAD.IADD R0, R1, 0x1, R3", lambda a, b, c: a + c),
            ("IMAD.HI.U32 R0, R1, R2, RZ", lambda a, b, c: a * b >> 32),
            ("LEA R0, R1, R2, 0x3", lambda a, b, c: (a << 3) + b),
            ("LEA.HI R0, R1, R2, RZ, 0x5", lambda a, b, c: (a >> 27) + b),
            ("SHF.L.U32 R0, R1, 0x7, RZ", lambda a, b, c: a << 7),
            ("SHF.R.U32.HI R0, RZ, 0x3, R1", lambda a, b, c: a >> 3),
            ("SHF.R.S32.HI R0, RZ, 0x1f, R1", lambda a, b, c: -(a >> 31)),
            ("SHF.L.U64.HI R0, R1, 0x2, R2", lambda a, b, c: (b << 2) | (a >> 30)),
            ("LOP3.LUT R0, R1, R2, R3, 0x96, !PT", lambda a, b, c: a ^ b ^ c),
            ("LOP3.LUT R0, R1, 0xf, R3, 0xea, !PT", lambda a, b, c: (a & 0xF) | c),
            ("PRMT R0, R1, 0x5410, R2", lambda a, b, c: (a & 0xFFFF) | (b << 16)),
            ("POPC R0, R1", lambda a, b, c: a.bit_count()),
        ],
    )
    def test_one_word(self, text, want):
        got = values(text, R1=self.A, R2=self.B, R3=self.C).r[0]
        words = [want(int(a), int(b), int(c)) & 0xFFFFFFFF for a, b, c in zip(self.A, self.B, self.C, strict=True)]
        assert got.tolist() == words

    def test_two_words(self):
        """A carry goes from the lower words to the upper ones."""
        state = values("IADD3 R0, P0, R1, R2, RZ", R1=self.A, R2=self.B, R4=self.C, R5=self.A)
        (upper,) = program("IADD3.X R6, R4, R5, RZ, P0, !PT")
        arithmetic.compile_instruction(upper)(state, np.ones(32, bool))
        for lane, (a, b, c) in enumerate(zip(self.A, self.B, self.C, strict=True)):
            want = (int(a) | int(c) << 32) + (int(b) | int(a) << 32)
            assert int(state.r[0, lane]) | int(state.r[6, lane]) << 32 == want % (1 << 64)

    @pytest.mark.parametrize("sign", ["", ".U32"])
    def test_wide_product(self, sign):
        state = values(f"IMAD.WIDE{sign} R4, R1, R2, R6", R1=self.A, R2=self.B, R6=self.C, R7=self.A)
        for lane, (a, b, c) in enumerate(zip(self.A, self.B, self.C, strict=True)):
            signed = (lambda v: int(v)) if sign else (lambda v: int(v) - (int(v) >> 31 << 32))
            want = signed(a) * signed(b) + (int(c) | int(a) << 32)
            assert int(state.r[4, lane]) | int(state.r[5, lane]) << 32 == want % (1 << 64)

    def test_compare_of_two_words(self):
        state = values("ISETP.GE.U32.AND P1, PT, R1, R2, PT", R1=self.A, R2=self.B, R3=self.B, R4=self.A)
        (upper,) = program("ISETP.GE.AND.EX P0, PT, R3, R4, PT, P1")
        arithmetic.compile_instruction(upper)(state, np.ones(32, bool))
        for lane, (a, b) in enumerate(zip(self.A, self.B, strict=True)):
            sixty_four = [int(low) | (int(top) - (int(top) >> 31 << 32)) << 32 for low, top in ((a, b), (b, a))]
            assert state.p[0, lane] == (sixty_four[0] >= sixty_four[1])

    def test_unknown_instruction_is_no_silent_nothing(self):
        with pytest.raises(NotImplementedError, match="QUUX R1"):
            arithmetic.compile_instruction(program("QUUX R1, R2")[0])


class TestInterpreter:
    def test_loop_goes_as_often_as_its_parameter_says(self):
        code = program(
            "MOV R0, RZ",
            "IADD3 R0, R0, 0x1, RZ",
            "ISETP.GE.AND P0, PT, R0, c[0x0][0x160], PT",
            "@!P0 BRA 0x10",
            "EXIT",
        )
        (steps,) = traced(code, (7).to_bytes(4, "little"))
        assert [i for i, _ in steps] == [0, *[1, 2, 3] * 7, 4]

    def test_lanes_part_and_meet(self):
        code = program(
            "S2R R0, SR_TID.X",
            "ISETP.GE.AND P0, PT, R0, 0x10, PT",
            "BSSY B0, 0x60",
            "@P0 BRA 0x50",
            "IADD3 R1, RZ, 0x1, RZ",
            "BSYNC B0",
            "EXIT",
        )
        (steps,) = traced(code)
        assert [i for i, _ in steps] == [0, 1, 2, 3, 4, 5, 5, 6] or [i for i, _ in steps] == [0, 1, 2, 3, 4, 5, 6]
        assert sum(i == 6 for i, _ in steps) == 1

    def test_warps_that_take_no_part_are_seen(self):
        code = program("S2R R0, SR_TID.X", "ISETP.LT.AND P0, PT, R0, 0x20, PT", "@P0 LDS R1, [R0]", "EXIT")
        first, second = traced(code, threads=64)
        assert first[2] == (2, {"wavefronts": 1})
        assert second[2] == (2, interpret.INACTIVE)

    def test_addresses_give_wavefronts(self):
        code = program("S2R R0, SR_TID.X", "SHF.L.U32 R0, R0, 0x7, RZ", "LDS R1, [R0+0x4]", "EXIT")
        (steps,) = traced(code)
        assert steps[2] == (2, {"wavefronts": 32})

    def test_a_program_without_end(self):
        code = program("BRA 0x0")
        with pytest.raises(RuntimeError, match="a warp passed 100 instructions"):
            interpret.trace(interpret.Program(code, "8.0"), interpret.Launch(1, 32, 0, b""), most=100)

    def test_barriers_are_seen(self):
        code = program(
            "MOV R1, 0x8000",
            "SYNCS.EXCH.64 URZ, [UR8+0x10], UR4",
            "@P0 SYNCS.ARRIVE.TRANS64 RZ, [R0+0x10], R1",
            WAIT,
            "@!P0 BRA 0x30",
            "BAR.SYNC R3, 0x40",
            "EXIT",
        )
        (steps,) = traced(code)
        assert steps[1][1] == {"mbarrier": ("init", 0x10, 0, 32)}
        assert steps[2][1] == interpret.INACTIVE
        assert steps[3:5] == [(3, {"mbarrier": ("wait", 0, 0, 32)}), (4, interpret.INACTIVE)]
        assert steps[5][1] == {"barrier": (0, 2)}


class TestFlow:
    CODE = (
        "MOV R0, RZ",
        "IADD3 R1, R1, 0x1, RZ",
        "HMMA.16816.F32.BF16 R0, R4, R8, R0",
        "@P0 BRA 0x20",
        "@P2 BRA 0x60",
        "FADD R2, R2, R2",
        "@P1 BRA 0x10",
        "EXIT",
    )

    def test_loops_nest(self):
        assert flow.loops_of(program(*self.CODE)) == [flow.Loop(1, 6, 0), flow.Loop(2, 3, 1)]

    def test_walk_with_trips_and_branches(self):
        outer = flow.loops_of(program(*self.CODE))[0]
        assert flow.walk(program(*self.CODE), outer, {0x20: 3}) == [1, 2, 3, 2, 3, 2, 3, 4, 5, 6]
        assert flow.walk(program(*self.CODE), outer, {}, taken={0x40}) == [1, 2, 3, 4, 6]
