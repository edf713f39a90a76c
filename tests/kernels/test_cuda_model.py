"""The model of a multiprocessor: its decoder on known words, its interpreter against Python's integers, its simulator
on programs whose time can be told by hand, and its budget."""

import shutil
import subprocess

import numpy as np
import pytest
import toolchain
from cuda_model import arithmetic, banks, bounds, flow, interpret, launches, machine, report, sass, simulate, units
from cuda_model.registers import Registers

A100 = machine.MACHINES["8.0"]
WAIT = "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R0], R2"
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


def high(stall=1, stay=True, write=7, read=7, wait=0):
    """The upper half of an instruction's word, of its control code alone."""
    return stall << 41 | int(stay) << 45 | write << 46 | read << 49 | wait << 52


def program(*lines):
    """Code of lines of text, or of (text, control)."""
    code = []
    for i, line in enumerate(lines):
        text, control = line if isinstance(line, tuple) else (line, {})
        code.append(sass.decode(16 * i, text, high(**control)))
    return code


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


def traced(code, parameters=b"", threads=32):
    launch = interpret.Launch(1, threads, 0, parameters)
    return interpret.trace(interpret.Program(code, "8.0"), launch)


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


def simulated(*lines, warps=4, blocks=1, turns=1, extra=None):
    code = program(*lines)
    steps = [(units.timing_of(x, i, A100), (extra or {}).get(i)) for i, x in enumerate(code)] * turns
    return simulate.Multiprocessor(A100).run([[steps] * warps] * blocks)


class TestSimulator:
    """Four warps are one for each scheduler."""

    def test_stall_counts(self):
        assert simulated(("FADD R0, R0, R0", {"stall": 4}), turns=100).cycles == 400

    def test_units_of_half_a_warp(self):
        """The float units of A100 take a warp in two cycles; with eight warps, the stall counts are hidden."""
        run = simulated(("FADD R0, R0, R0", {"stall": 4}), turns=100, warps=8)
        assert run.cycles == pytest.approx(400, abs=4)
        assert run.busy["fma"] / simulate.SCHEDULERS == pytest.approx(run.cycles, abs=4)

    def test_tensor_cores(self):
        """16 x 8 x 16 products at 256 a cycle."""
        run = simulated("HMMA.16816.F32.BF16 R0, R4, R8, R0", turns=100, warps=8)
        assert run.cycles == pytest.approx(200 * 8, abs=8)
        assert bounds.bound(run).startswith("tensor 100%") or bounds.shares(run)["tensor"] > 0.98

    def test_shared_memory_is_one_for_all_schedulers(self):
        run = simulated("LDSM.16.M88.4 R0, [R4]", turns=100, warps=8)
        assert run.cycles == pytest.approx(8 * 100 * 4, abs=40)

    def test_conflicts_cost_their_wavefronts(self):
        run = simulated("LDSM.16.M88.4 R0, [R4]", turns=100, warps=8, extra={0: {"wavefronts": 32}})
        assert run.cycles == pytest.approx(8 * 100 * 32, abs=80)

    def test_a_scoreboard_holds_what_waits_for_it(self):
        load, use = ("LDS R0, [R4]", {"write": 0}), ("FADD R1, R0, R0", {"wait": 1})
        alone = simulated(load, use, warps=1).cycles
        assert alone == pytest.approx(A100.latency["shared"] + 2, abs=2)
        assert simulated(load, ("FADD R1, R2, R2", {}), warps=1).cycles < 5

    def test_what_is_guarded_away_takes_an_issue_alone(self):
        assert simulated("LDSM.16.M88.4 R0, [R4]", turns=50, extra={0: {"active": False}}).busy["shared"] == 0

    def test_copies_in_groups(self):
        """DEPBAR with one group left waits for the first of two."""
        lines = ["LDGSTS.E.BYPASS.128 [R0], [R2.64]", ("LDGDEPBAR", {"write": 0})] * 2
        both = simulated(*lines, "DEPBAR.LE SB0, 0x0", warps=1)
        first = simulated(*lines, "DEPBAR.LE SB0, 0x1", warps=1)
        assert A100.latency["global"] < first.cycles < both.cycles

    def test_a_barrier_waits_for_the_last_warp(self):
        timing = [units.timing_of(x, i, A100) for i, x in enumerate(program("BAR.SYNC 0x0", ("NOP", {"stall": 15})))]
        barrier, pause = ((t, None) for t in timing)
        run = simulate.Multiprocessor(A100).run([[[barrier, pause], [pause] * 100 + [barrier, pause]]])
        assert run.cycles == pytest.approx(1500 + A100.latency["barrier"] + 15, abs=3)

    def test_a_barrier_nobody_comes_to(self):
        timing = units.timing_of(program("BAR.SYNC 0x0")[0], 0, A100)
        with pytest.raises(RuntimeError, match="wait at a barrier"):
            simulate.Multiprocessor(A100).run([[[(timing, None)] * 2, [(timing, None)]]])

    def test_products_of_a_warpgroup_run_beside_it(self):
        """64 x 256 x 16 take 128 cycles of H100's tensor cores; floats in between cost nothing."""
        hopper = machine.MACHINES["9.0a"]
        code = program(
            ("HGMMA.64x256x16.F32.BF16 R24, R192, gdesc[UR8], R24, gsb0", {}),
            *["FADD R0, R0, R0"] * 60,
            "WARPGROUP.DEPBAR.LE gsb0, 0x0",
        )
        steps = [(units.timing_of(x, i, hopper), None) for i, x in enumerate(code)]
        one, two = (simulate.Multiprocessor(hopper).run([[steps * 20] * warps]).cycles for warps in (4, 8))
        assert one == pytest.approx(20 * (128 + hopper.latency["wgmma"]), rel=0.05)
        assert two == pytest.approx(40 * 128, rel=0.05)


class TestPhaseBarriers:
    """One warp waits for bytes that another announces; words after init are 2 (2^20 - arrivals)."""

    WORD = 2 * ((1 << 20) - 1)

    def run(self, *programs):
        code = program(WAIT, "SYNCS.ARRIVE.TRANS64 RZ, [R0], R1", "NOP")
        wait, act, end = (units.timing_of(x, 0, A100) for x in code)
        steps = [
            [(wait if x[0] == "wait" else act, {"mbarrier": x}) for x in lines] + [(end, None)] for lines in programs
        ]
        return simulate.Multiprocessor(A100).run([steps])

    def test_a_wait_takes_as_long_as_the_bytes(self):
        init, expect, wait = ("init", 8, self.WORD, 1), ("expect", 8, 40000, 1), ("wait", 8, 0, 32)
        run = self.run([init, expect], [wait])
        assert run.cycles == pytest.approx(40000 / A100.l2 + A100.latency["copy"] + A100.latency["phase"], abs=5)

    def test_a_ring_of_one_stage_takes_turns(self):
        """Every load waits for the stage to be given back, every use for the load."""
        inits = [("init", 8, self.WORD, 1), ("init", 16, self.WORD, 1)]
        load, use = [], []
        for turn in range(4):
            parity = (turn % 2) << 31
            load += [("wait", 16, parity ^ 1 << 31, 1), ("expect", 8, 4000, 1)]
            use += [("wait", 8, parity, 32), ("arrive", 16, 0, 1)]
        run = self.run(inits + load, use)
        assert run.cycles > 4 * (4000 / A100.l2 + A100.latency["copy"])

    def test_a_phase_that_nobody_completes(self):
        with pytest.raises(RuntimeError, match="wait at a barrier"):
            self.run([("init", 8, self.WORD, 1)], [("wait", 8, 0, 32)])

    def test_what_the_interpreter_sees(self):
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


class TestLaunches:
    def test_waves(self):
        assert launches.waves(216, A100, 1) == (2, 0)
        assert launches.waves(217, A100, 2) == (1, 1)
        assert launches.waves(100, A100, 2) == (0, 1)

    def test_a_product_is_bound_by_its_bytes_or_its_rate(self):
        thin = launches.product(A100, 1, 16384, 16384, 64, 2, 4)
        assert thin.bound == "bytes"
        assert thin.seconds > 16384**2 * 4 / (A100.memory * 1e9)
        assert launches.product(A100, 1, 16384, 16384, 4096, 2, 4).bound == "products"

    def test_a_product_of_few_tiles_takes_the_smaller_ones(self):
        """128 tiles of 128 x 256 are two rounds of 108 multiprocessors, 512 of 64 x 128 five."""
        cost = launches.product(A100, 1, 16384, 256, 65536, 2, 2)
        ideal = 2 * 16384 * 256 * 65536 / (A100.library * 1e12)
        assert cost.seconds - launches.LAUNCH == pytest.approx(ideal * 5 * 108 / 512 / 0.8)


def test_tables_of_a_page_are_replaced():
    page = "a\n<!-- begin t -->\nold\n<!-- end t -->\nb\n"
    assert report.with_tables(page, {"t": "new"}) == "a\n<!-- begin t -->\n\nnew\n\n<!-- end t -->\nb\n"
    with pytest.raises(ValueError, match="no place for the table of u"):
        report.with_tables(page, {"u": "new"})


class TestBudget:
    FIGURES = {"instructions": 1000, "cycles": 5000, "share": 0.5, "bound": "tensor 50%"}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("change", "passes"),
        [
            ({}, True),
            ({"cycles": 5200}, True),
            ({"cycles": 5300}, False),
            ({"instructions": 1030}, False),
            ({"cycles": 1}, True),
        ],
    )
    def test_a_worse_kernel_is_caught(self, change, passes):
        found = report.worse(
            {"8.0": {"call": {"f": self.FIGURES}}}, {"8.0": {"call": {"f": {**self.FIGURES, **change}}}}
        )
        assert (not found) == passes

    def test_another_compiler_does_not_fail(self):
        budget = {"nvcc": "13.0", "8.0": {"call": {"f": self.FIGURES}}}
        built = {"8.0": {"call": {"f": {**self.FIGURES, "cycles": 6000}}}}
        assert [report.compare(budget, built, x) for x in ("13.0", "12.8", None)] == [1, 0, 0]
        assert report.compare(budget, {"8.0": budget["8.0"]}, "13.0") == 0

    def test_kernels_that_come_and_go(self):
        assert report.worse({}, {"8.0": {"c": {"f": self.FIGURES}}}) == ["c, f for 8.0: has no budget"]
        assert report.worse({"8.0": {"c": {"f": self.FIGURES}}}, {"8.0": {"c": {}}}) == ["c, f for 8.0: is gone"]
        assert report.worse({"8.0": {"c": {"f": self.FIGURES}}}, {"8.0": {}}) == ["c, f for 8.0: is gone"]


KERNEL = """
extern "C" __global__ void f(float* out, int turns) {
  extern __shared__ float memory[];
  float sum = 0;
  for (int turn = 0; turn < turns; ++turn) sum += memory[(threadIdx.x * STRIDE + turn) % 4096];
  out[threadIdx.x] = sum;
}
"""


@toolchain.needs_nvcc
def test_a_compiled_kernel_with_bank_conflicts_is_slower(tmp_path):
    """From source to cycles: the same kernel, once with all lanes in one bank."""
    (tmp_path / "f.cu").write_text(KERNEL)
    cycles = []
    for stride in (1, 32):
        cubin = tmp_path / f"{stride}.cubin"
        flags = ["-cubin", "-arch=sm_80", f"-DSTRIDE={stride}"]
        subprocess.run([shutil.which(toolchain.NVCC), *flags, tmp_path / "f.cu", "-o", cubin], check=True)
        code = interpret.Program(sass.disassemble(cubin)["f"], "8.0")
        launch = interpret.Launch(1, 128, 4096 * 4, (1 << 40).to_bytes(8, "little") + (64).to_bytes(4, "little"))
        cycles.append(launches.simulate_blocks(code, A100, launch, 1).cycles)
        assert sum(code.code[i].opcode == "LDS" for i, _ in interpret.trace(code, launch)[0]) == 64
    assert cycles[1] > 4 * cycles[0]
