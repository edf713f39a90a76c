"""What gpu_check.py decides and writes, apart from running anything: which timings fit into the time, the report."""

import json
import re
from dataclasses import asdict, dataclass, field

SHAPES = ((256, 256), (256, 512), (256, 1024), (512, 2048))  # Dqk, Dv
POSITIONS = (4096, 8192, 9409, 16384, 32768)
DTYPES = ("bf16", "fp16", "tf32", "fp32")  # tf32: fp32 where TF32 is allowed
PATHS = ("chain", "fused")
FUSED_WIDTH = 256  # most Dqk of the fused forward (csrc/ops/pairwise/pairwise_plan.h)

START_SECONDS = 8.0  # of a process: imports, the device, the plain product
CASE_SECONDS = 1.5  # least time of a case, forward and training, all methods
RATE = 5e13  # operations a second at which every method is assumed to run, slow ones and checks included
SAMPLES = 40  # calls of a case: methods times rounds, and the check


@dataclass(frozen=True)
class Timing:
    """One call of the benchmark: a path, a type and a shape, at several N."""

    path: str
    dtype: str
    shape: tuple
    positions: tuple

    @property
    def seconds(self):
        width, channels = self.shape
        flops = sum(2 * n * n * (4 * width + 3 * channels) for n in self.positions)
        per_type = {"fp32": 8, "tf32": 2}.get(self.dtype, 1)
        return START_SECONDS + CASE_SECONDS * len(self.positions) + SAMPLES * per_type * flops / RATE

    @property
    def dtype_options(self):
        """Of the benchmark's command line."""
        return ("--dtype", "fp32", "--tf32") if self.dtype == "tf32" else ("--dtype", self.dtype)

    @property
    def name(self):
        ns = "-".join(map(str, self.positions))
        return f"{self.path}-{self.dtype}-{self.shape[0]}x{self.shape[1]}-n{ns}"


def timings():
    """All of them, most important first: the sizes of a segmentation network, then longer maps, then the rest."""
    found = []
    for positions in ((4096, 9409), (16384,), (8192, 32768)):
        for dtype in DTYPES:
            for shape in SHAPES:
                for path in PATHS:
                    if path == "fused" and (dtype == "fp32" or shape[0] > FUSED_WIDTH):
                        continue
                    found.append(Timing(path, dtype, shape, positions))
    return found


def plan(wanted, seconds):
    """Those of `wanted` that fit into `seconds`, in order; a later, smaller one may fit where an earlier did not."""
    chosen = []
    for timing in wanted:
        if timing.seconds <= seconds:
            chosen.append(timing)
            seconds -= timing.seconds
    return chosen


@dataclass
class Step:
    name: str
    status: str  # passed, failed, skipped
    seconds: float = 0
    detail: str = ""


@dataclass
class Report:
    device: dict
    steps: list = field(default_factory=list)
    timings: list = field(default_factory=list)  # {"timing": ..., "document": ... of the benchmark}
    left_out: list = field(default_factory=list)  # names of timings that had no time

    @property
    def failed(self):
        return [step for step in self.steps if step.status == "failed"]

    def document(self):
        return {
            "device": self.device,
            "passes": not self.failed,
            "steps": [asdict(step) for step in self.steps],
            "timings": self.timings,
            "left_out": self.left_out,
        }


def rows(report):
    """(dtype, direction, Dqk, Dv, N, path, method, ms, GFLOP/s or None, status) of every timing."""
    for entry in report.timings:
        for case in entry["document"].get("cases", ()):
            c = case["case"]
            for result in case["results"]:
                best = result.get("best_s")
                # The other methods do not know of paths: one line each, from the chain's run.
                if result["method"] != "dnl_ext" and entry["timing"]["path"] != "chain":
                    continue
                method = f"dnl_ext {entry['timing']['path']}" if result["method"] == "dnl_ext" else result["method"]
                dtype = entry["timing"].get("dtype", c["dtype"])
                key = (dtype, c["direction"], c["width"], c["channels"], c["queries"])
                yield *key, method, best and best * 1e3, result.get("gflops"), result["status"]


def markdown(report):
    device = report.device
    lines = [f"# {device.get('name', 'unknown device')}", ""]
    lines += [f"- {name}: {value}" for name, value in device.items() if name != "name"]
    lines += [
        "",
        f"**{'FAIL' if report.failed else 'PASS'}**",
        "",
        "| step | status | seconds | |",
        "|---|---|---|---|",
    ]
    for step in report.steps:
        detail = " ".join(step.detail.replace("|", "/").split())[:300]
        lines.append(f"| {step.name} | {step.status} | {step.seconds:.0f} | {detail} |")
    measured = list(rows(report))
    if measured:
        lines += ["", "Milliseconds of the best sample; dnl_ext by the CUDA path that the name gives.", ""]
        lines += ["| dtype | direction | Dqk | Dv | N | method | ms | TFLOP/s |", "|---|---|---|---|---|---|---|---|"]
        for *key, method, ms, gflops, status in sorted(measured, key=lambda row: row[:5]):
            figures = f"{ms:.3f} | {gflops / 1e3:.1f}" if status == "ok" and ms else f"{status} | "
            lines.append(f"| {' | '.join(map(str, key))} | {method} | {figures} |")
    if report.left_out:
        lines += ["", f"Not timed, for want of time: {', '.join(report.left_out)}."]
    return "\n".join(lines) + "\n"


def folder_name(device_name):
    """A device's name as that of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") or "unknown"


def write(report, folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "check.json").write_text(json.dumps(report.document(), indent=1) + "\n")
    (folder / "check.md").write_text(markdown(report))
