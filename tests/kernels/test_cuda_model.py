"""The model of a multiprocessor: its simulator on programs whose time can be told by hand, launches, and its budget."""

import shutil
import subprocess

import pytest
import toolchain
from cuda_model import bounds, interpret, launches, machine, report, sass, simulate, units
from cuda_programs import WAIT, program

A100 = machine.MACHINES["8.0"]


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

    def test_a_released_warp_does_not_wait_for_its_neighbour(self):
        """Warps 0 and 4 have one scheduler: 4 waits for a copy, 0 at a barrier, which warp 1 soon comes to."""
        code = program(
            "BAR.SYNC 0x1",
            "NOP",
            "LDGSTS.E.BYPASS.128 [R0], [R2.64]",
            ("LDGDEPBAR", {"write": 0}),
            "DEPBAR.LE SB0, 0x0",
        )
        barrier, pause, *copy = (units.timing_of(x, i, A100) for i, x in enumerate(code))
        meet, wait = (barrier, {"barrier": (1, 2)}), [(pause, None)]
        warps = [[meet, *wait * 400], [*wait * 10, meet], wait, wait, [(x, None) for x in copy]]
        run = simulate.Multiprocessor(A100).run([warps])
        assert run.cycles == pytest.approx(10 + A100.latency["barrier"] + 400, abs=5)
        assert 10 + A100.latency["barrier"] < A100.latency["global"]

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
