"""Runs the benchmark: for every case inputs, truth, check, time, memory, and one JSON document of it all."""

import contextlib
import datetime
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from dnl_ext._load import _C
from dnl_ext.config import cpu_model, show_config

from . import timing
from .case import DIRECTIONS, DTYPES, Case, Inputs, make_inputs
from .check import OWN_BAR, PEER_BAR, ROWS, Truth, gradient_names
from .memory import CpuPeaks, available_bytes, call, peak_cuda
from .methods import METHODS, Attention, Method, Unavailable, sdpa_backend

#: Version of the document's layout.
SCHEMA = 1
OWN = "dnl_ext"
#: Share of the available memory that a method's N x N maps may take before it is left out.
MEMORY_SHARE = 0.8
#: Seconds of timing that a case gets even where the budget has run out (and `rounds` in any case).
LEAST_SECONDS = 0.5


@dataclass
class Options:
    """What a run of the benchmark covers.

    Attributes:
        shapes: pairs (Dqk, Dv). positions: numbers N of queries and of keys.
        dtypes, directions: as in :class:`Case`.
        peers: names in ``METHODS``; None is what runs on the device by default.
        device, batch, heads, whiten, unary: as in :class:`Case`.
        budget: seconds of timing for all cases together. rounds: least number of rounds of a case, whatever the budget.
        memory: measure peak memory too. check_only: check the values and time nothing.

    Example:
        >>> from dnl_ext.benchmark import Options
        >>> options = Options(shapes=((256, 256),), positions=(1024, 4096), dtypes=("fp32",))
        >>> [case.describe() for case in options.cases()][:2]
        ['(256, 256) N=1024 fp32 forward', '(256, 256) N=4096 fp32 forward']
    """

    shapes: tuple[tuple[int, int], ...] = ((256, 256), (256, 512), (256, 1024))  # (Dqk, Dv)
    positions: tuple[int, ...] = (1024, 2048, 4096)  # N = Nq = Nk
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    directions: tuple[str, ...] = DIRECTIONS
    peers: tuple[str, ...] | None = None  # names of METHODS; None: what runs on the device by default
    device: str = "cpu"
    batch: int = 1
    heads: int = 1
    whiten: bool = True
    unary: bool = False
    budget: float = 150.0  # seconds of timing, all cases together
    rounds: int = 3  # of every case, whatever the budget
    memory: bool = False
    check_only: bool = False

    def cases(self) -> Iterator[Case]:
        kinds = product(self.dtypes, self.directions, self.shapes, self.positions)
        for dtype, direction, (width, channels), n in kinds:
            yield Case(
                width, channels, n, n, dtype, direction, self.device, self.batch, self.heads, self.whiten, self.unary
            )

    def methods(self) -> list[Method]:
        names = self.peers
        kind = torch.device(self.device).type
        if names is None:
            names = [name for name, method in METHODS.items() if kind in method.default]
        unknown = [name for name in names if name not in METHODS]
        if unknown:
            raise ValueError(f"peers: expected names of {', '.join(METHODS)}; got {', '.join(unknown)}")
        return [METHODS[name] for name in dict.fromkeys([OWN, *names])]


def describe_device(device: str) -> dict[str, Any]:
    kind = torch.device(device).type
    shown = {"type": kind, "name": cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(device)
        shown |= {
            "host": shown["name"],
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "allow_tf32": _C.tf32_allowed(),
        }
    return shown


def cpu_peaks(dtypes: Iterable[str], threads: int) -> dict[str, dict[str, float]]:
    """Measured GFLOP/s of every instruction set of this CPU, by name and dtype, on registers alone.

    No kernel can exceed it. A dtype that a set cannot multiply has the peak of the type to which it is widened.
    """
    names = [name for name, supported in _C.cpu_capabilities() if supported]
    return {
        name: {dtype: _C.cpu_peak(name, str(DTYPES[dtype]).removeprefix("torch."), threads) / 1e9 for dtype in dtypes}
        for name in names
    }


def new_document(options: Options) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": describe_device(options.device),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # before the run: others' work
        "config": dict(show_config()),
        "options": asdict(options),
        "methods": {method.name: method.about for method in options.methods()},
        "convention": {
            "flops_forward": "2 Nq Nk (Dqk + Dv)",
            "flops_training": "2 Nq Nk (Dqk + Dv) + 2 Nq Nk (3 Dqk + 2 Dv), for every method",
            "gflops": "from the best sample",
            "peaks": "GFLOP/s of multiply-adds on registers alone, by instruction set and dtype; peak_share is of the "
            "one in use",
            "check": f"relative error on {ROWS} query rows against float64, as a multiple of plain PyTorch's: dnl_ext "
            f"at most {OWN_BAR}, others {PEER_BAR}",
            "memory": "peak of one call in bytes beyond inputs, outputs and gradients",
        },
        "peaks": cpu_peaks(options.dtypes, torch.get_num_threads()) if _on_cpu(options) else {},
        "cases": [],
    }


def _on_cpu(options: Options) -> bool:
    return torch.device(options.device).type == "cpu" and not options.check_only


def run(
    options: Options,
    save: Callable[[dict[str, Any]], object] | None = None,
    progress: Callable[[Case, int, int], object] | None = None,
) -> dict[str, Any]:
    """Run every case.

    Args:
        options: :class:`Options`.
        save: function of the document, called after every case (an interrupted run keeps what it has).
        progress: function of (case, number done, number of all), called before every case.

    Returns:
        dict: the document, see benchmarks/README.md. ``document["cases"][i]["results"]`` has one entry per method.

    Example:
        >>> from dnl_ext.benchmark import Options, passed, run
        >>> sizes = {"shapes": ((16, 32),), "positions": (64,), "dtypes": ("fp32",), "directions": ("forward",)}
        >>> document = run(Options(**sizes, peers=("eager",), check_only=True))
        >>> [(result["method"], result["status"]) for result in document["cases"][0]["results"]]
        [('dnl_ext', 'ok'), ('eager', 'ok')]
        >>> passed(document)
        True
    """
    document = new_document(options)
    cases = list(options.cases())
    weights = [case.flops + 2e10 for case in cases]  # small cases deserve more rounds than their size asks for
    budget = options.budget
    edges = {} if options.check_only else _roof_edges(options, cases)
    clock = timing.clock_for(options.device)
    with CpuPeaks() if options.memory and torch.device(options.device).type == "cpu" else nullcontext() as peaks:
        for number, case in enumerate(cases):
            if progress:
                progress(case, number, len(cases))
            share = max(LEAST_SECONDS, budget * weights[number] / sum(weights[number:]))
            record = run_case(case, options, clock, edges.get(case.dtype), share, peaks)
            _add_peak_shares(record, document["peaks"].get(_C.cpu_capability()))
            budget = max(0.0, budget - record["timed_s"])
            document["cases"].append(record)
            if save:
                save(document)
    return document


def _roof_edges(options: Options, cases: Sequence[Case]) -> dict[str, int]:
    allowed = max(options.budget * timing.ROOF_SHARE / (3 * len(cases)), 0.02)  # three samples a case
    return {name: timing.roof_edge(case.torch_dtype, case.device, allowed) for name, case in _one_per_dtype(cases)}


def _one_per_dtype(cases: Sequence[Case]) -> Iterable[tuple[str, Case]]:
    return {case.dtype: case for case in cases}.items()


def run_case(
    case: Case, options: Options, clock: timing.Clock, edge: int | None, budget: float, peaks: CpuPeaks | None = None
) -> dict[str, Any]:
    """One case: a record of every method's check, samples and memory, with the roof's samples."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # or the ninth shape of a compiled method would quietly run uncompiled
    inputs = make_inputs(case)
    truth = Truth(case, inputs)
    records, entries, kept = [], [], {}
    for method in options.methods():
        record = {"method": method.name, "status": "ok", "reason": None, "backend": None}
        records.append(record)
        with warnings.catch_warnings(record=True) as said:  # SDPA says why a backend refuses in warnings
            warnings.simplefilter("always")
            try:
                function, grad_output = prepare(case, inputs, truth, method, record)
            except Unavailable as reason:
                record |= {"status": "skipped", "reason": str(reason)}
                continue
            except Exception as error:  # a peer that fails is a line of the table
                record |= {"status": "failed", "reason": timing.failure_text(error, said)}
                continue
        if record["status"] == "ok":
            kept[method.name] = function, grad_output
            entries.append(timing.Entry(method.name, _timed(case, function, inputs, grad_output)))
    result = {"case": case.as_dict(), "results": records, "roof": None, "timed_s": 0.0}
    if edge is not None and entries:
        roof = timing.roof_entry(case.torch_dtype, case.device, edge)
        timing.interleave([*entries, roof], clock, budget, least=options.rounds)
        result["timed_s"] = sum(sum(entry.samples) for entry in [*entries, roof])
        result["roof"] = {"edge": edge, "flops": 2 * edge**3} | _figures(roof, 2 * edge**3)
    for record in records:
        entry = next((entry for entry in entries if entry.name == record["method"]), None)
        if entry is None:
            continue
        if entry.failure:
            record |= {"status": "failed", "reason": entry.failure}
        elif entry.samples:
            record |= _figures(entry, case.flops)
            record["roof_share"] = record["gflops"] / result["roof"]["gflops"]
        if options.memory and record["status"] == "ok":
            record["memory_bytes"] = _memory(case, record, peaks, inputs, *kept[entry.name])
    compare(result)
    return result


def prepare(
    case: Case, inputs: Inputs, truth: Truth, method: Method, record: dict[str, Any]
) -> tuple[Attention, torch.Tensor | None]:
    """Build the method, run it once and check it: (function, grad_output in the layout of its output).

    Fills in backend, errors and, where they are too large, the status "wrong".
    """
    kind = torch.device(case.device).type
    if kind not in method.devices:
        raise Unavailable(f"runs on {' and '.join(method.devices)} only")
    need, free = method.maps(case, inputs) * case.map_bytes, _free(case)
    if free is not None and need > MEMORY_SHARE * free:
        raise Unavailable(f"its N x N maps take {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are available")
    candidates = method.functions(case)
    if method.name in ("sdpa_views", "sdpa_contiguous"):
        record["backend"] = sdpa_backend(case, inputs, method.name == "sdpa_contiguous")
    for function in candidates:
        try:
            results, grad_output = _first_call(case, function, inputs, truth)
            break
        except Exception:
            if function is candidates[-1]:
                raise
    else:
        raise Unavailable("it builds no function")
    names = ["output", *(gradient_names(inputs) if case.training else ())]
    errors, ratios, wrong = truth.verdict(dict(zip(names, results, strict=True)), own=method.name == OWN)
    record |= {"errors": errors, "error_ratios": ratios}
    if wrong:
        record |= {"status": "wrong", "reason": wrong}
    if grad_output is not None:
        grad_output.normal_()
    return function, grad_output


def _first_call(
    case: Case, function: Attention, inputs: Inputs, truth: Truth
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """Results of a call whose grad_output is the truth's, and a grad_output in the layout of the output."""
    if truth.grad_output is None:
        return call(case, function, inputs), None
    output = function(*inputs)
    grad_output = torch.zeros_like(output)
    grad_output[..., truth.rows, :] = truth.grad_output.to(output.dtype)
    return (output, *torch.autograd.grad(output, inputs.leaves, grad_output)), grad_output


def _timed(case: Case, function: Attention, inputs: Inputs, grad_output: torch.Tensor | None) -> Callable[[], object]:
    return lambda: call(case, function, inputs, grad_output)


def _free(case: Case) -> int | None:
    if torch.device(case.device).type == "cpu":
        return available_bytes()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(case.device)[0]


def _memory(
    case: Case,
    record: dict[str, Any],
    peaks: CpuPeaks | None,
    inputs: Inputs,
    function: Attention,
    grad_output: torch.Tensor | None,
) -> int | None:
    try:
        if peaks is None:
            return peak_cuda(case, function, inputs, grad_output)
        return peaks.peak(case, record["method"])
    except Exception as error:
        record["memory_reason"] = timing.failure_text(error)
        return None


def _add_peak_shares(result: dict[str, Any], peaks: dict[str, float] | None) -> None:
    """Set the share of the CPU's peak, of the instruction set in use, beside every figure."""
    if peaks:
        for record in filter(None, [result["roof"], *result["results"]]):
            if "gflops" in record:
                record["peak_share"] = record["gflops"] / peaks[result["case"]["dtype"]]


def _figures(entry: timing.Entry, flops: int) -> dict[str, Any]:
    return {
        "seconds": entry.samples,
        "best_s": entry.best,
        "median_s": entry.median,
        "gflops": flops / entry.best / 1e9,
        "gflops_median": flops / entry.median / 1e9,
    }


def compare(result: dict[str, Any]) -> None:
    """Set best_peer, and ratio = speed of dnl_ext over that of the best peer (above 1 is faster), best and median."""
    timed = {record["method"]: record for record in result["results"] if record.get("gflops")}
    own = timed.pop(OWN, None)
    result |= {"best_peer": None, "ratio": None, "ratio_median": None}
    if own and timed:
        best = max(timed.values(), key=lambda record: record["gflops"])
        fastest_median = max(record["gflops_median"] for record in timed.values())
        result["best_peer"] = best["method"]
        result["ratio"] = own["gflops"] / best["gflops"]
        result["ratio_median"] = own["gflops_median"] / fastest_median


def save_json(path: str | Path) -> Callable[[dict[str, Any]], None]:
    """A ``save`` function for :func:`run`, which writes the document to a file, whole or not at all.

    Args:
        path: the file; its folder is made.

    Returns:
        A function of the document.

    Example:
        >>> import pathlib, tempfile
        >>> from dnl_ext.benchmark import save_json
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_json(f"{folder}/results.json")({"cases": []})
        ...     print(pathlib.Path(folder, "results.json").read_text())
        {
         "cases": []
        }
        <BLANKLINE>
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)

    def save(document: dict[str, Any]) -> None:
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_text(json.dumps(document, indent=1) + "\n")
            partial.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise

    return save


def passed(document: dict[str, Any]) -> bool:
    """Whether dnl_ext was right in every case of a document that :func:`run` returned.

    Example:
        >>> from dnl_ext.benchmark import passed
        >>> passed({"cases": [{"results": [{"method": "dnl_ext", "status": "wrong"}]}]})
        False
    """
    own = [record for case in document["cases"] for record in case["results"] if record["method"] == OWN]
    return bool(own) and all(record["status"] == "ok" for record in own)
