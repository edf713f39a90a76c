"""What is known of the CUDA paths on this machine: figures and verdicts in a file, defaults, and the choice from both.

The file is JSON in the user's cache folder, or where DNL_EXT_TUNE_FILE says. It is read once, written whole by an
atomic rename, and added to under a lock, so that several processes may tune at once. Nothing in it can stop a call:
what cannot be read counts as absent. Who measures and checks is `dnl_ext.tuning`.
"""

import contextlib
import functools
import json
import math
import os
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ._load import _C
from ._version import __version__

#: Layout of the file, and part of its name: versions that write another one leave it alone.
SCHEMA = 1
#: Paths of measured calls serve others of the same widths whose numbers of logits are at most this many times apart.
NEAR = 4.0
#: What a layout that differs counts as, in doublings of the number of logits.
OTHER_LAYOUT = 1.0


@dataclass(frozen=True)
class Call:
    """One direction of pairwise attention, as its path is chosen."""

    dtype: str  # "bfloat16", "float16", or "float32", which has a choice with TF32 only
    backward: bool
    sizes: tuple[int, int, int, int, int]  # batches, queries, keys, Dqk, Dv
    channel_first: tuple[bool, bool, bool] = (True, True, True)  # query, key, value

    @property
    def logits(self) -> int:
        return math.prod(self.sizes[:3])

    def describe(self) -> str:
        batches, queries, keys, width, channels = self.sizes
        positions = f"N = {keys}" if queries == keys else f"Nq = {queries}, Nk = {keys}"
        return f"{'backward' if self.backward else 'forward'}, batch {batches}, {positions}, ({width}, {channels})"

    def distance(self, other: "Call") -> float:
        """Doublings of the number of logits between two calls; infinite where one says nothing about the other."""
        alike = (self.dtype, self.backward, self.sizes[3:]) == (other.dtype, other.backward, other.sizes[3:])
        if not alike or not self.logits or not other.logits:
            return math.inf
        apart = abs(math.log2(self.logits / other.logits))
        return apart + (OTHER_LAYOUT if self.channel_first != other.channel_first else 0.0)


@dataclass(frozen=True)
class Machine:
    """What figures depend on."""

    gpu: str
    driver: str
    torch: str
    dnl_ext: str


@dataclass(frozen=True)
class Measured:
    """The paths of a call, timed."""

    machine: Machine
    call: Call
    path: str  # the fastest that is right
    milliseconds: dict[str, float]
    date: str  # YYYY-MM-DD
    wrong: dict[str, str] = field(default_factory=dict)  # path: what is wrong, with a command that shows it


@dataclass(frozen=True)
class Verdict:
    """Whether a path was right, and ended, on the small problems of its self-check."""

    machine: Machine
    path: str
    dtype: str
    backward: bool
    width: int  # Dqk
    channels: int  # Dv
    reason: str  # what is wrong, with a command that shows it; empty for a path that is right
    date: str
    channel_first: tuple[bool, bool, bool] = (True, True, True)  # query, key, value

    @property
    def subject(self) -> tuple[Any, ...]:
        return self.machine, self.path, self.dtype, self.backward, self.width, self.channels, self.channel_first


@dataclass(frozen=True)
class Default:
    """A path other than the chain that calls take where nothing was measured, behind a self-check."""

    path: str
    capabilities: tuple[int, int]  # first and last, 10 major + minor
    backward: bool
    dtypes: tuple[str, ...]
    channels: int  # Dv, at most
    logits: int = 0  # batch x Nq x Nk, at least


_HALVES = ("bfloat16", "float16")
#: In order, the first that fits and was built. From modelled times (docs/gpu-model.md): 0.3 to 0.8 of the chain's where
#: a path stands here. What is closer, or lies on both sides at 4,096 positions, is left to `dnl-ext tune`.
DEFAULTS: tuple[Default, ...] = (
    Default("hopper", (90, 90), False, _HALVES, 1024, logits=10_000**2),
    Default("hopper", (90, 90), True, _HALVES, 1024),
)


@dataclass(frozen=True)
class Choice:
    path: str
    why: str
    unchecked: bool = False  # it is taken only after a self-check, which has not been made


# ----------------------------------------------------------------------------------------------------------------------
# The file
# ----------------------------------------------------------------------------------------------------------------------


class Known:
    """The records of one file, and those that could not be written to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.measured: list[Measured] = []
        self.verdicts: list[Verdict] = []
        self._keep(_read(path))

    def _keep(self, records: Iterable[Measured | Verdict]) -> None:
        """Add records; of the same machine and call, or path, the last counts."""
        measured = {(m.machine, m.call): m for m in self.measured}
        verdicts = {verdict.subject: verdict for verdict in self.verdicts}
        for record in records:
            if isinstance(record, Measured):
                measured[record.machine, record.call] = record
            else:
                verdicts[record.subject] = record
        self.measured, self.verdicts = list(measured.values()), list(verdicts.values())

    def add(self, records: Iterable[Measured | Verdict]) -> str:
        """Add records here and in the file. Returns why that could not be written, or nothing."""
        records = list(records)
        self._keep(records)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _lock(self.path):
                if _is_another_versions(self.path):
                    return f"{self.path} is of another version and left alone: the choice lasts for this process"
                merged = Known(self.path)  # with what others have written meanwhile
                merged._keep(records)
                _write(self.path, merged)
        except OSError as error:
            return f"{self.path} could not be written ({error.strerror or error}): the choice lasts for this process"
        return ""


def file() -> Path:
    """Where records are kept: DNL_EXT_TUNE_FILE, or a file of the user's cache folder."""
    if named := os.environ.get("DNL_EXT_TUNE_FILE"):
        return Path(named)
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(folder):  # a user without a home: nothing can be kept
        folder = os.devnull
    return Path(folder, "dnl_ext", f"paths-{SCHEMA}.json")


_open: dict[Path, Known] = {}
_opening = threading.Lock()


def known() -> Known:
    """The records of the present file, which is read at the first call."""
    path = file()
    with _opening:
        if path not in _open:
            _open[path] = Known(path)
        return _open[path]


def forget() -> None:
    """Read the file anew at the next call, as after another process has written to it."""
    with _opening:
        _open.clear()


def _read(path: Path) -> list[Measured | Verdict]:
    """The records of a file that can be understood; a file that cannot is said once and counts as empty."""
    try:
        document = json.loads(path.read_text())
        if document["schema"] != SCHEMA:
            return []
        rows = [(Measured, row) for row in document["measured"]] + [(Verdict, row) for row in document["verdicts"]]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        with contextlib.suppress(UserWarning):  # where warnings are errors
            warnings.warn(f"dnl_ext: {path} cannot be read ({error}): run `dnl-ext tune` again", stacklevel=2)
        return []
    return [record for kind, row in rows if (record := _record(kind, row)) is not None]


def _is_another_versions(path: Path) -> bool:
    """Whether the file is one that another version of dnl_ext may still read. OSError where that cannot be told."""
    try:
        document = json.loads(path.read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and isinstance(document.get("schema"), int) and document["schema"] != SCHEMA


def _record(kind: type, row: Any) -> Any:
    """A Measured or Verdict from a row of the file, None where it is not one."""
    try:
        row = dict(row)
        machine = Machine(**row.pop("machine"))
        if kind is Measured:
            call = row.pop("call")
            batches, queries, keys, width, channels = map(int, call.pop("sizes"))
            query_first, key_first, value_first = map(bool, call.pop("channel_first"))
            sizes, layout = (batches, queries, keys, width, channels), (query_first, key_first, value_first)
            times = {str(name): float(time) for name, time in row.pop("milliseconds").items()}
            wrong = {str(name): str(reason) for name, reason in row.pop("wrong").items()}
            row |= {"call": Call(**call, sizes=sizes, channel_first=layout), "milliseconds": times, "wrong": wrong}
            if row["path"] in wrong:
                return None
        elif "channel_first" in row:
            query_first, key_first, value_first = map(bool, row["channel_first"])
            row["channel_first"] = query_first, key_first, value_first
        record = kind(machine=machine, **row)
        return record if record.path in _C.cuda_paths() and _is_sound(record) else None
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError):
        return None


def _is_sound(record: Any) -> bool:
    """Whether its members are of their types, and numbers such as a call can have."""
    timed = isinstance(record, Measured)
    call: Any = record.call if timed else record
    sizes = call.sizes if timed else (call.width, call.channels)
    texts = [*asdict(record.machine).values(), record.path, record.date, call.dtype, getattr(record, "reason", "")]
    return (
        all(isinstance(text, str) for text in texts)
        and isinstance(call.backward, bool)
        and all(type(size) is int and 0 < size < 2**63 for size in sizes)
        and all(map(math.isfinite, getattr(record, "milliseconds", {}).values()))
    )


def _write(path: Path, records: Known) -> None:
    document = {
        "schema": SCHEMA,
        "measured": [asdict(record) for record in records.measured],
        "verdicts": [asdict(record) for record in records.verdicts],
    }
    path = path.resolve()  # a link stays one
    handle, partial = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(json.dumps(document, indent=1) + "\n")
        with contextlib.suppress(OSError):  # the first one of a file; whom it is shared with stays as it was
            os.chmod(partial, path.stat().st_mode & 0o777)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time, where the system has such locks; without, the last to write wins."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path.with_name(path.name + ".lock"), "a") as stream:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield  # closing the file gives it back


# ----------------------------------------------------------------------------------------------------------------------
# The choice
# ----------------------------------------------------------------------------------------------------------------------


def driver() -> str:
    """Version of NVIDIA's driver, as Linux shows it, or the CUDA version that the driver has."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
        return next(word for word in words if word.count(".") >= 1 and word.replace(".", "").isdigit())
    except (OSError, StopIteration):
        version = getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")
        return f"CUDA {version()}"


@functools.cache
def machine_of(device: int) -> Machine:
    """The machine with the GPU of this index; below 0, that of kernels that run on no GPU, as in the tests."""
    name = torch.cuda.get_device_name(device) if device >= 0 else "no GPU"
    return Machine(name, driver(), torch.__version__, __version__)


def measured(machine: Machine, call: Call) -> Measured | None:
    """The record of the call itself or, within NEAR, of the one most like it."""
    records = [record for record in known().measured if record.machine == machine]
    nearest = min(records, key=lambda record: call.distance(record.call), default=None)
    return nearest if nearest and call.distance(nearest.call) <= math.log2(NEAR) else None


def verdict(machine: Machine, path: str, call: Call) -> Verdict | None:
    """What the self-check of a path found, for calls like this one."""
    subject = (machine, path, call.dtype, call.backward, *call.sizes[3:], call.channel_first)
    return next((verdict for verdict in known().verdicts if verdict.subject == subject), None)


def default_path(capability: int, call: Call) -> str:
    """The path of a call where nothing was measured, by DEFAULTS."""
    for default in DEFAULTS:
        first, last = default.capabilities
        fits = first <= capability <= last and call.dtype in default.dtypes and call.sizes[4] <= default.channels
        fits = fits and call.logits >= default.logits
        if fits and call.backward == default.backward and default.path in _C.cuda_paths():
            return default.path
    return "chain"


def choice(machine: Machine, capability: int, call: Call) -> Choice:
    """The path of a call by what is known now; nothing is measured or checked for it."""
    if record := measured(machine, call):
        times = sorted(record.milliseconds.items(), key=lambda item: item[1])
        why = f"measured on {record.date}: " + ", ".join(f"{name} {time:.3g} ms" for name, time in times)
        if record.call != call:
            why += f" ({record.call.describe()})"
        if record.wrong:
            why += f"; wrong here: {', '.join(record.wrong)}"
        return Choice(record.path, why)
    path = default_path(capability, call)
    if path == "chain":
        return Choice(path, "the default; `dnl-ext tune` measures what is fastest here")
    found = verdict(machine, path, call)
    if found is None:
        return Choice(path, "the default of this architecture, after a self-check at its first call", unchecked=True)
    if found.reason:
        return Choice("chain", f"{path}, the default of this architecture, failed its self-check: {found.reason}")
    return Choice(path, f"the default of this architecture; its self-check passed on {found.date}")
