"""Short forms of what `make prove` runs in full: random cases of the emulated CUDA kernels, plainly and under
sanitizers, index overflow, a few planted faults; and the programs of those gates, which must be able to fail."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / name) for name in ("gates", "mutants")]

import cpu  # noqa: E402
import cuda_budget  # noqa: E402
import programs  # noqa: E402
import prove  # noqa: E402
import ptxas_table  # noqa: E402
import run as mutants  # noqa: E402
import table  # noqa: E402
from toolchain import skip_without_compiler  # noqa: E402


def program(gate, mode="plain", type=None):
    skip_without_compiler(programs.MODES[mode][0])
    return programs.cached(programs.Program(gate, mode, type))


@pytest.mark.parametrize("gate", ["whiten", "standardise", "unary"])
def test_random_cases(gate):
    assert mutants.verdict(program(gate), 100, "all") is None


@pytest.mark.parametrize(
    ("gate", "type"),
    [("chain", "float"), ("fused", "__nv_bfloat16"), ("fused_forward", "Tf32"), ("hopper", "__nv_bfloat16")],
)
def test_random_cases_of_pairwise_attention(gate, type):
    assert mutants.verdict(program(gate, "plain", type), 40, "all") is None


def test_maps_beyond_2_to_32():
    assert mutants.verdict(program("overflow"), 1, "all") is None


@pytest.mark.parametrize("mode", ["asan", "tsan"])
def test_no_reports_of_sanitizers(mode):
    assert mutants.verdict(program("unary", mode, "float"), 20, "all") is None


class TestMutants:
    @pytest.mark.parametrize("listed", [table, cpu])
    def test_each_is_where_its_table_says(self, listed):
        for mutant in listed.MUTANTS:
            assert (ROOT / "csrc" / mutant.file).read_text().count(mutant.old) == 1, mutant.name
        names = [mutant.name for mutant in listed.MUTANTS]
        assert len(names) == len(set(names)) >= 40
        assert set(listed.SHORT) <= set(names)

    def test_short_form_of_cpu_kernels(self):
        skip_without_compiler("plain")
        self.check([m for m in cpu.MUTANTS if m.name in cpu.SHORT])

    @pytest.mark.slow
    def test_all_of_cpu_kernels(self):
        skip_without_compiler("asan")
        self.check(mutants.runnable(cpu.MUTANTS))

    @pytest.mark.parametrize("mode", ["plain", "asan", "tsan"])
    def test_short_form(self, mode):
        skip_without_compiler(mode)
        chosen = [m for m in table.MUTANTS if m.name in table.SHORT and mutants.program_of(m).mode == mode]
        self.check(chosen)

    def check(self, chosen):
        assert chosen
        results = mutants.run(chosen, say=lambda line: None)
        assert not [result for result in results if not result["passes"]]

    def test_a_text_that_is_not_there_is_an_error(self, tmp_path):
        mutant = table.Mutant("none", "core/cuda/reduce.cuh", "no such text", "", "whiten")
        with pytest.raises(LookupError, match="0 times"):
            mutants.planted(mutant, tmp_path)

    def test_a_crash_is_found_and_success_is_not(self):
        assert mutants.verdict("/bin/false", 1, "all") == "exit 1"
        assert mutants.verdict("/bin/true", 1, "all") is None


class TestProve:
    def outcome(self, **fields):
        return prove.Outcome(**{"stage": "x", "what": "x", "claimed": 10, "count": 10, **fields})

    def test_a_short_count_or_a_failure_fails(self):
        assert self.outcome().passes
        assert not self.outcome(count=9).passes
        assert not self.outcome(failures=["one"]).passes
        assert "SHORT" in prove.table([self.outcome(count=9)]) and "FAILED" in prove.table([self.outcome(failures=[1])])

    def test_a_stage_that_cannot_run_has_failed(self, monkeypatch):
        def broken(context, outcome, seconds):
            raise OSError("no compiler")

        monkeypatch.setitem(prove.STAGES, "launches", ("broken", 1, 1, broken))
        (outcome,) = prove.prove(["launches"], prove.Context(1.0, 1), lambda line: None)
        assert not outcome.passes and "no compiler" in outcome.failures[0]

    def test_stages_fit_into_an_hour(self):
        assert sum(seconds for _, _, seconds, _ in prove.STAGES.values()) <= 60 * 60

    def test_the_command_lists_its_stages(self):
        done = subprocess.run([sys.executable, ROOT / "tests/prove.py", "--list"], capture_output=True, text=True)
        assert done.returncode == 0 and len(done.stdout.splitlines()) == len(prove.STAGES)


class TestBudget:
    LOG = """ptxas info    : Compiling entry function '_Z1fv' for 'sm_80'
ptxas info    : Function properties for _Z1fv
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem"""
    FIGURES = {"registers": 40, "stack": 0, "spill": 0, "shared": 0, "occupancy": 0.5, "hmma": 8}  # noqa: RUF012

    def test_log_is_read(self):
        assert ptxas_table.parse(self.LOG.splitlines()) == [("_Z1fv", "sm_80", 40, 16, 12, 1024)]

    @pytest.mark.parametrize(
        ("change", "passes"),
        [({}, True), ({"registers": 48}, True), ({"registers": 49}, False), ({"spill": 4}, False), ({"hmma": 7}, False),
         ({"hmma": None}, True), ({"stack": 8}, False), ({"shared": 16}, False), ({"occupancy": 0.4}, False)],
    )  # fmt: skip
    def test_what_is_worse(self, change, passes):
        built = {"8.0": {"f": {**self.FIGURES, **change}}}
        assert (not cuda_budget.worse({"8.0": {"f": self.FIGURES}}, built)) == passes

    def test_a_kernel_without_budget_and_one_that_is_gone(self):
        assert cuda_budget.worse({}, {"8.0": {"f": self.FIGURES}}) == ["f for 8.0: has no budget"]
        assert cuda_budget.worse({"8.0": {"f": self.FIGURES}}, {"8.0": {}}) == ["f for 8.0: is gone"]

    def test_what_the_assembler_gave_up(self):
        text = "ptxas info : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to\nx"
        assert len(cuda_budget.lost(text)) == 1 and not cuda_budget.lost("Used 168 registers, wgmma")

    def test_occupancy(self):
        # 64 registers: four blocks of 256 threads use all 65,536, half the threads of a multiprocessor of 8.0.
        assert cuda_budget.occupancy("8.0", 64, 0) == 0.5
        assert cuda_budget.occupancy("8.0", 65, 0) == 3 / 8
        assert cuda_budget.occupancy("8.0", 16, 81 * 1024) == 2 / 8
        assert cuda_budget.occupancy("8.9", 16, 0) == 1

    def test_tensor_instructions_are_counted_by_function(self):
        text = "Function : f\n HMMA.16816.F32 R1\n FADD R2\nFunction : g\n FADD R3"
        assert cuda_budget.tensor_instructions(text) == {"f": 1, "g": 0}
