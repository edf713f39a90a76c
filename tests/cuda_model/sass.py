"""Machine code of a kernel: instructions with their control codes, from the listing of `cuobjdump -sass`.

Instructions of sm_70 and later are 128 bits. Bits 105 to 125 steer issue, as Jia et al. found ("Dissecting the NVIDIA
Volta GPU Architecture via Microbenchmarking", 2018, section 2.1):

    105 - 108  cycles before the warp may issue again
    109        0: rather another warp next
    110 - 112  scoreboard that is set until the result is there (7: none)
    113 - 115  scoreboard that is set until the operands are read (7: none)
    116 - 121  scoreboards that must be clear before issue, as a mask
    122 - 125  operands to keep in the reuse cache
"""

import os
import pathlib
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec

NO_BARRIER = 7
HOW_TO_GET = "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm, or a CUDA toolkit, or triton, which brings both"

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/")
_HIGH = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_FUNCTION = re.compile(r"Function : (\S+)")
_GUARD = re.compile(r"^@(!?U?P\w+)\s+")


@dataclass(frozen=True, slots=True)
class Control:
    """What bits 105 to 125 of an instruction say."""

    stall: int
    stay: bool
    write_barrier: int
    read_barrier: int
    wait: int
    reuse: int

    @classmethod
    def of(cls, high):
        """Of the upper 64 bits."""
        return cls(
            stall=high >> 41 & 15,
            stay=bool(high >> 45 & 1),
            write_barrier=high >> 46 & 7,
            read_barrier=high >> 49 & 7,
            wait=high >> 52 & 63,
            reuse=high >> 58 & 15,
        )


@dataclass(frozen=True, slots=True)
class Instruction:
    address: int
    guard: str | None  # "P0", "!P3", "UP1"
    name: str  # with modifiers: "LDSM.16.M88.4"
    operands: tuple[str, ...]
    control: Control

    @property
    def opcode(self):
        return self.name.split(".", 1)[0]

    @property
    def modifiers(self):
        return tuple(self.name.split(".")[1:])

    @property
    def target(self):
        """Address of a branch whose target is part of the instruction, else None."""
        if self.opcode not in ("BRA", "BSSY", "CALL") or not self.operands:
            return None
        last = self.operands[-1]
        return int(last, 16) if re.fullmatch(r"0x[0-9a-f]+", last) else None

    @property
    def text(self):
        guard = f"@{self.guard} " if self.guard else ""
        return f"{guard}{self.name} {', '.join(self.operands)}".rstrip()


def split_operands(text):
    """Operands at the top level: commas within brackets part nothing."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "[({":
            depth += 1
        elif c in "])}":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return (*parts, last) if last else tuple(parts)


def decode(address, text, high):
    """One instruction of its text and the upper half of its word."""
    guard = None
    if match := _GUARD.match(text):
        guard, text = match[1], text[match.end() :]
    name, _, rest = text.partition(" ")
    return Instruction(address, guard, name, split_operands(rest.strip()), Control.of(high))


def parse(listing):
    """{mangled name: instructions} of a listing."""
    functions, code, pending = {}, None, None
    for line in listing.splitlines():
        if match := _FUNCTION.search(line):
            code = functions.setdefault(match[1], [])
        elif match := _LINE.match(line):
            pending = int(match[1], 16), match[2]
        elif pending and (match := _HIGH.match(line)):
            code.append(decode(*pending, int(match[1], 16)))
            pending = None
    return functions


def cuobjdump():
    """The disassembler's path, or None: on PATH, in CUDA_HOME, or in a Python package that brings it."""
    if path := shutil.which("cuobjdump"):
        return path
    folders = [pathlib.Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    if (spec := find_spec("nvidia")) and spec.submodule_search_locations:
        folders += [pathlib.Path(x, "cu13/bin") for x in spec.submodule_search_locations]
    if spec := find_spec("triton"):
        folders.append(pathlib.Path(spec.origin).parent / "backends/nvidia/bin")
    return next((str(x / "cuobjdump") for x in folders if (x / "cuobjdump").exists()), None)


def listing(path, flag):
    """What the disassembler prints of a cubin, an object or a library. RuntimeError without one."""
    tool = cuobjdump()
    if tool is None:
        raise RuntimeError(f"no cuobjdump here: {HOW_TO_GET}")
    environment = {**os.environ, "PATH": f"{pathlib.Path(tool).parent}:{os.environ.get('PATH', '')}"}
    done = subprocess.run([tool, flag, path], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{tool} {flag} {path}: {done.stderr.strip()[-500:]}")
    return done.stdout


def disassemble(path):
    """{mangled name: instructions} of a cubin, an object or a library."""
    return parse(listing(path, "-sass"))


def resources(path):
    """{mangled name: (registers of a thread, bytes of static shared memory of a block)}."""
    return parse_resources(listing(path, "-res-usage"))


def parse_resources(listing):
    found = {}
    for name, registers, shared in re.findall(r"Function (\S+):\s+REG:(\d+) .*?SHARED:(\d+)", listing):
        found[name] = int(registers), int(shared)
    return found
