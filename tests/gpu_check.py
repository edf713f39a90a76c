"""All that only a GPU can show, from a bare checkout, in a few minutes: `make gpu-check`.

    python tests/gpu_check.py [--minutes 8] [--steps build figures test ...] [--out benchmarks/results]

Steps, in this order, so that what matters most is known first; each has a share of the time, and what is left over goes
to the last. Every path runs by itself, under DNL_EXT_CUDA_PATH:

    build      the extension, for this GPU
    figures    every path, checked against float64, then timed beside eager PyTorch and SDPA: the report's first lines
    test       tests/kernels/test_cuda.py without the emulator: values, layouts, several chunks, streams, graph capture
               and replay, memory, N * N > 2^31
    values     random cases against float64
    tune       `python -m dnl_ext tune` on two shapes: what it would choose here
    pieces     gpu_pieces.py: library products, the host's share of a call, large means, the first call
    sanitize   compute-sanitizer where it is installed: memcheck, racecheck, synccheck, initcheck on small cases
    repeats    20 shapes, 250 times each, forward and backward, bit-equal
    together   two processes on the GPU at once, both right
    profile    Nsight Compute where it is installed: DRAM bytes, tensor-core instructions and stalls of each kernel
    bench      `python -m dnl_ext bench` in the other types and shapes
    compiled   beside torch.compile and FlexAttention, which compile first

Writes check.json and check.md into a folder named after the device after every step, so that a run that is cut loses
nothing. check.md begins with the answers: are all paths right, is each faster than PyTorch, how far was the model off.
A step that runs out of time is said to have, and fails nothing; --minutes 20 gives each sanitizer two minutes. Prints
PASS, or each failure; exits 1 if any step failed, 3 where there is no GPU that torch can use. Settings: CUDA_HOME,
TORCH_CUDA_ARCH_LIST, MAX_JOBS, as for a build.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from dataclasses import asdict

import commands
import gpu_report
from gpu_report import Report, Step

ROOT = pathlib.Path(__file__).parents[1]
STEPS = (
    *("build", "figures", "test", "values", "tune", "pieces", "sanitize"),
    *("repeats", "together", "profile", "bench", "compiled"),
)
SHARES = {
    "build": 0.45,
    "test": 0.2,
    "values": 0.08,
    "tune": 0.08,
    "pieces": 0.12,
    "repeats": 0.06,
    "together": 0.04,
    "profile": 0.08,
}
#: Of the time, for compute-sanitizer's tools: 2 minutes each out of 20.
SANITIZERS = {"memcheck": 0.12, "racecheck": 0.12, "synccheck": 0.1, "initcheck": 0.08}
SANITIZED_CASES = 400
#: Seconds of a worker under a sanitizer before its first case and after its last: importing torch takes that.
SANITIZER_START = 20.0
#: Rows of our buffers are read in whole quads, and what lies beyond the last column is masked after the read: initcheck
#: reports that. Its reports are counted and shown, and fail nothing.
INFORMATIVE = {"initcheck"}
TIMED_OUT = 124
#: Of Nsight Compute: bytes from and to DRAM, instructions, those of tensor cores, and the reasons that warps wait.
METRICS = (
    "dram__bytes_read.sum,dram__bytes_write.sum,sm__inst_executed.sum,sm__inst_executed_pipe_tensor.sum,"
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio,"
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio,"
    "smsp__average_warps_issue_stalled_short_scoreboard_per_issue_active.ratio,"
    "smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio"
)


def find_device():
    """What torch knows of the GPU, or None."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    p = torch.cuda.get_device_properties(0)
    return {
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_bytes": p.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def built_paths():
    """The CUDA paths of the extension, once it is built."""
    from dnl_ext import _C

    return _C.cuda_paths()


class Check:
    def __init__(self, device, seconds, out):
        self.end = time.time() + seconds
        self.seconds = seconds
        self.report = Report(device, modelled=gpu_report.modelled(device["name"]))
        self.out = out

    @property
    def left(self):
        return self.end - time.time()

    def call(self, command, share, **environment):
        """(exit status, output); a command gets its share of the whole time at most, and no more than is left."""
        limit = max(5.0, min(self.left, share * self.seconds))
        return commands.run(command, limit, **environment)

    def record(self, name, began, passes, detail="", status=None, path=None):
        step = Step(name, status or ("passed" if passes else "failed"), time.time() - began, detail, path)
        self.report.steps.append(step)
        print(f"{step.name:28} {step.status:9} {step.seconds:5.0f} s  {' '.join(detail.split())[-200:]}", flush=True)
        gpu_report.write(self.report, self.out)
        return step.status != "failed"

    def ended(self, name, began, status, detail, path=None):
        """Records a command by its exit status."""
        return self.record(name, began, status == 0, detail, "timed out" if status == TIMED_OUT else None, path)

    def cases(self, name, kind, first, count, seconds, path=None):
        """Cases of prove_cases.py on the GPU, by one path."""
        began = time.time()
        command = [sys.executable, "prove_cases.py", kind, first, count, f"{min(seconds, max(5, self.left)):.0f}"]
        environment = {"DNL_EXT_CUDA_PATH": path} if path else {}
        status, text = self.call(command, (seconds + 40) / self.seconds, **environment)
        try:
            result = json.loads(text.strip().splitlines()[-1])
        except (json.JSONDecodeError, IndexError):
            return self.ended(name, began, status or 1, f"exit {status}: {text[-800:]}", path)
        detail = f"{result['cases']} of {count} cases, {len(result['failed'])} failed {result['failed'][:3] or ''}"
        return self.record(name, began, not result["failed"] and result["cases"] > 0, detail, path=path)

    # ------------------------------------------------------------------------------------------------------------------

    def build(self):
        began = time.time()
        status, text = self.call(
            [sys.executable, ROOT / "setup.py", "build_ext", "--inplace"],
            SHARES["build"],
            FORCE_CUDA="1",
            MAX_JOBS=os.environ.get("MAX_JOBS", str(os.cpu_count() or 1)),
            TORCH_CUDA_ARCH_LIST=os.environ.get("TORCH_CUDA_ARCH_LIST", build_arch(self.report.device["capability"])),
        )
        if not self.record("build", began, status == 0, text[-1500:] if status else ""):
            return False
        began = time.time()
        status, text = self.call([sys.executable, "check_cuda_build.py"], 0.1)
        return self.record("operators registered", began, status == 0, text[-500:])

    def figures(self):
        self.time(gpu_report.timings(built_paths(), [gpu_report.FIRST]))

    def test(self):
        paths = built_paths()
        for path in paths:
            began = time.time()
            # As many of the 2,000 random cases as make up the `values` step run there, under a limit of time.
            skip = ("--no-emulator", "--deselect", "kernels/test_cuda.py::TestValues::test_error_is_within_the_bar")
            chosen = () if path == "chain" else ("-k", "bfloat16 or float16 or tf32")
            command = [sys.executable, "-m", "pytest", "-q", "-x", "kernels/test_cuda.py", *skip, *chosen]
            status, text = self.call(command, SHARES["test"] / len(paths), DNL_EXT_CUDA_PATH=path)
            self.ended(f"test_cuda.py, {path}", began, status, text[-1500 if status else -120 :], path)

    def values(self):
        paths = built_paths()
        for path in paths:
            self.cases(f"values, {path}", "cuda", 400_000, 4000, SHARES["values"] / len(paths) * self.seconds, path)

    def repeats(self):
        paths = built_paths()
        for path in paths:
            self.cases(f"repeats, {path}", "cuda-repeats", 0, 20, SHARES["repeats"] / len(paths) * self.seconds, path)

    def tune(self):
        began = time.time()
        command = [sys.executable, "-m", "dnl_ext", "tune", "--dtype", "bf16",
                   "--shape", "4096,256,256", "--shape", "16384,256,512"]  # fmt: skip
        file = self.out / "paths.json"
        status, text = self.call(command, SHARES["tune"], DNL_EXT_TUNE_FILE=str(file.resolve()))
        self.ended("tune", began, status, text[-1000:])

    def pieces(self):
        """A piece's lines count as far as they came."""
        for name in gpu_report.PIECES:
            began = time.time()
            status, text = self.call([sys.executable, "gpu_pieces.py", name], SHARES["pieces"] / 2)
            found = []
            for row in text.splitlines():
                with contextlib.suppress(json.JSONDecodeError, TypeError, KeyError):
                    found.append({key: json.loads(row)[key] for key in ("what", "value", "unit", "ok")})
            self.report.pieces[name] = found
            wrong = [f"{x['what']}: {x['value']:.3g} {x['unit']}" for x in found if x["ok"] is False]
            detail = "; ".join(wrong) or (text[-600:] if status else f"{len(found)} figures")
            self.ended(name, began, status or bool(wrong), detail)

    def together(self):
        began = time.time()
        command = [sys.executable, "prove_cases.py", "cuda"]
        ends = []
        for first in (500_000, 600_000):
            arguments = [*command, str(first), "200", f"{SHARES['together'] * self.seconds:.0f}"]
            ends.append(
                subprocess.Popen(
                    arguments,
                    cwd=ROOT / "tests",
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "PYTHONPATH": str(ROOT)},
                )
            )
        problems, count = [], 0
        for process in ends:
            try:
                result = json.loads(process.communicate(timeout=max(5, self.left))[0].strip().splitlines()[-1])
                count += result["cases"]
                problems += result["failed"]
            except (subprocess.TimeoutExpired, json.JSONDecodeError, IndexError) as error:
                process.kill()
                problems.append(f"{type(error).__name__}: {error}")
        self.record("two processes at once", began, not problems and count > 0, f"{count} cases {problems[:3] or ''}")

    def sanitize(self):
        tool = shutil.which("compute-sanitizer")
        if not tool:
            self.record("compute-sanitizer", time.time(), True, "not installed", status="skipped")
            return
        for name, share in SANITIZERS.items():
            began = time.time()
            seconds = min(share * self.seconds, self.left)
            if seconds < 1.5 * SANITIZER_START:
                self.record(name, began, True, f"{seconds:.0f} s are too few", status="skipped")
                continue
            # The worker ends by itself: cut, the tool would not say what it has found.
            command = [tool, "--tool", name, "--kernel-name", "kernel_substring=dnl", "--error-exitcode", "99",
                       sys.executable, "prove_cases.py", "cuda", 700_000, SANITIZED_CASES,
                       f"{seconds - SANITIZER_START:.0f}"]  # fmt: skip
            status, text = self.call(command, seconds / self.seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            summary = [row for row in text.splitlines() if "ERROR SUMMARY" in row or "RACECHECK SUMMARY" in row]
            detail = " ".join(summary) or text[-800:]
            if name in INFORMATIVE and status == 99:
                self.record(name, began, True, f"reads of padding: {detail}", status="reported")
            else:
                self.ended(name, began, status, detail)

    def profile(self):
        tool = shutil.which("ncu")
        if not tool:
            self.record("Nsight Compute", time.time(), True, "not installed", status="skipped")
            return
        paths = built_paths()
        for path in paths:
            began = time.time()
            command = [tool, "--csv", "--metrics", METRICS, "--kernel-name", "regex:dnl|softmax|step|fused|map",
                       "--launch-count", "40", sys.executable, "gpu_pieces.py", "first"]  # fmt: skip
            status, text = self.call(command, SHARES["profile"] / len(paths), DNL_EXT_CUDA_PATH=path)
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / f"ncu-{path}.csv").write_text(text)
            detail = f"ncu-{path}.csv" if status == 0 else text[-400:]
            self.record(f"Nsight Compute, {path}", began, True, detail, status="reported" if status == 0 else "skipped")

    def fits(self, timing):
        """Whether the path can take the timing's calls on this GPU, forward or backward: tiles of TF32 are large."""
        from dnl_ext import _C

        capability = int(self.report.device["capability"].replace(".", ""))
        dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(timing.dtype, "float32")
        found = []
        for backward in (False, True):
            with contextlib.suppress(NotImplementedError):
                plan = _C.cuda_plan(dtype, 1, 4096, 4096, *timing.shape, capability=capability, backward=backward,
                                    tf32=timing.dtype == "tf32", path=timing.path)  # fmt: skip
                found.append(plan["path"])
        # A forward that is refused raises; a backward that is has the chain's.
        return len(found) == 2 and timing.path in found

    def bench(self):
        self.time(gpu_report.timings(built_paths(), gpu_report.LATER))

    def compiled(self):
        self.time(gpu_report.compiling())

    def time(self, wanted):
        """Those of the timings that the GPU can run and that fit into what is left."""
        for timing in wanted:
            if not self.fits(timing):
                continue
            # Planned anew before each: estimates err, time does not.
            if timing not in gpu_report.plan([timing], self.left):
                self.report.left_out.append(timing.name)
                continue
            began = time.time()
            budget = f"{max(1, timing.seconds / 2):.0f}"
            file = self.out / "timings" / f"{timing.name}.json"  # written after every case
            command = [sys.executable, "-m", "dnl_ext", "bench", "--device", "cuda", *timing.options,
                       "--budget", budget, "--memory", "--json", file.resolve()]  # fmt: skip
            status, text = self.call(command, 1.0, DNL_EXT_CUDA_PATH=timing.path)
            document = json.loads(file.read_text()) if file.exists() else {}
            self.report.timings.append({"timing": asdict(timing), "document": document})
            self.ended(f"bench {timing.name}", began, status, text[-600:] if status else "", timing.path)


def build_arch(capability):
    """TORCH_CUDA_ARCH_LIST of a build for this GPU alone: with what only the very architecture has, on Hopper."""
    return "9.0a" if capability == "9.0" else capability


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Exits 0 if all passed, 1 if a step failed, 3 without a GPU."
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default 8)")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks/results", help="folder of the results")
    options = parser.parse_args(arguments)
    device = find_device()
    if device is None:
        print("gpu_check: no GPU that torch can use here", file=sys.stderr)
        return 3
    check = Check(device, options.minutes * 60, options.out / gpu_report.folder_name(device["name"]))
    sys.path.insert(0, str(ROOT))  # for what is built in place
    for step in STEPS:
        if step not in options.steps:
            continue
        if check.left <= 0:
            check.record(step, time.time(), True, "no time was left", status="skipped")
        elif getattr(check, step)() is False and step == "build":
            break  # nothing else can run
    gpu_report.write(check.report, check.out)
    print(*gpu_report.answers(check.report), sep="\n")
    failed = check.report.failed
    for step in failed:
        print(f"FAILED {step.name}: {step.detail}")
    print(f"{'FAIL' if failed else 'PASS'}: {len(check.report.steps)} steps, results in {check.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
