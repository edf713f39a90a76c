"""The calls that are modelled, what they launch, and the machine code of what is launched."""

import functools
import hashlib
import json
import pathlib
import shutil
import subprocess
from dataclasses import dataclass

import builds
import compilers
import cuda_budget

from . import interpret, sass

ROOT = pathlib.Path(__file__).parents[2]
BUILD = ROOT / "build/cuda_model"
SHARED_BYTES_KEPT = 1024  # of a block, by the system


@dataclass(frozen=True)
class Call:
    """A call of pairwise attention in bfloat16, one image, as many keys as queries."""

    direction: str  # forward, backward
    path: str  # chain, fused, hopper
    layout: str  # rows, channel-first
    width: int
    channels: int

    @property
    def name(self):
        return f"{self.direction} ({self.width}, {self.channels}) {self.layout}"


HOPPER = (ROOT / "csrc/ops/pairwise/hopper").is_dir()
SHAPES = ((256, 256), (256, 512), (256, 1024))
LAYOUTS = ("channel-first", "rows")
POSITIONS = (4096, 16384)


def paths_of(arch):
    """Paths whose kernels are modelled on an architecture."""
    return ("chain", "fused", "hopper") if HOPPER and arch == "9.0" else ("chain", "fused")


@functools.cache
def recorder():
    """The program of launches.cpp, built for the sources as they are."""
    command = [*compilers.find("plain"), "-std=c++17", "-O0", "-w", "-rdynamic"]
    command += [f"-I{ROOT}/csrc", f"-I{ROOT}/tests/emulator", str(pathlib.Path(__file__).parent / "launches.cpp")]
    sources = [*sources_of("csrc"), *sources_of("tests/emulator"), *sources_of("tests/cuda_model")]
    program = BUILD / f"launches-{key_of(command, sources)}"

    def make():
        for old in BUILD.glob("launches-*"):
            old.unlink()
        subprocess.run([*command, "-o", str(program), "-ldl"], check=True)

    return builds.once(program, make)


def cubins(nvcc):
    """The folder of the kernels compiled from the sources as they are; older ones are removed."""
    folder = BUILD / f"cubins-{key_of([str(nvcc)], [*sources_of('csrc'), ROOT / 'tests/cuda_kernels.cu'])}"
    for old in BUILD.glob("cubins-*"):
        if old != folder:
            shutil.rmtree(old)
    return folder


def sources_of(folder):
    return sorted(x for x in (ROOT / folder).rglob("*") if x.suffix in (".h", ".cuh", ".cpp", ".cu"))


def key_of(command, sources):
    key = hashlib.sha256(repr(command).encode())
    for path in sources:
        key.update(path.read_bytes())
    return key.hexdigest()[:12]


@functools.cache
def record(call, positions, capability, multiprocessors, key_tiles=None):
    """What a call launches, in order: dictionaries as launches.cpp prints them."""
    sizes = [1, positions, positions, call.width, call.channels, capability, multiprocessors]
    sizes += [] if key_tiles is None else [key_tiles]
    command = [str(recorder()), call.direction, call.path, call.layout, *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


class Code:
    """Kernels of some cubins: instructions, registers of a thread, static shared memory of a block, by plain name."""

    def __init__(self, paths, arch):
        self.arch = arch
        functions, usage = {}, {}
        for path in paths:
            functions |= sass.disassemble(path)
            usage |= sass.resources(path)
        plain = dict(zip(functions, cuda_budget.short(functions), strict=True))
        self.functions = {plain[name]: code for name, code in functions.items()}
        self.resources = {plain[name]: usage[name] for name in functions}
        self.programs = {}

    def program(self, plain):
        if plain not in self.programs:
            self.programs[plain] = interpret.Program(self.functions[plain], self.arch)
        return self.programs[plain]

    def resident(self, plain, launch):
        """Blocks of a launch that a multiprocessor holds."""
        most_threads, most_blocks, shared_kib = cuda_budget.LIMITS[self.arch.removesuffix("a")]
        registers, static = self.resources[plain]
        shared = launch.shared + static + SHARED_BYTES_KEPT
        by_registers = 65536 // (launch.threads * -(-registers // 8) * 8)
        return max(1, min(most_blocks, most_threads // launch.threads, by_registers, shared_kib * 1024 // shared))


@functools.cache
def plain_name(mangled):
    """As cuda_budget.json writes it. Compilers mangle some template arguments differently."""
    return cuda_budget.short([mangled])[0]
