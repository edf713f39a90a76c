"""What of tests/gpu_check.py needs no GPU: the plan of the time, the report, the ends without one."""

import json
import subprocess
import sys

import gpu_check
import gpu_report
import pytest
from gpu_report import Report, Step, Timing, plan, timings

DEVICE = {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0"}


class TestPlan:
    def test_most_important_first(self):
        first = timings()[0]
        assert first == Timing("chain", "bf16", (256, 256), (4096, 9409))
        assert {t.dtype for t in timings()} == {"bf16", "fp16", "tf32", "fp32"}
        assert {n for t in timings() for n in t.positions} == set(gpu_report.POSITIONS)

    def test_fused_only_where_it_can_run(self):
        fused = [t for t in timings() if t.path == "fused"]
        assert fused and all(t.dtype != "fp32" and t.shape[0] <= 256 for t in fused)

    def test_tf32_is_fp32_with_a_flag(self):
        options = {t.dtype: t.dtype_options for t in timings()}
        assert options["tf32"] == ("--dtype", "fp32", "--tf32") and options["fp32"] == ("--dtype", "fp32")
        assert {t.path for t in timings() if t.dtype == "tf32"} == {"chain", "fused"}

    @pytest.mark.parametrize(("capability", "takes"), [("9.0", True), ("8.0", True), ("8.9", False), ("12.0", False)])
    def test_only_tiles_that_fit_are_timed(self, tmp_path, monkeypatch, capability, takes):
        monkeypatch.delenv("DNL_EXT_CUDA_PATH", raising=False)
        check = gpu_check.Check({"name": "x", "capability": capability}, 1, tmp_path)
        assert check.fits(Timing("fused", "tf32", (256, 512), (4096,))) is takes
        assert check.fits(Timing("fused", "bf16", (256, 512), (4096,)))
        assert check.fits(Timing("chain", "fp32", (512, 2048), (4096,)))

    def test_fits_into_the_time_in_order(self):
        wanted = timings()
        for seconds in (0, 15, 120, 10_000):
            chosen = plan(wanted, seconds)
            assert sum(t.seconds for t in chosen) <= seconds
            assert chosen == [t for t in wanted if t in chosen]
        assert plan(wanted, 0) == [] and plan(wanted, 1e9) == wanted

    def test_a_smaller_one_fits_where_an_earlier_did_not(self):
        small, large = Timing("chain", "bf16", (256, 256), (4096,)), Timing("chain", "fp32", (512, 2048), (32768,))
        assert plan([large, small], small.seconds) == [small]

    def test_longer_maps_are_expected_to_take_longer(self):
        seconds = [Timing("chain", "bf16", (256, 256), (n,)).seconds for n in (4096, 16384, 32768)]
        assert seconds == sorted(seconds) and seconds[0] < seconds[-1]


def report():
    result = {"method": "dnl_ext", "status": "ok", "best_s": 0.002, "gflops": 5e5}
    peer = {"method": "eager", "status": "failed", "best_s": None, "gflops": None}
    case = {"dtype": "bf16", "direction": "forward", "width": 256, "channels": 512, "queries": 4096}
    documents = [
        {"timing": {"path": path}, "document": {"cases": [{"case": case, "results": [result, peer]}]}}
        for path in ("chain", "fused")
    ]
    steps = [Step("build", "passed", 30), Step("memcheck", "skipped", 0, "not | installed")]
    return Report(DEVICE, steps, documents, ["chain-fp32"])


class TestReport:
    def test_each_path_once_and_peers_once(self):
        methods = [row[5] for row in gpu_report.rows(report())]
        assert methods == ["dnl_ext chain", "eager", "dnl_ext fused"]

    def test_markdown(self):
        text = gpu_report.markdown(report())
        assert "**PASS**" in text and "| bf16 | forward | 256 | 512 | 4096 | dnl_ext fused | 2.000 | 500.0 |" in text
        assert "| eager | failed |" in text and "not / installed" in text and "chain-fp32" in text

    def test_a_failed_step_fails_the_report(self, tmp_path):
        broken = report()
        broken.steps.append(Step("values", "failed", 1, "3 cases"))
        gpu_report.write(broken, tmp_path / "device")
        assert "**FAIL**" in (tmp_path / "device/check.md").read_text()
        document = json.loads((tmp_path / "device/check.json").read_text())
        assert document["passes"] is False and document["steps"][-1]["name"] == "values"

    def test_without_any_timing(self):
        assert "Milliseconds" not in gpu_report.markdown(Report(DEVICE))

    def test_folder_name(self):
        assert gpu_report.folder_name(DEVICE["name"]) == "nvidia-h100-80gb-hbm3"


class TestCommand:
    def run(self, *arguments):
        return subprocess.run([sys.executable, gpu_check.__file__, *arguments], capture_output=True, text=True)

    @pytest.mark.skipif(gpu_check.find_device() is not None, reason="has a GPU")
    def test_without_a_gpu_it_says_so_in_one_line_and_exits_3(self):
        done = self.run()
        assert done.returncode == 3 and done.stdout == "" and len(done.stderr.splitlines()) == 1

    def test_help(self):
        done = self.run("--help")
        assert done.returncode == 0 and "--minutes" in done.stdout

    def test_unknown_step(self):
        assert self.run("--steps", "dance").returncode == 2

    def test_every_step_is_a_method(self):
        assert all(callable(getattr(gpu_check.Check, name)) for name in gpu_check.STEPS)

    def test_cases_fail_where_the_worker_does(self, tmp_path, monkeypatch):
        check = gpu_check.Check(DEVICE, 60, tmp_path)
        monkeypatch.setattr(check, "call", lambda *a, **k: (1, "no device"))
        assert not check.cases("values", "cuda", 0, 1, 1)
        monkeypatch.setattr(check, "call", lambda *a, **k: (0, '{"cases": 0, "failed": []}'))
        assert not check.cases("values", "cuda", 0, 1, 1)
        monkeypatch.setattr(check, "call", lambda *a, **k: (0, '{"cases": 2, "failed": []}'))
        assert check.cases("values", "cuda", 0, 2, 1)
        assert [step.status for step in check.report.steps] == ["failed", "failed", "passed"]
