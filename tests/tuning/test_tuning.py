"""Checking, timing and choosing paths on the emulated device, with made-up times and planted faults."""

import threading
import warnings

import pytest
import torch

import dnl_ext
from dnl_ext import _C, _tuned, tuning
from dnl_ext._tuned import Call, Machine
from dnl_ext.tuning import advice, trial, tuner

MACHINE = Machine("emulated", "1", "2", "3")
CALL = Call("bfloat16", False, (1, 40, 56, 16, 24))
BACKWARD = Call("bfloat16", True, (1, 40, 56, 16, 24))
TARGET = tuning.Target(torch.device("cpu"), MACHINE, 80, 4)


@pytest.fixture(autouse=True)
def own_file(monkeypatch, tmp_path):
    monkeypatch.setenv("DNL_EXT_TUNE_FILE", str(tmp_path / "paths.json"))
    monkeypatch.delenv("DNL_EXT_CUDA_PATH", raising=False)
    monkeypatch.setattr(_tuned, "machine_of", lambda device: MACHINE)
    monkeypatch.setattr(tuner, "SMALL", ((1, 33, 70), (2, 17, 25)))
    monkeypatch.setattr(tuner, "LARGE", (32, 90))
    _tuned.forget()
    _C.forget_paths()
    yield
    _tuned.forget()
    _C.forget_paths()


@pytest.fixture
def times(monkeypatch):
    """Made-up milliseconds of each path."""
    made_up = {"chain": 2.0, "fused": 1.0}
    monkeypatch.setattr(tuner, "clock_for", lambda device: lambda call: (call(), 1e-3 * made_up[call.args[0]])[1])
    return made_up


@pytest.fixture
def plant(monkeypatch):
    """plant(path, fault): the trials of a path go through fault(results)."""
    faults, right = {}, trial.Trial.run

    def run(self, path):
        return faults.get(path, lambda results: results)(right(self, path))

    monkeypatch.setattr(trial.Trial, "run", run)
    return faults.__setitem__


def off(results):
    """The last result 5 % off: of a forward its output, of a backward the gradient of the value."""
    return *results[:-1], results[-1] * 1.05


@pytest.fixture
def endless():
    """A fault that does not end before the test does, and then goes no further: the emulator has one thread."""
    end = threading.Event()

    def fault(results):
        end.wait()
        raise RuntimeError("the test is over")

    yield fault
    end.set()


@pytest.fixture
def calls_of(monkeypatch):
    """The paths that the emulated operators took, in order: those of trials are left out."""
    taken, ask = [], dnl_ext._path_of_call

    def query(*question):
        answer = ask(*question)
        taken.append(answer[0])
        return answer

    _C.set_path_query(query)
    yield taken
    _C.set_path_query(ask)


def attend(queries=40, keys=56, width=16, channels=24, dtype=torch.bfloat16):
    q, k, v = (torch.randn(1, c, n).to(dtype).mT for n, c in ((queries, width), (keys, width), (keys, channels)))
    return dnl_ext.pairwise_attention(q, k, v)


class TestTune:
    def test_the_fastest_is_chosen_and_taken(self, emulated, times, calls_of):
        attend()
        (outcome,), unwritten = tuning.tune([CALL], TARGET)
        assert outcome.path == "fused" and outcome.milliseconds == times and not outcome.wrong and not unwritten
        attend()
        assert calls_of == ["chain", "fused"]

    def test_the_explanation_has_date_and_times(self, emulated, times):
        from dnl_ext.config import cuda_plan

        tuning.tune([CALL], TARGET)
        plan = cuda_plan("bfloat16", CALL.sizes, dict.fromkeys(LAYOUT, True), 80, 4, MACHINE)
        assert plan["path"].startswith("fused") and plan["why"].startswith("measured on 2")
        assert plan["why"].endswith("fused 1 ms, chain 2 ms") and "dnl-ext tune" in plan["why_backward"]

    @pytest.mark.parametrize("fused", [2.5, 1.99])
    def test_the_chain_stays_where_others_are_no_faster(self, emulated, times, fused):
        times["fused"] = fused
        (outcome,), _ = tuning.tune([CALL], TARGET)
        assert outcome.path == "chain" and outcome.milliseconds["fused"] == fused

    @pytest.mark.parametrize("call", [CALL, BACKWARD])
    @pytest.mark.parametrize("path", ["fused", "chain"])
    def test_what_is_wrong_is_never_chosen(self, emulated, times, plant, call, path):
        plant(path, off)
        (outcome,), _ = tuning.tune([call], TARGET)
        assert outcome.path == ("chain" if path == "fused" else "fused") and path not in outcome.milliseconds
        assert "plain PyTorch's error" in outcome.wrong[path]
        assert f"dnl-ext tune --check-only --path {path} --shape 1,40,56,16,24" in outcome.wrong[path]

    def test_what_raises_is_wrong(self, emulated, times, plant):
        def fault(results):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        plant("fused", fault)
        (outcome,), _ = tuning.tune([CALL], TARGET)
        assert outcome.path == "chain" and "illegal memory access" in outcome.wrong["fused"]

    def test_results_that_differ_between_runs_are_wrong(self, emulated, times, plant):
        plant("fused", lambda results: tuple(x + 1e-2 * torch.randn_like(x) for x in results))
        (outcome,), _ = tuning.tune([CALL], TARGET)
        assert outcome.path == "chain" and "two runs differ" in outcome.wrong["fused"]

    def test_what_does_not_end_is_given_up(self, emulated, times, plant, endless, monkeypatch):
        monkeypatch.setattr(trial, "PATIENCE", 20.0)  # of the chain, which ends, on a busy machine
        plant("fused", endless)
        assert "no end within 0.5 s" in trial.fault(trial.Problem(CALL, TARGET.device), "fused", patience=0.5)
        assert trial.fault(trial.Problem(CALL, TARGET.device), "chain") == ""

    def test_no_memory_is_no_fault(self, emulated, times, monkeypatch):
        monkeypatch.setenv("DNL_EXT_EMULATED_FULL", "1")
        (outcome,), _ = tuning.tune([CALL], TARGET)
        assert outcome.path is None and outcome.skipped == "out of GPU memory" and not outcome.wrong
        assert _tuned.known().measured == []

    def test_only_paths_that_can_run_are_tried(self):
        assert trial.runnable(CALL, 80, 4) == ["chain", "fused"]
        assert trial.runnable(Call("bfloat16", False, (1, 9, 9, 300, 8)), 80, 4) == ["chain"]
        assert trial.runnable(Call("float32", False, (1, 9, 9, 16, 8)), 80, 4) == ["chain", "fused"]
        assert trial.runnable(Call("float32", True, (1, 9, 9, 16, 8)), 80, 4) == ["chain"]
        assert trial.runnable(CALL, 80, 4, ["fused"]) == ["fused"]
        assert trial.runnable(CALL, 75, 4) == []

    def test_a_layout_is_that_of_the_call(self):
        inputs = trial.Problem(Call("float16", False, (2, 5, 7, 3, 4), (True, False, True)), TARGET.device).inputs()
        assert [x.stride(-1) == 1 for x in (inputs.query, inputs.key, inputs.value)] == [False, True, False]

    def test_thread_that_measures_has_none_of_the_caller_s_state(self):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            state = trial.finish(
                lambda settle: (torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")), TARGET.device, 30
            )
        assert state == (False, False)

    def test_a_forced_path_is_that_of_one_thread(self):
        def plan():
            return _C.cuda_plan("bfloat16", 1, 64, 64, 16, 16)["path"]

        with trial.forced("fused"):
            assert plan() == "fused" and trial.finish(lambda settle: plan(), TARGET.device, 30) == "chain"
        assert plan() == "chain"


class TestFirstCall:
    def test_takes_the_chain_and_measures_nothing_by_default(self, emulated, calls_of, times):
        for _ in range(3):
            attend()
        assert calls_of == ["chain"] and _tuned.known().measured == []  # asked once

    def test_measures_a_new_shape_where_that_is_asked_for(self, emulated, calls_of, times, monkeypatch):
        monkeypatch.setenv("DNL_EXT_TUNE", "1")
        for keys in (56, 56, 60, 56):
            attend(keys=keys)
        assert calls_of == ["fused"] * 3  # 56 was asked for again, and not measured, after 60 was
        assert [record.call.sizes[2] for record in _tuned.known().measured] == [56, 60]

    def test_measures_a_backward_too(self, emulated, calls_of, times, monkeypatch):
        monkeypatch.setenv("DNL_EXT_TUNE", "1")
        q = torch.randn(1, 40, 16, dtype=torch.bfloat16, requires_grad=True)
        k, v = torch.randn(1, 56, 16).bfloat16(), torch.randn(1, 56, 24).bfloat16()
        dnl_ext.pairwise_attention(q, k, v).sum().backward()
        assert [record.call.backward for record in _tuned.known().measured] == [False, True]

    def test_warns_of_a_wrong_path_and_takes_another(self, emulated, calls_of, times, plant, monkeypatch):
        monkeypatch.setenv("DNL_EXT_TUNE", "1")
        plant("fused", off)
        with pytest.warns(RuntimeWarning, match=r"--path fused .*it is not taken"):
            attend()
        assert calls_of == ["chain"]

    def test_goes_on_where_warnings_are_errors(self, emulated, calls_of, times, plant, monkeypatch):
        monkeypatch.setenv("DNL_EXT_TUNE", "1")
        plant("fused", off)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attend()
        attend()
        assert calls_of == ["chain"]

    def test_no_memory_to_measure_in(self, emulated, calls_of, times, monkeypatch):
        def full(*arguments, **options):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        monkeypatch.setenv("DNL_EXT_TUNE", "1")
        monkeypatch.setattr(tuner, "fault", full)
        with pytest.warns(RuntimeWarning, match="could not be measured"):
            attend()
        attend()
        assert calls_of == ["chain"]

    def test_float32_is_measured_only_with_tf32(self, emulated, calls_of, times, monkeypatch, allow_tf32):
        monkeypatch.setenv("DNL_EXT_TUNE", "1")
        allow_tf32(False)
        for _ in range(2):
            attend(dtype=torch.float32)
        assert calls_of == ["chain", "chain"] and _tuned.known().measured == []

    def test_another_thread_does_not_wait(self, emulated, calls_of, times, monkeypatch):
        monkeypatch.setenv("DNL_EXT_TUNE", "1")
        with advice._at_work:
            attend()
        attend()
        assert calls_of == ["chain", "fused"]

    def test_is_never_in_a_capture(self, calls_of, times, monkeypatch):
        monkeypatch.setenv("DNL_EXT_TUNE", "1")
        monkeypatch.setattr(advice, "capturing", lambda device: True)
        monkeypatch.setattr(advice, "_measure", lambda *a: pytest.fail("measured"))
        question = (0, 80, 4, "bfloat16", False, CALL.sizes, dict.fromkeys(LAYOUT, True))
        assert tuning.advise(*question) == ("chain", False)  # and asked for again
        monkeypatch.setattr(_tuned, "DEFAULTS", (_tuned.Default("fused", (80, 80), False, ("bfloat16",), 512),))
        monkeypatch.delenv("DNL_EXT_TUNE")
        monkeypatch.setattr(advice, "_check", lambda *a: pytest.fail("checked"))
        assert tuning.advise(*question) == ("chain", False)

    def test_an_error_in_the_query_is_said_and_the_chain_taken(self, emulated, monkeypatch):
        said = []
        monkeypatch.setattr("sys.unraisablehook", said.append)
        _C.set_path_query(lambda *question: 1 / 0)
        try:
            assert attend().isfinite().all()
        finally:
            _C.set_path_query(dnl_ext._path_of_call)
        assert said and said[0].exc_type is ZeroDivisionError


LAYOUT = ("query_channel_first", "key_channel_first", "value_channel_first")


class TestSelfCheck:
    @pytest.fixture(autouse=True)
    def default(self, monkeypatch):
        monkeypatch.setattr(_tuned, "DEFAULTS", (_tuned.Default("fused", (80, 89), False, ("bfloat16",), 512),))

    def test_a_default_is_taken_once_it_is_found_right(self, emulated, calls_of):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attend()
            attend(keys=60)
        assert calls_of == ["fused", "fused"]
        assert [verdict.reason for verdict in _tuned.known().verdicts] == [""]

    @pytest.mark.parametrize("fault", ["off", "endless"])
    def test_a_default_that_fails_is_off_with_one_warning(self, emulated, calls_of, plant, request, monkeypatch, fault):
        plant("fused", off if fault == "off" else request.getfixturevalue("endless"))
        if fault == "endless":
            check = tuner.self_check
            monkeypatch.setattr(advice, "self_check", lambda *a: check(*a, patience=0.5))
        with pytest.warns(RuntimeWarning, match=r"dnl-ext tune --check-only --path fused .* takes the chain") as said:
            attend()
            attend(keys=60)
        assert len(said) == 1 and calls_of == ["chain", "chain"]
        _tuned.forget()  # as another process would read it
        assert "self-check" in _tuned.choice(MACHINE, 80, CALL).why

    def test_a_default_that_cannot_take_a_call_is_not_checked_for_it(self, emulated, calls_of):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attend(width=300)
        assert calls_of == ["chain"] and _tuned.known().verdicts == []

    def test_the_explanation_is_what_a_call_takes(self, emulated, calls_of):
        from dnl_ext.config import cuda_plan

        layout = dict.fromkeys(LAYOUT, True)
        assert "after a self-check" in cuda_plan("bfloat16", CALL.sizes, layout, 80, 4, MACHINE)["why"]
        attend()
        plan = cuda_plan("bfloat16", CALL.sizes, layout, 80, 4, MACHINE)
        assert "self-check passed" in plan["why"] and plan["path"].startswith("fused")
        assert plan["backward"].startswith("GEMM chain") and "dnl-ext tune" in plan["why_backward"]
