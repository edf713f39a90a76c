"""All that only a GPU can show, from a bare checkout, in a few minutes: `make gpu-check`.

    python tests/gpu_check.py [--minutes 8] [--steps build test sanitize ...] [--out benchmarks/results]

Steps, in this order; each has a share of the time, and what is left over goes to timings:

    build      the extension, for this GPU
    test       tests/kernels/test_cuda.py: values, layouts, several chunks, streams, graph capture and replay, memory,
               N * N > 2^31; then what the fused path takes, under DNL_EXT_CUDA_PATH=fused
    values     random cases against float64, chain and fused
    repeats    20 shapes, 250 times each, forward and backward, bit-equal, chain and fused
    together   two processes on the GPU at once, both right
    sanitize   compute-sanitizer where it is installed: memcheck, racecheck, synccheck, initcheck on 100 small cases
    bench      `python -m dnl_ext bench` in bf16, fp16, fp32 with and without TF32 beside every peer, most important
               sizes first

Writes check.json and check.md into a folder named after the device. Prints PASS, or each failure; exits 1 if any step
failed, 3 where there is no GPU that torch can use. Settings: CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, as for a build.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import commands
import gpu_report
from gpu_report import Report, Step

ROOT = pathlib.Path(__file__).parents[1]
STEPS = ("build", "test", "values", "repeats", "together", "sanitize", "bench")
SHARES = {"build": 0.45, "test": 0.25, "values": 0.08, "repeats": 0.08, "together": 0.05, "sanitize": 0.15}
SANITIZED_CASES = 100
# Rows of our buffers are read in whole quads, and what lies beyond the last column is masked after the read: initcheck
# reports that. Its reports are counted and shown, and fail nothing.
INFORMATIVE = {"initcheck"}


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


class Check:
    def __init__(self, device, seconds, out):
        self.end = time.time() + seconds
        self.seconds = seconds
        self.report = Report(device)
        self.out = out

    @property
    def left(self):
        return self.end - time.time()

    def call(self, command, share, **environment):
        """(exit status, output); a command gets its share of the whole time at most, and never less than 20 s."""
        limit = max(20.0, min(self.left, share * self.seconds))
        return commands.run(command, limit, **environment)

    def record(self, name, began, passes, detail="", status=None):
        step = Step(name, status or ("passed" if passes else "failed"), time.time() - began, detail)
        self.report.steps.append(step)
        print(f"{step.name:28} {step.status:8} {step.seconds:5.0f} s  {' '.join(detail.split())[-200:]}", flush=True)
        gpu_report.write(self.report, self.out)
        return passes

    def cases(self, name, kind, first, count, seconds, **environment):
        """Cases of prove_cases.py on the GPU."""
        began = time.time()
        command = [sys.executable, "prove_cases.py", kind, first, count, f"{min(seconds, max(5, self.left)):.0f}"]
        status, text = self.call(command, (seconds + 40) / self.seconds, **environment)
        try:
            result = json.loads(text.strip().splitlines()[-1])
        except (json.JSONDecodeError, IndexError):
            return self.record(name, began, False, f"exit {status}: {text[-800:]}")
        detail = f"{result['cases']} of {count} cases, {len(result['failed'])} failed {result['failed'][:3] or ''}"
        return self.record(name, began, not result["failed"] and result["cases"] > 0, detail)

    # ------------------------------------------------------------------------------------------------------------------

    def build(self):
        began = time.time()
        status, text = self.call(
            [sys.executable, ROOT / "setup.py", "build_ext", "--inplace"],
            SHARES["build"],
            FORCE_CUDA="1",
            MAX_JOBS=os.environ.get("MAX_JOBS", str(os.cpu_count() or 1)),
            TORCH_CUDA_ARCH_LIST=os.environ.get("TORCH_CUDA_ARCH_LIST", self.report.device["capability"]),
        )
        if not self.record("build", began, status == 0, text[-1500:] if status else ""):
            return False
        began = time.time()
        status, text = self.call([sys.executable, "check_cuda_build.py"], 0.1)
        return self.record("operators registered", began, status == 0, text[-500:])

    def test(self):
        for path, chosen in (("chain", ()), ("fused", ("-k", "bfloat16 or float16 or tf32"))):
            began = time.time()
            # As many of the 2,000 random cases as make up the `values` step run there, under a limit of time.
            skip = ("--deselect", "kernels/test_cuda.py::TestValues::test_error_is_within_the_bar")
            command = [sys.executable, "-m", "pytest", "-q", "-x", "kernels/test_cuda.py", *skip, *chosen]
            status, text = self.call(command, SHARES["test"] / 2, DNL_EXT_CUDA_PATH=path)
            self.record(f"test_cuda.py, {path}", began, status == 0, text[-1500 if status else -120 :])

    def values(self):
        for path in gpu_report.PATHS:
            self.cases(f"values, {path}", "cuda", 400_000, 4000, SHARES["values"] / 2 * self.seconds,
                       DNL_EXT_CUDA_PATH=path)  # fmt: skip

    def repeats(self):
        for path in gpu_report.PATHS:
            self.cases(f"repeats, {path}", "cuda-repeats", 0, 20, SHARES["repeats"] / 2 * self.seconds,
                       DNL_EXT_CUDA_PATH=path)  # fmt: skip

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
                result = json.loads(process.communicate(timeout=120)[0].strip().splitlines()[-1])
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
        for name in ("memcheck", "racecheck", "synccheck", "initcheck"):
            began = time.time()
            command = [tool, "--tool", name, "--kernel-name", "kernel_substring=dnl", "--error-exitcode", "99",
                       sys.executable, "prove_cases.py", "cuda", 700_000, SANITIZED_CASES, 3600]  # fmt: skip
            status, text = self.call(command, SHARES["sanitize"] / 4, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            summary = [line for line in text.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
            detail = " ".join(summary) or text[-800:]
            if name in INFORMATIVE and status == 99:
                self.record(name, began, True, f"reads of padding: {detail}", status="reported")
            else:
                self.record(name, began, status == 0, detail)

    def fits(self, timing):
        """Whether the fused forward has tiles for it on this GPU: those of TF32 are large."""
        if timing.path != "fused":
            return True
        from dnl_ext import _C

        capability = int(self.report.device["capability"].replace(".", ""))
        dtype = {"bf16": "bfloat16", "fp16": "float16", "tf32": "float32"}[timing.dtype]
        return "fused_tile" in _C.cuda_plan(dtype, 1, 4096, 4096, *timing.shape, capability=capability, tf32=True)

    def bench(self):
        wanted = [timing for timing in gpu_report.timings() if self.fits(timing)]
        done = []
        for timing in wanted:
            # Planned anew before each: estimates err, time does not.
            if timing not in gpu_report.plan([timing], self.left):
                continue
            began = time.time()
            budget = f"{max(1, timing.seconds / 2):.0f}"
            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                command = [sys.executable, "-m", "dnl_ext", "bench", "--device", "cuda", *timing.dtype_options,
                           "--n", ",".join(map(str, timing.positions)), "--shapes", ",".join(map(str, timing.shape)),
                           "--budget", budget, "--memory", "--json", file.name]  # fmt: skip
                status, text = self.call(command, 1.0, DNL_EXT_CUDA_PATH=timing.path)
                written = pathlib.Path(file.name).read_text()
            document = json.loads(written) if written.strip() else {}
            self.report.timings.append({"timing": vars(timing), "document": document})
            done.append(timing)
            late = status == 124  # out of time: what it has measured counts
            self.record(f"bench {timing.name}", began, status == 0 or late, text[-600:] if status else "",
                        status="skipped" if late else None)  # fmt: skip
        self.report.left_out = [timing.name for timing in wanted if timing not in done]


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
    for step in STEPS:
        if step not in options.steps:
            continue
        if getattr(check, step)() is False and step == "build":
            break  # nothing else can run
    gpu_report.write(check.report, check.out)
    failed = check.report.failed
    for step in failed:
        print(f"FAILED {step.name}: {step.detail}")
    print(f"{'FAIL' if failed else 'PASS'}: {len(check.report.steps)} steps, results in {check.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
