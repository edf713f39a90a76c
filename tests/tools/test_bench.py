"""The benchmark: what it counts, what it lets through, what it writes."""

import io
import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from dnl_ext import benchmark
from dnl_ext._load import _C
from dnl_ext.benchmark import Case, Options, check, memory, methods, runner, timing
from dnl_ext.benchmark.case import make_inputs
from dnl_ext.benchmark.memory import CpuPeaks
from dnl_ext.cli.app import app

SMALL = Options(shapes=((16, 32),), positions=(96,), dtypes=("fp32",), budget=0.1)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A small roof and three rounds: figures that mean nothing, soon."""
    monkeypatch.setattr(runner, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(timing, "roof_edge", lambda *_: 128)


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", "--device", "cpu", *arguments])


def with_wrong(monkeypatch, wrong):
    """Make `wrong` of (case, right function) the method dnl_ext."""
    right = benchmark.METHODS["dnl_ext"]
    broken = replace(right, build=lambda case: wrong(case, right.build(case)))
    monkeypatch.setitem(benchmark.METHODS, "dnl_ext", broken)


class TestCase:
    def test_flops(self):
        assert benchmark.forward_flops(10, 20, 3, 5) == 2 * 10 * 20 * 3 + 2 * 10 * 20 * 5
        products = 4 * 3 + 3 * 5  # S twice, dQ, dK; y, dP, dV
        assert benchmark.training_flops(10, 20, 3, 5) == 2 * 10 * 20 * products
        case = Case(3, 5, 10, 20, direction="training", batch=2, heads=3)
        assert case.flops == 6 * benchmark.training_flops(10, 20, 3, 5)

    def test_inputs_are_channel_first_and_hot(self):
        case = Case(64, 32, 300, 200, direction="training", unary=True)
        inputs = make_inputs(case)
        for x in (inputs.query, inputs.key, inputs.value):
            assert x.stride(-2) == 1 and x.requires_grad
        assert len(inputs.leaves) == 4
        centred = inputs.query - inputs.query.mean(-2, keepdim=True)
        logits = case.scale * centred @ inputs.key.transpose(-1, -2)
        assert 2 < logits.std() < 8
        assert inputs.query.mean(-2).abs().max() > 0.5


class TestTiming:
    def entry(self, name, seconds, **options):
        left = iter(seconds)
        return timing.Entry(name, lambda: next(left), **options)

    def test_best_and_median(self):
        entries = [self.entry("a", [0.5, 0.1, 0.3, 9.0]), self.entry("b", [1.0, 2.0, 3.0, 4.0])]
        timing.interleave(entries, clock=lambda call: call(), budget=0.0, least=3, most=4)
        a, b = entries
        assert a.samples == [0.5, 0.1, 0.3] and b.samples == [1.0, 2.0, 3.0]
        assert (a.best, a.median) == (0.1, 0.3) and (b.best, b.median) == (1.0, 2.0)

    def test_rounds_are_interleaved(self):
        calls = []
        entries = [timing.Entry(name, lambda name=name: calls.append(name) or 0.0) for name in "abc"]
        timing.interleave(entries, clock=lambda call: call(), budget=100.0, most=5)
        assert [sorted(calls[i : i + 3]) for i in range(0, 15, 3)] == [["a", "b", "c"]] * 5

    def test_roof_takes_its_share_only(self):
        roof, method = self.entry("roof", [1.0] * 99, share=0.25), self.entry("m", [0.1] * 99)
        timing.interleave([roof, method], clock=lambda call: call(), budget=100.0, most=50)
        assert len(method.samples) == 50 and len(roof.samples) == 3

    def test_failure_is_kept_and_others_go_on(self):
        def fail():
            raise RuntimeError("no kernel\nand more")

        bad, good = timing.Entry("bad", fail), timing.Entry("good", lambda: 1.0)
        timing.interleave([bad, good], clock=lambda call: call(), budget=0.0)
        assert bad.failure == "RuntimeError: no kernel" and not bad.samples
        assert len(good.samples) == 3


class TestGate:
    """A wrong method is never timed."""

    @pytest.mark.parametrize("unary", [False, True])
    @pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", "fp16"])
    def test_right_methods_pass(self, dtype, unary):
        options = replace(SMALL, dtypes=(dtype,), unary=unary, check_only=True, shapes=((16, 32), (16, 300)), batch=2)
        options = replace(options, heads=2)
        document = benchmark.run(options)
        for case in document["cases"]:
            for record in case["results"]:
                assert record["status"] in ("ok", "skipped"), record
        assert benchmark.passed(document)

    def test_chunks_of_several_and_a_partial_one(self, monkeypatch):
        monkeypatch.setattr(methods, "CHUNK_ROWS", 40)
        document = benchmark.run(replace(SMALL, peers=("chunks",), check_only=True))
        assert all(record["status"] == "ok" for case in document["cases"] for record in case["results"])

    def test_slices(self, monkeypatch):
        monkeypatch.setattr(methods, "FUSED_WIDTH", 16)
        document = benchmark.run(replace(SMALL, peers=("sdpa_slices",), check_only=True))
        assert [record["status"] for record in document["cases"][0]["results"]] == ["ok", "ok"]

    def test_wrong_values(self, monkeypatch):
        with_wrong(monkeypatch, lambda case, right: lambda *x: right(*x) * (1 + 1e-5))
        document = benchmark.run(SMALL)
        for case in document["cases"]:
            own = case["results"][0]
            assert own["status"] == "wrong" and "output" in own["reason"] and "seconds" not in own
            assert case["ratio"] is None
        assert not benchmark.passed(document)

    def test_wrong_gradient(self, monkeypatch):
        def wrong(case, right):
            return lambda q, k, v, m: right(q, k * 1.0001 - k.detach() * 0.0001, v, m)

        with_wrong(monkeypatch, wrong)
        forward, training = benchmark.run(SMALL)["cases"]
        assert forward["results"][0]["status"] == "ok"
        assert training["results"][0]["status"] == "wrong" and "grad_key" in training["results"][0]["reason"]

    def test_mean_missing_from_a_gradient(self, monkeypatch):
        """Right values from a query centred by a constant; but then its gradient keeps a mean that it must not have."""

        def wrong(case, right):
            run = methods.eager(replace(case, whiten=False))
            return lambda q, k, v, m: run(q - q.mean(-2, keepdim=True).detach(), k, v, m)

        with_wrong(monkeypatch, wrong)
        forward, training = benchmark.run(replace(SMALL, check_only=True))["cases"]
        assert forward["results"][0]["status"] == "ok"
        assert training["results"][0]["status"] == "wrong" and "grad_query" in training["results"][0]["reason"]

    def test_unwhitened(self, monkeypatch):
        with_wrong(monkeypatch, lambda case, right: methods.eager(replace(case, whiten=False)))
        assert not benchmark.passed(benchmark.run(replace(SMALL, check_only=True)))

    def test_nan(self, monkeypatch):
        with_wrong(monkeypatch, lambda case, right: lambda *x: right(*x) * math.nan)
        assert not benchmark.passed(benchmark.run(replace(SMALL, check_only=True)))

    def test_few_rows_see_every_key(self):
        """A fault at one key of many shows in rows that were chosen without it."""
        case = Case(16, 8, 500, 500, "fp64", "training")
        inputs = make_inputs(case)
        truth = check.Truth(case, inputs, rows=5)
        run = methods.eager(case)
        output = run(*inputs)
        grad_output = torch.zeros_like(output)
        grad_output[..., truth.rows, :] = truth.grad_output
        grads = torch.autograd.grad(output, inputs.leaves, grad_output)
        results = dict(zip(["output", *check.gradient_names(inputs)], (output, *grads), strict=True))
        assert truth.verdict(results, own=True)[2] is None
        results["grad_value"][..., 123, :] *= 1.01
        assert "grad_value" in truth.verdict(results, own=True)[2]


class TestPeaks:
    def test_follow_the_width_of_the_vectors(self):
        """Twice the elements in a vector, twice the operations; a set with wider vectors is not slower."""
        peaks = runner.cpu_peaks(("fp32", "fp64", "fp16"), 1)
        assert set(peaks) == {name for name, supported in _C.cpu_capabilities() if supported}
        for of in peaks.values():
            assert 1.5 < of["fp32"] / of["fp64"] < 2.7
            assert of["fp16"] == pytest.approx(of["fp32"], rel=0.3)  # widened to float32
        assert max(peaks.values(), key=lambda of: of["fp32"])["fp32"] < 1.4 * list(peaks.values())[-1]["fp32"]

    def test_no_product_exceeds_them(self):
        """On one thread, so that nothing but the clock's rate can differ between the two."""
        a = torch.randn(512, 512)
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            seconds = min(timing.CpuClock()(lambda: a @ a) for _ in range(20))
        finally:
            torch.set_num_threads(before)
        best = max(of["fp32"] for of in runner.cpu_peaks(("fp32",), 1).values())
        assert 2 * 512**3 / seconds / 1e9 < 1.15 * best

    def test_unknown_instruction_set(self):
        with pytest.raises(ValueError, match="not built or not supported"):
            _C.cpu_peak("mmx", "float32", 1)

    def test_are_printed_with_shares_of_them(self):
        document = benchmark.run(replace(SMALL, peers=(), directions=("forward",)))
        shown = Console(record=True, width=120, file=io.StringIO())
        for part in benchmark.tables(document):
            shown.print(part)
        text = shown.export_text()
        record = document["cases"][0]["results"][0]
        assert f"({record['roof_share']:.2f}, {record['peak_share']:.2f})" in text
        assert f"{document['config']['cpu']['capability']}, in use" in text
        for case in document["cases"]:  # a document from before there were peaks
            for figures in (case["roof"], *case["results"]):
                figures.pop("peak_share")
        del document["peaks"]
        for part in benchmark.tables(document):
            shown.print(part)
        assert f"({record['roof_share']:.2f})" in shown.export_text()


class TestRun:
    def test_document(self, tmp_path):
        saved = []
        document = benchmark.run(replace(SMALL, memory=True), save=saved.append)
        assert len(saved) == 2
        benchmark.save_json(tmp_path / "a" / "b.json")(document)
        assert benchmark.load(tmp_path / "a" / "b.json") == json.loads(json.dumps(document))
        peaks = document["peaks"][document["config"]["cpu"]["capability"]]
        for case in document["cases"]:
            assert case["roof"]["best_s"] == min(case["roof"]["seconds"])
            timed = {record["method"]: record for record in case["results"] if record["status"] == "ok"}
            assert {"dnl_ext", "eager", "sdpa_views", "sdpa_contiguous", "chunks"} <= timed.keys()
            for record in timed.values():
                assert len(record["seconds"]) >= 3 and record["best_s"] == min(record["seconds"])
                assert record["gflops"] == pytest.approx(case["case"]["flops"] / record["best_s"] / 1e9)
                assert record["roof_share"] == pytest.approx(record["gflops"] / case["roof"]["gflops"])
                assert record["peak_share"] == pytest.approx(record["gflops"] / peaks[case["case"]["dtype"]])
                assert record["memory_bytes"] >= 0
            best = max((record for name, record in timed.items() if name != "dnl_ext"), key=lambda r: r["gflops"])
            assert case["best_peer"] == best["method"]
            assert case["ratio"] == pytest.approx(timed["dnl_ext"]["gflops"] / best["gflops"])

    def test_raising_peer_is_a_line(self, monkeypatch):
        def build(case):
            raise RuntimeError("shared memory")

        monkeypatch.setitem(benchmark.METHODS, "eager", replace(benchmark.METHODS["eager"], build=build))
        document = benchmark.run(replace(SMALL, peers=("eager",)))
        record = document["cases"][0]["results"][1]
        assert record["status"] == "failed" and "shared memory" in record["reason"]
        assert benchmark.passed(document)

    def test_map_that_does_not_fit_is_left_out(self, monkeypatch):
        monkeypatch.setattr(runner, "available_bytes", lambda: 50_000)
        record = benchmark.run(replace(SMALL, peers=("eager",)))["cases"][0]["results"][1]
        assert record["status"] == "skipped" and "N x N" in record["reason"]

    def test_cuda_only_peers_are_skipped(self):
        document = benchmark.run(replace(SMALL, peers=("sdpa_flash",), check_only=True))
        assert document["cases"][0]["results"][1]["reason"] == "runs on cuda only"

    def test_unknown_peer(self):
        with pytest.raises(ValueError, match="peers"):
            benchmark.run(replace(SMALL, peers=("nobody",)))

    def test_second_candidate_is_tried(self, monkeypatch):
        def fail(*_):
            raise RuntimeError("does not fit")

        method = benchmark.METHODS["eager"]
        both = replace(method, build=lambda case: [fail, method.build(case)])
        monkeypatch.setitem(benchmark.METHODS, "eager", both)
        document = benchmark.run(replace(SMALL, peers=("eager",)))
        assert document["cases"][0]["results"][1]["status"] == "ok"

    def test_memory_of_the_first_of_several_functions(self, monkeypatch):
        """A method may build several to be tried in turn; the measuring process takes the first."""
        case = Case(8, 8, 16, 16)
        several = replace(benchmark.METHODS["eager"], build=lambda case: [lambda q, k, v, m: v, None])
        monkeypatch.setitem(benchmark.METHODS, "eager", several)
        assert "bytes" in memory._answer({"case": asdict(case), "method": "eager"})

    def test_memory_sees_the_map(self):
        """Plain PyTorch holds two N x N maps in the forward; a method without them holds far less."""
        n = 2048
        with CpuPeaks() as peaks:
            eager = peaks.peak(Case(16, 16, n, n), "eager")
            own = peaks.peak(Case(16, 16, n, n), "dnl_ext")
            with pytest.raises(RuntimeError, match="KeyError"):
                peaks.peak(Case(16, 16, 8, 8), "nobody")
        maps = 2 * n * n * 4
        assert 0.95 * maps < eager < 1.3 * maps
        assert own < 0.3 * maps


class TestCommand:
    def test_table_json_png(self, tmp_path):
        json_path, png_path = tmp_path / "out.json", tmp_path / "out.png"
        arguments = (
            "--shapes",
            "16,32;16,16",
            "--n",
            "64,128",
            "--dtype",
            "fp32",
            "--direction",
            "forward",
            "--memory",
        )
        arguments += ("--peers", "eager", "--budget", "0")
        result = bench(*arguments, "--json", str(json_path), "--png", str(png_path))
        assert result.exit_code == 0, result.output
        for word in ("dnl_ext", "eager", "plain product", "best peer", "N = 128", "peak MB"):
            assert word in result.output
        assert len(benchmark.load(json_path)["cases"]) == 4
        assert png_path.read_bytes().startswith(b"\x89PNG") and png_path.stat().st_size > 20_000
        again = bench("--load", str(json_path))
        assert again.exit_code == 0 and "N = 128" in again.output

    @pytest.mark.parametrize("small", [(), ("--small",)])
    def test_a_place_that_cannot_be_written_is_said_first(self, tmp_path, small):
        (tmp_path / "file").write_text("")
        for place in (tmp_path, tmp_path / "file" / "x.json"):
            result = bench(*small, "--json", str(place))
            assert result.exit_code == 2 and "--json: cannot write" in result.output
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_wrong_library_exits_1(self, monkeypatch):
        with_wrong(monkeypatch, lambda case, right: lambda *x: right(*x) * 1.1)
        result = bench("--shapes", "16,16", "--n", "64", "--dtype", "fp32", "--check-only")
        assert result.exit_code == 1 and "wrong" in result.output

    @pytest.mark.parametrize(
        "arguments",
        [
            ("--shapes", "16"),
            ("--n", "0"),
            ("--dtype", "int8"),
            ("--peers", "nobody"),
            ("--direction", "sideways"),
            ("--load", "no_such.json"),
        ],
    )
    def test_bad_arguments_exit_2(self, arguments):
        assert bench(*arguments).exit_code == 2

    def test_load_says_what_is_wrong(self, tmp_path):
        path = tmp_path / "x.json"
        path.write_text('{"schema": 1}')
        with pytest.raises(ValueError, match="has no 'date'"):
            benchmark.load(path)
