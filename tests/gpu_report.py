"""What gpu_check.py decides and writes, apart from running anything: which timings fit into the time, the report."""

import json
import pathlib
import re
from dataclasses import asdict, dataclass, field

DTYPES = ("bf16", "fp16", "tf32", "fp32")  # tf32: fp32 where TF32 is allowed
OWN = "dnl_ext"
PIECES = ("products", "library", "host", "means", "first")  # of gpu_pieces.py
#: What the chain is timed beside. The other paths are timed alone: one line of a peer is enough.
PEERS = ("eager", "sdpa_contiguous", "sdpa_slices", "sdpa_flash", "sdpa_cudnn")
#: Peers that compile first, for a minute or more: after all else.
COMPILING = ("compiled", "flex")
#: (types, Dqk and Dv, positions), most important first: the figures of the report's first lines, the other shapes of a
#: segmentation network, longer maps, the rest.
FIRST = (("bf16",), ((256, 256), (256, 512)), (4096, 16384))
LATER = (
    (("bf16", "fp16", "tf32"), ((256, 1024),), (4096, 16384)),
    (("fp16", "tf32"), ((256, 256), (256, 512)), (4096, 16384)),
    (DTYPES, ((512, 2048),), (4096,)),
    (("bf16",), ((256, 256), (256, 512)), (9409, 32768)),
    (("fp32",), ((256, 256), (256, 512)), (4096, 9409, 16384)),
    (("bf16", "fp16", "tf32"), ((256, 256), (256, 512), (256, 1024)), (8192,)),
)

START_SECONDS = 8.0  # of a process: imports, the device, the plain product
CASE_SECONDS = 1.5  # least time of a case, forward and training, all methods
COMPILE_SECONDS = 30.0  # of a case by a peer that compiles
RATE = 5e13  # operations a second at which every method is assumed to run, slow ones and checks included
SAMPLES = 40  # calls of a case: methods times rounds, and the check
#: The page whose table has modelled milliseconds, where there is one: a row for a GPU, a call and a number of
#: positions, a column for eager PyTorch and for each path.
MODEL_PAGE = pathlib.Path(__file__).parents[1] / "docs/gpu-model.md"


@dataclass(frozen=True)
class Timing:
    """One call of the benchmark: a path, a type and a shape, at several N, beside peers."""

    path: str
    dtype: str
    shape: tuple
    positions: tuple
    peers: tuple = ()

    @property
    def seconds(self):
        width, channels = self.shape
        flops = sum(2 * n * n * (4 * width + 3 * channels) for n in self.positions)
        per_type = {"fp32": 8, "tf32": 2}.get(self.dtype, 1)
        share = 1.0 if self.peers else 0.3  # alone it has fewer calls
        compiling = COMPILE_SECONDS * len(self.positions) * len(set(self.peers) & set(COMPILING))
        cases = CASE_SECONDS * len(self.positions) + SAMPLES * per_type * flops / RATE
        return START_SECONDS + share * cases + compiling

    @property
    def options(self):
        """Of the benchmark's command line."""
        dtype = ("--dtype", "fp32", "--tf32") if self.dtype == "tf32" else ("--dtype", self.dtype)
        peers = ",".join(self.peers or (OWN,))
        shape, positions = (",".join(map(str, numbers)) for numbers in (self.shape, self.positions))
        return (*dtype, "--shapes", shape, "--n", positions, "--peers", peers)

    @property
    def name(self):
        ns = "-".join(map(str, self.positions))
        beside = "-" + "-".join(self.peers) if set(self.peers) & set(COMPILING) else ""
        return f"{self.path}-{self.dtype}-{self.shape[0]}x{self.shape[1]}-n{ns}{beside}"


def timings(paths, groups):
    """Those of every path at the shapes of `groups`, in their order; the chain's beside PEERS."""
    return [
        Timing(path, dtype, shape, positions, PEERS if path == "chain" else ())
        for dtypes, shapes, positions in groups
        for shape in shapes
        for dtype in dtypes
        for path in paths
        if path == "chain" or dtype != "fp32"
    ]


def compiling():
    """Timings beside what compiles."""
    dtypes, shapes, positions = FIRST
    return [
        Timing("chain", dtypes[0], shape, (n,), (peer,)) for peer in COMPILING for shape in shapes for n in positions
    ]


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
    status: str  # passed, failed, timed out, skipped, reported
    seconds: float = 0
    detail: str = ""
    path: str | None = None  # that it tests


@dataclass
class Report:
    device: dict
    steps: list = field(default_factory=list)
    timings: list = field(default_factory=list)  # {"timing": ..., "document": ... of the benchmark}
    pieces: dict = field(default_factory=dict)  # name: lines of gpu_pieces.py
    left_out: list = field(default_factory=list)  # names of timings that had no time
    modelled: list = field(default_factory=list)  # of this GPU

    @property
    def failed(self):
        return [step for step in self.steps if step.status == "failed"]

    def document(self):
        return {
            "device": self.device,
            "passes": not self.failed,
            "answers": answers(self),
            "steps": [asdict(step) for step in self.steps],
            "timings": self.timings,
            "pieces": self.pieces,
            "left_out": self.left_out,
        }


def modelled(gpu, page=MODEL_PAGE):
    """Modelled figures of the GPU of this name, channel-first as the benchmark's: {"path", "direction", "width",
    "channels", "positions", "milliseconds"}; none where there are none."""
    try:
        table = page.read_text().partition("<!-- begin calls -->")[2].partition("<!-- end calls -->")[0]
    except OSError:
        return []
    found, header = [], []
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if cells[0] == "GPU":
            header = cells
        call = re.fullmatch(r"(forward|backward) \((\d+), (\d+)\) channel-first", cells[1]) if len(cells) > 1 else None
        if not (call and header and cells[0].split("-")[0] in gpu):  # "A100-SXM", "NVIDIA A100-SXM4-80GB"
            continue
        row = dict(zip(header, cells, strict=False))
        for path in header[header.index("eager") + 1 : -1]:
            if re.fullmatch(r"[\d.]+", row.get(path, "")):
                sizes = {"width": int(call[2]), "channels": int(call[3]), "positions": int(row["positions"])}
                found.append({"path": path, "direction": call[1], **sizes, "milliseconds": float(row[path])})
    return found


def rows(report):
    """(dtype, direction, Dqk, Dv, N, path or None, method, ms, GFLOP/s or None, status) of every timing."""
    for entry in report.timings:
        timing = entry["timing"]
        for case in entry["document"].get("cases", ()):
            c = case["case"]
            for result in case["results"]:
                own, best = result["method"] == OWN, result.get("best_s")
                if own and set(timing["peers"]) & set(COMPILING):
                    continue  # timed before
                key = (timing["dtype"], c["direction"], c["width"], c["channels"], c["queries"])
                method = f"{OWN} {timing['path']}" if own else result["method"]
                yield (
                    *key,
                    timing["path"] if own else None,
                    method,
                    best and best * 1e3,
                    result.get("gflops"),
                    result["status"],
                )


# ----------------------------------------------------------------------------------------------------------------------
# The first lines
# ----------------------------------------------------------------------------------------------------------------------


def answers(report):
    """Lines that answer: are all paths right, is each faster than PyTorch, how far was the model off."""
    return [rightness(report), *speeds(report), accuracy_of_model(report)]


def paths_of(report):
    return list(
        dict.fromkeys([*(s.path for s in report.steps if s.path), *(t["timing"]["path"] for t in report.timings)])
    )


def rightness(report):
    wrong = {}
    for step in report.failed:
        wrong.setdefault(step.path or "not of a path", []).append(step.name)
    for *key, path, _, _, _, status in rows(report):
        if path and status == "wrong":
            wrong.setdefault(path, []).append("bench {} {} ({}, {}) N = {}".format(*key))
    late = [step.name for step in report.steps if step.status == "timed out"]
    unsure = f" Out of time, and so not known: {', '.join(late)}." if late else ""
    if wrong:
        said = "; ".join(f"{path}: {', '.join(names)}" for path, names in wrong.items())
        return f"**Are all paths right?** NO. {said}.{unsure}"
    paths = paths_of(report)
    found = f"Yes, as far as it went: {', '.join(paths)}." if paths else "Not known: nothing has run."
    return f"**Are all paths right?** {found}{unsure}"


def comparisons(report):
    """(path, key, ms, ms of eager or None, ms of the best SDPA or None) of every timed call of ours."""
    eager, sdpa, ours = {}, {}, []
    for *key, path, method, ms, _, status in rows(report):
        key = tuple(key)
        if status != "ok" or not ms:
            continue
        if path:
            ours.append((path, key, ms))
        elif method == "eager":
            eager[key] = ms
        elif method.startswith("sdpa"):
            sdpa[key] = min(ms, sdpa.get(key, ms))
    return [(path, key, ms, eager.get(key), sdpa.get(key)) for path, key, ms in ours]


def speeds(report):
    """A line for each path."""
    compared = comparisons(report)
    if not compared:
        return ["**Is each path faster than eager PyTorch, and than SDPA's best?** Not measured."]
    lines = ["**Is each path faster than eager PyTorch, and than SDPA's best?**"]
    for path in dict.fromkeys(row[0] for row in compared):
        parts = []
        for peer, column in (("eager", 3), ("SDPA", 4)):
            ratios = [row[column] / row[2] for row in compared if row[0] == path and row[column]]
            if ratios:
                faster = sum(ratio > 1 for ratio in ratios)
                span = f"{min(ratios):.2f} to {max(ratios):.2f} times its speed"
                parts.append(f"than {peer} at {faster} of {len(ratios)} calls ({span})")
        lines.append(f"- {path}: {'; '.join(parts) or 'no peer was timed'}")
    return lines


def accuracy_of_model(report):
    """Measured over modelled milliseconds; of a backward, training less forward."""
    times = {(path, *key): ms for path, key, ms, _, _ in comparisons(report)}
    off = []
    for row in report.modelled:
        call = (row["width"], row["channels"], row["positions"])
        forward, training = (times.get((row["path"], "bf16", name, *call)) for name in ("forward", "training"))
        measured = forward if row["direction"] == "forward" else training and forward and training - forward
        if measured:
            off.append((measured / row["milliseconds"], row, measured))
    if not off:
        why = "it has no figure for this GPU" if not report.modelled else "nothing that it models was measured"
        return f"**How far was the model off?** Not known: {why}."
    off.sort(key=lambda item: item[0])
    text = "; ".join(
        f"{row['path']} {row['direction']} ({row['width']}, {row['channels']}) N = {row['positions']} "
        f"{measured:.2f} ms for {row['milliseconds']:.2f}"
        for _, row, measured in (off[0], off[-1])
    )
    return f"**How far was the model off?** Measured is {off[0][0]:.2f} to {off[-1][0]:.2f} times modelled ({text})."


def markdown(report):
    device = report.device
    lines = [f"# {device.get('name', 'unknown device')}", "", *answers(report), ""]
    lines += [f"- {name}: {value}" for name, value in device.items() if name != "name"]
    compared = comparisons(report)
    if compared:
        lines += [
            "",
            "| path | dtype | direction | Dqk | Dv | N | ms | eager ms | best SDPA ms | times eager's speed |",
        ]
        lines += ["|---|---|---|---|---|---|---|---|---|---|"]
        for path, key, ms, eager, sdpa in sorted(compared, key=lambda row: (row[1], row[0])):
            figures = (f"{x:.3f}" if x else "" for x in (ms, eager, sdpa))
            ratio = f"{eager / ms:.2f}" if eager else ""
            lines.append(f"| {path} | {' | '.join(map(str, key))} | {' | '.join(figures)} | {ratio} |")
    lines += ["", "| step | status | seconds | |", "|---|---|---|---|"]
    for step in report.steps:
        detail = " ".join(step.detail.replace("|", "/").split())[:300]
        lines.append(f"| {step.name} | {step.status} | {step.seconds:.0f} | {detail} |")
    for name, found in report.pieces.items():
        lines += ["", f"| {name} | | | |", "|---|---|---|---|"]
        verdicts = {True: "right", False: "WRONG", None: ""}
        lines += [f"| {x['what']} | {x['value']:.4g} | {x['unit']} | {verdicts[x['ok']]} |" for x in found]
    measured = list(rows(report))
    if measured:
        lines += ["", "Milliseconds of the best sample; dnl_ext by the CUDA path that the name gives.", ""]
        lines += ["| dtype | direction | Dqk | Dv | N | method | ms | TFLOP/s |", "|---|---|---|---|---|---|---|---|"]
        for *key, _, method, ms, gflops, status in sorted(measured, key=lambda row: row[:5]):
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
    for name, text in (("check.json", json.dumps(report.document(), indent=1) + "\n"), ("check.md", markdown(report))):
        partial = folder / f"{name}.partial"
        partial.write_text(text)
        partial.replace(folder / name)
