"""What of tests/gpu_check.py needs no GPU: the plan of the time, the report, the steps with a stand-in device."""

import fcntl
import json
import subprocess
import sys
import time

import commands
import gpu_check
import gpu_pieces
import gpu_report
import pytest
from gpu_report import COMPILING, FIRST, LATER, PEERS, Report, Step, Timing, compiling, plan, timings

DEVICE = {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0"}
PATHS = ["chain", "fused"]


class TestPlan:
    def test_most_important_first(self):
        first = timings(PATHS, [FIRST])
        assert first[0] == Timing("chain", "bf16", (256, 256), (4096, 16384), PEERS)
        assert [t.path for t in first] == ["chain", "fused"] * 2
        every = timings(PATHS, [FIRST, *LATER])
        assert {t.dtype for t in every} == set(gpu_report.DTYPES) and len(set(every)) == len(every)

    def test_peers_are_named_and_those_that_compile_come_last(self):
        every = timings(PATHS, [FIRST, *LATER])
        assert all(t.peers == (PEERS if t.path == "chain" else ()) for t in every)
        assert not any(set(t.peers) & set(COMPILING) for t in every)
        assert [peer for t in compiling() for peer in t.peers] == ["compiled"] * 4 + ["flex"] * 4
        assert gpu_check.STEPS.index("figures") == 1 and gpu_check.STEPS[-1] == "compiled"
        from dnl_ext.benchmark import METHODS

        assert {*PEERS, *COMPILING, gpu_report.OWN} <= set(METHODS)

    def test_fused_only_where_it_can_run(self):
        assert all(t.path == "chain" for t in timings(PATHS, LATER) if t.dtype == "fp32")

    def test_command_line(self):
        options = Timing("fused", "tf32", (256, 512), (4096, 9409)).options
        expected = "--dtype fp32 --tf32 --shapes 256,512 --n 4096,9409 --peers dnl_ext"
        assert " ".join(options) == expected
        assert Timing("chain", "bf16", (256, 512), (4096,), ("eager", "flex")).options[-1] == "eager,flex"

    def test_names_are_files_of_their_own(self):
        every = [*timings(PATHS, [FIRST, *LATER]), *compiling()]
        assert len({t.name for t in every}) == len(every)

    @pytest.mark.parametrize(("capability", "takes"), [("9.0", True), ("8.0", True), ("8.9", False), ("12.0", False)])
    def test_only_tiles_that_fit_are_timed(self, tmp_path, monkeypatch, capability, takes):
        monkeypatch.delenv("DNL_EXT_CUDA_PATH", raising=False)
        check = gpu_check.Check({"name": "x", "capability": capability}, 1, tmp_path)
        assert check.fits(Timing("fused", "tf32", (256, 512), (4096,))) is takes
        assert check.fits(Timing("fused", "bf16", (256, 512), (4096,)))
        assert check.fits(Timing("chain", "fp32", (512, 2048), (4096,)))
        assert not check.fits(Timing("fused", "bf16", (512, 2048), (4096,)))

    def test_fits_into_the_time_in_order(self):
        wanted = timings(PATHS, [FIRST, *LATER])
        for seconds in (0, 15, 120, 10_000):
            chosen = plan(wanted, seconds)
            assert sum(t.seconds for t in chosen) <= seconds
            assert chosen == [t for t in wanted if t in chosen]
        assert plan(wanted, 0) == [] and plan(wanted, 1e9) == wanted

    def test_a_smaller_one_fits_where_an_earlier_did_not(self):
        small, large = Timing("chain", "bf16", (256, 256), (4096,)), Timing("chain", "fp32", (512, 2048), (32768,))
        assert plan([large, small], small.seconds) == [small]

    def test_longer_maps_and_compilers_are_expected_to_take_longer(self):
        seconds = [Timing("chain", "bf16", (256, 256), (n,)).seconds for n in (4096, 16384, 32768)]
        assert seconds == sorted(seconds) and seconds[0] < seconds[-1]
        assert Timing("chain", "bf16", (256, 256), (4096,), ("flex",)).seconds > 30

    def test_the_first_figures_take_two_minutes_at_most(self):
        assert sum(t.seconds for t in timings([*PATHS, "hopper"], [FIRST])) < 120


CASE = {"dtype": "bf16", "direction": "forward", "width": 256, "channels": 512, "queries": 4096}


def result(method, ms, status="ok"):
    return {"method": method, "status": status, "best_s": ms and ms / 1e3, "gflops": 5e5}


def entry(path, results, peers=PEERS, **case):
    timing = {"path": path, "dtype": "bf16", "peers": peers}
    return {"timing": timing, "document": {"cases": [{"case": CASE | case, "results": results}]}}


def report():
    peers = [
        result("eager", 3.0),
        result("sdpa_flash", None, "failed"),
        result("sdpa_cudnn", 1.5),
        result("sdpa_slices", 9.0),
    ]
    documents = [
        entry("chain", [result("dnl_ext", 2.0), *peers]),
        entry("fused", [result("dnl_ext", 1.0)], ()),
        entry("chain", [result("dnl_ext", 5.0), result("eager", 4.0)], direction="training"),
        entry("fused", [result("dnl_ext", 4.5)], (), direction="training"),
        entry("chain", [result("dnl_ext", 7.0), result("flex", 6.0)], ("flex",)),
    ]
    steps = [Step("build", "passed", 30), Step("memcheck", "skipped", 0, "not | installed")]
    steps.append(Step("values, fused", "passed", 9, "", "fused"))
    return Report(
        DEVICE, steps, documents, {"host": [{"what": "forward", "value": 41.25, "unit": "us", "ok": None}]}, ["x-fp32"]
    )


class TestAnswers:
    """The first lines of the table."""

    def test_come_first(self):
        lines = gpu_report.markdown(report()).splitlines()
        assert lines[2] == "**Are all paths right?** Yes, as far as it went: fused, chain."
        assert lines[3].startswith("**Is each path faster")
        assert lines[4] == (
            "- chain: than eager at 1 of 2 calls (0.80 to 1.50 times its speed); "
            "than SDPA at 0 of 1 calls (0.75 to 0.75 times its speed)"
        )
        assert lines[5].startswith(
            "- fused: than eager at 1 of 2 calls (0.89 to 3.00 times its speed); than SDPA at 1 of 1"
        )
        assert lines[6] == "**How far was the model off?** Not known: it has no figure for this GPU."

    def test_a_wrong_path_is_named(self):
        wrong = report()
        wrong.steps.append(Step("values, fused", "failed", 1, "3 cases", "fused"))
        wrong.timings.append(entry("chain", [result("dnl_ext", None, "wrong")]))
        line = gpu_report.answers(wrong)[0]
        assert (
            "NO" in line and "fused: values, fused" in line and "chain: bench bf16 forward (256, 512) N = 4096" in line
        )

    def test_what_ran_out_of_time_is_not_known_and_no_failure(self):
        late = report()
        late.steps.append(Step("racecheck", "timed out", 60))
        assert not late.failed and "Out of time, and so not known: racecheck." in gpu_report.answers(late)[0]

    def test_the_model_is_held_against_forward_and_backward(self):
        modelled = report()
        row = {"width": 256, "channels": 512, "positions": 4096}
        modelled.modelled = [
            row | {"path": "fused", "direction": "forward", "milliseconds": 0.8},
            row | {"path": "fused", "direction": "backward", "milliseconds": 7.0},
            row | {"path": "fused", "direction": "forward", "positions": 64, "milliseconds": 7.0},
        ]
        line = gpu_report.answers(modelled)[-1]
        assert (
            "Measured is 0.50 to 1.25 times modelled" in line
            and "fused backward (256, 512) N = 4096 3.50 ms for 7.00" in line
        )

    def test_modelled_figures_are_those_of_the_gpu(self, tmp_path):
        page = tmp_path / "model.md"
        assert gpu_report.modelled(DEVICE["name"], page) == []
        head = "| GPU | call | positions | eager | chain | fused | hopper | best / eager |\n|---|\n"
        rows = (
            "| H100-SXM | forward (256, 512) channel-first | 16384 | 1.15 | 1.85 | - | 0.90 | 0.78 |\n"
            "| H100 | backward (256, 512) rows | 16384 | 2.1 | 3.7 | 4.7 | 1.7 | 0.81 |\n"
            "| A100 | forward (256, 512) channel-first | 16384 | 2.5 | 3.6 | 5.0 | - | 1.44 |\n"
        )
        page.write_text(f"text | with | bars\n<!-- begin calls -->\n\n{head}{rows}\n<!-- end calls -->\n{head}{rows}")
        call = {"direction": "forward", "width": 256, "channels": 512, "positions": 16384}
        found = gpu_report.modelled(DEVICE["name"], page)
        assert found == [call | {"path": "chain", "milliseconds": 1.85}, call | {"path": "hopper", "milliseconds": 0.9}]
        assert len(gpu_report.modelled("NVIDIA A100-SXM4-80GB", page)) == 2
        page.write_text("<!-- begin calls -->\n|\n| GPU\n| H100 | forward |\n")
        assert gpu_report.modelled(DEVICE["name"], page) == []

    def test_of_nothing(self):
        first, second, third = gpu_report.answers(Report(DEVICE))
        assert "nothing has run" in first and "Not measured" in second and "Not known" in third


class TestReport:
    def test_each_path_once_and_peers_once(self):
        methods = [row[6] for row in gpu_report.rows(report()) if row[1] == "forward"]
        assert methods == ["dnl_ext chain", "eager", "sdpa_flash", "sdpa_cudnn", "sdpa_slices", "dnl_ext fused", "flex"]

    def test_markdown(self):
        text = gpu_report.markdown(report())
        assert "| fused | bf16 | forward | 256 | 512 | 4096 | 1.000 | 3.000 | 1.500 | 3.00 |" in text
        assert "| bf16 | forward | 256 | 512 | 4096 | dnl_ext fused | 1.000 | 500.0 |" in text
        assert "| sdpa_flash | failed |" in text and "not / installed" in text and "x-fp32" in text
        assert "| forward | 41.25 | us |  |" in text

    def test_a_failed_step_fails_the_report(self, tmp_path):
        broken = report()
        broken.steps.append(Step("values", "failed", 1, "3 cases"))
        gpu_report.write(broken, tmp_path / "device")
        assert "NO. not of a path: values." in (tmp_path / "device/check.md").read_text()
        document = json.loads((tmp_path / "device/check.json").read_text())
        assert document["passes"] is False and document["steps"][-1]["name"] == "values"
        assert sorted(p.name for p in (tmp_path / "device").iterdir()) == ["check.json", "check.md"]

    def test_without_any_timing(self):
        assert "Milliseconds" not in gpu_report.markdown(Report(DEVICE))

    def test_folder_name(self):
        assert gpu_report.folder_name(DEVICE["name"]) == "nvidia-h100-80gb-hbm3"


@pytest.fixture
def check(tmp_path, monkeypatch):
    """A check of a GPU that is not there; what it would run is noted in `calls`, and answered by `answer`."""
    monkeypatch.delenv("DNL_EXT_CUDA_PATH", raising=False)
    monkeypatch.setattr(gpu_check, "built_paths", lambda: list(PATHS))
    check = gpu_check.Check(DEVICE, 480, tmp_path / "out")
    check.calls, check.answer = [], lambda command: (0, "")

    def call(command, share, **environment):
        words = [str(word) for word in command]
        check.calls.append((words, share, environment))
        return check.answer(words)

    monkeypatch.setattr(check, "call", call)
    return check


def statuses(check):
    return [step.status for step in check.report.steps]


class TestSteps:
    def test_tests_leave_the_emulator_out_and_run_by_every_path(self, check):
        check.test()
        assert [environment["DNL_EXT_CUDA_PATH"] for _, _, environment in check.calls] == PATHS
        assert all("--no-emulator" in words for words, _, _ in check.calls)
        assert [step.path for step in check.report.steps] == PATHS

    def test_figures_are_written_as_they_come(self, check):
        seen = []

        def answer(words):
            seen.append(len(json.loads((check.out / "check.json").read_text())["timings"]) if seen else 0)
            file = words[words.index("--json") + 1]
            gpu_check.pathlib.Path(file).parent.mkdir(parents=True, exist_ok=True)
            case = {"case": CASE, "results": [result("dnl_ext", 1.0)]}
            gpu_check.pathlib.Path(file).write_text(json.dumps({"cases": [case]}))
            return gpu_check.TIMED_OUT if len(seen) == 2 else 0, "cut"

        check.answer = answer
        check.figures()
        assert seen == [0, 1, 2, 3]  # each is on disk before the next begins
        assert statuses(check) == ["passed", "timed out", "passed", "passed"]
        assert len(list(gpu_report.rows(check.report))) == 4  # of what was cut too
        assert not check.report.failed

    def test_what_does_not_fit_is_left_out_by_name(self, check):
        check.end = time.time() + 1
        check.figures()
        assert not check.calls and check.report.left_out[0] == "chain-bf16-256x256-n4096-16384"

    def test_sanitizers_end_by_themselves_and_are_late_without_failing(self, check, monkeypatch):
        monkeypatch.setattr(gpu_check.shutil, "which", lambda tool: f"/{tool}")
        check.seconds, check.end = 1200, time.time() + 1200
        answers = iter(
            [(gpu_check.TIMED_OUT, "..."), (99, "RACECHECK SUMMARY: 2 hazards"), (0, ""), (99, "ERROR SUMMARY: 7")]
        )
        check.answer = lambda words: next(answers)
        check.sanitize()
        assert statuses(check) == ["timed out", "failed", "passed", "reported"]
        for words, share, _ in check.calls[:3]:  # two minutes, and an end of their own before that
            assert share * 1200 >= 119 and float(words[-1]) == pytest.approx(share * 1200 - 20, abs=2)

    def test_a_sanitizer_without_time_to_start_in_is_skipped(self, check, monkeypatch):
        monkeypatch.setattr(gpu_check.shutil, "which", lambda tool: f"/{tool}")
        check.end = time.time() + 20
        check.sanitize()
        assert set(statuses(check)) == {"skipped"} and not check.calls

    def test_what_tune_chooses_is_kept_beside_the_report(self, check):
        check.answer = lambda words: (0, "bfloat16 forward ... -> fused")
        check.tune()
        ((_, _, environment),) = check.calls
        assert environment == {"DNL_EXT_TUNE_FILE": str(check.out / "paths.json")}
        assert "-> fused" in check.report.steps[0].detail

    def test_lines_of_a_piece_count_as_far_as_they_came(self, check):
        good = json.dumps({"what": "a", "value": 1.0, "unit": "ms", "ok": None})
        wrong = json.dumps({"what": "b", "value": 0.5, "unit": "relative error", "ok": False})
        texts = iter(
            [
                (0, f"warning\n{good}\n"),
                (gpu_check.TIMED_OUT, f"{good}\n{good[:9]}"),
                (0, wrong),
                (1, "no kernel"),
                (0, good),
            ]
        )
        check.answer = lambda words: next(texts)
        check.pieces()
        assert statuses(check) == ["passed", "timed out", "failed", "failed", "passed"]
        assert [len(found) for found in check.report.pieces.values()] == [1, 1, 1, 0, 1]
        assert "b: 0.5 relative error" in check.report.steps[2].detail

    def test_profile_fails_nothing(self, check, monkeypatch):
        monkeypatch.setattr(gpu_check.shutil, "which", lambda tool: f"/{tool}")
        check.answer = lambda words: (1, "ERR_NVGPUCTRPERM")
        check.profile()
        assert statuses(check) == ["skipped", "skipped"] and (check.out / "ncu-fused.csv").exists()

    def test_cases_fail_where_the_worker_does(self, check):
        for answer, status in (
            ((1, "no device"), "failed"),
            ((0, '{"cases": 0, "failed": []}'), "failed"),
            ((0, '{"cases": 2, "failed": ["seed 3"]}'), "failed"),
            ((0, '{"cases": 2, "failed": []}'), "passed"),
            ((gpu_check.TIMED_OUT, "..."), "timed out"),
        ):
            check.answer = lambda words, answer=answer: answer
            check.cases("values", "cuda", 0, 1, 1, "fused")
            assert check.report.steps[-1].status == status

    @pytest.mark.parametrize(("left", "limit"), [(480, 48), (30, 30), (-3, 5)])
    def test_no_command_takes_more_than_its_share_and_what_is_left(self, tmp_path, monkeypatch, left, limit):
        check = gpu_check.Check(DEVICE, 480, tmp_path)
        check.end = time.time() + left
        monkeypatch.setattr(commands, "run", lambda command, seconds, **environment: seconds)
        assert check.call(["true"], 0.1) == pytest.approx(limit, abs=1)

    def test_nothing_is_timed_when_the_time_is_up(self, check):
        check.end = time.time() - 1
        check.bench()
        assert not check.calls and len(check.report.left_out) > 10


class TestPieces:
    @pytest.mark.parametrize("piece", gpu_report.PIECES)
    def test_runs_on_the_cpu_in_small(self, piece, capsys):
        gpu_pieces.main([piece, "--device", "cpu", "--small"])
        lines = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
        assert lines and all(row["value"] > 0 and row["ok"] is not False for row in lines)

    def test_every_piece_is_run(self):
        assert tuple(gpu_pieces.PIECES) == gpu_report.PIECES

    def test_a_wrong_product_is_said(self, monkeypatch, capsys):
        monkeypatch.setattr(gpu_pieces, "wide_product", lambda a, b: (a.float() @ b.float()).bfloat16())
        gpu_pieces.products("cpu", True)
        assert not any(json.loads(row)["ok"] for row in capsys.readouterr().out.splitlines())


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

    def test_prints_the_answers_last_and_exits_1_if_a_step_failed(self, check, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(gpu_check, "find_device", lambda: DEVICE)
        monkeypatch.setattr(gpu_check, "Check", lambda *arguments: check)
        check.answer = lambda words: (0, '{"cases": 2, "failed": ["seed 3: off"]}')
        assert gpu_check.main(["--steps", "values", "--out", str(tmp_path)]) == 1
        out = capsys.readouterr().out
        assert "**Are all paths right?** NO" in out and "FAILED values, chain" in out

    def test_a_failed_build_ends_it(self, check, monkeypatch, tmp_path):
        monkeypatch.setattr(gpu_check, "find_device", lambda: DEVICE)
        monkeypatch.setattr(gpu_check, "Check", lambda *arguments: check)
        check.answer = lambda words: (1, "no nvcc")
        assert gpu_check.main(["--out", str(tmp_path)]) == 1
        assert [step.name for step in check.report.steps] == ["build"]

    def test_a_late_command_ends_with_what_it_has_started(self, tmp_path):
        # The child holds a lock for as long as it lives: a zombie, which nobody may have reaped, holds none.
        child = tmp_path / "child.py"
        child.write_text(
            "import fcntl, sys, time\nfile = open(sys.argv[1], 'w')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
            "print('locked', flush=True)\ntime.sleep(30)\n"
        )
        parent = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"
        start = time.time()
        status, text = commands.run([sys.executable, "-c", parent, child, tmp_path / "lock"], 5.0)
        assert status == gpu_check.TIMED_OUT and text.startswith("locked")
        with open(tmp_path / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
        assert time.time() - start < 25
