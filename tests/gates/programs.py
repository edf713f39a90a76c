"""Builds the programs of this folder, plainly and under sanitizers, and those of tests/cpp that find mutants of the CPU
kernels, for this machine or for Arm.

python tests/gates/programs.py GATE [MODE] [--type TYPE]     prints the path of the program
"""

import hashlib
import pathlib
import shutil
import subprocess
import sys
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests")]

import builds  # noqa: E402
import compilers  # noqa: E402

# Mode: purpose in compilers.py, flags.
MODES = {
    "plain": ("plain", "-O1"),
    "fast": ("plain", "-O2"),
    "asan": ("asan", "-O1", "-g"),
    "tsan": ("tsan", "-O1", "-g"),
}
ENVIRONMENT = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
# Gates of one source: its name, and the macro that says what it runs.
PARTS = {
    f"{source}{part}": (source, f"GATE_{source.upper()}={bits}")
    for source in ("fused", "hopper")
    for part, bits in {"": 3, "_forward": 1, "_backward": 2}.items()
}
# Gates of the CPU kernels: a host test, macros, and the instruction set whose kernels it runs, if it runs any.
CPU = {
    "cpu_conversions": ("test_conversions", (), None),
    "cpu_exp2_avx2": ("test_exp2_avx2", (), None),
    "cpu_exp2_avx512": ("test_exp2_avx512", (), None),
    "cpu_products": ("test_products", (), None),
    "cpu_tiles": ("test_amx", (), None),
    "cpu_kernels": ("test_cpu_kernels", (), "generic"),
    "cpu_kernels_avx2": ("test_cpu_kernels", (), "avx2"),
    "arm_products": ("test_products", ("DNL_NEON",), None),
    "arm_bf16_products": ("test_products", ("DNL_NEON", "DNL_BF16_PRODUCTS"), None),
    "arm_bf16_kernels": ("test_cpu_kernels", (), "neon_bf16"),
}
ARM = ("aarch64-linux-gnu-g++", "qemu-aarch64")


@dataclass(frozen=True)
class Program:
    gate: str
    mode: str = "plain"
    type: str | None = None  # element type; None: all of them


class BuildError(RuntimeError):
    pass


def lacks_arm():
    """What programs for Arm lack, and how to get it; None where nothing is missing."""
    absent = [tool for tool in ARM if not shutil.which(tool)]
    return f"{' and '.join(absent)}: apt-get install g++-aarch64-linux-gnu qemu-user" if absent else None


def lacks_set(name):
    """An instruction set of x86 that this CPU is not known to have; None where it has it."""
    cpu = pathlib.Path("/proc/cpuinfo")
    return None if cpu.exists() and f" {name}" in cpu.read_text() else f"a CPU with {name}"


def lacking(program):
    """What a program lacks here, and how to get it; None where nothing is missing."""
    if program.gate.startswith(("cpu_exp2_", "cpu_kernels_")):
        return lacks_set(program.gate.rpartition("_")[2])
    return lacks_arm() if program.gate.startswith("arm_") else compilers.missing(MODES[program.mode][0])


def cpu_command(program, csrc, out):
    """The same for a gate of the CPU kernels."""
    purpose, *flags = MODES[program.mode]
    name, macros, capability = CPU[program.gate]
    compiler = (ARM[0], "-static") if program.gate.startswith("arm_") else compilers.find(purpose)
    sources = [ROOT / f"tests/cpp/{name}.cpp"]
    if capability:
        macros = (*macros, f"DNL_SET=kernels_{capability}")
        sources += [ROOT / "tests/cpp/one_set.cpp", pathlib.Path(csrc, f"core/cpu/isa_{capability}.cpp")]
    flags += ["-std=c++17", "-w", "-pthread", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
    flags += [*(f"-D{macro}" for macro in macros), f"-I{csrc}", f"-I{ROOT}/tests/cpp"]
    return [*compiler, *flags, *map(str, sources), "-o", str(out)]


def command(program, csrc, out):
    """The compiler's command line for `program` over the sources in the folder `csrc`."""
    if what := lacking(program):
        raise BuildError(f"needs {what}")
    if program.gate in CPU:
        return cpu_command(program, csrc, out)
    purpose, *flags = MODES[program.mode]
    name, *macros = PARTS.get(program.gate, (program.gate,))
    source = ROOT / "tests/gates" / f"{name}.cpp"
    defines = [f"-D{macro}" for macro in (*macros, *([f"GATE_TYPE={program.type}"] if program.type else []))]
    includes = [f"-I{csrc}", *(f"-I{ROOT / 'tests' / name}" for name in ("emulator", "cpp", "gates"))]
    return [*compilers.find(purpose), *flags, "-std=c++17", "-w", *defines, *includes, str(source), "-o", str(out)]


def build(program, csrc, out, timeout=600):
    emulated = program.gate.startswith("arm_")
    binary = pathlib.Path(f"{out}.arm") if emulated else out
    done = subprocess.run(command(program, csrc, binary), capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise BuildError(done.stderr)
    if emulated:
        out.write_text(f'#!/bin/sh\nexec {ARM[1]} -cpu max {binary} "$@"\n')
        out.chmod(0o755)
    return out


def cached(program, folder=ROOT / "build/gates"):
    """The program for the sources as they are, built if they have changed."""
    key = hashlib.sha256(repr(command(program, ROOT / "csrc", "out")).encode())
    for name in ("csrc", "tests/emulator", "tests/cpp", "tests/gates"):
        for path in sorted((ROOT / name).rglob("*")):
            if path.suffix in (".h", ".cuh", ".cpp", ".cu"):
                key.update(path.read_bytes())
    out = folder / f"{program.gate}-{program.mode}-{program.type or 'all'}-{key.hexdigest()[:12]}"

    def make():
        for old in folder.glob(f"{program.gate}-{program.mode}-{program.type or 'all'}-*"):
            old.unlink()
        build(program, ROOT / "csrc", out)

    return builds.once(out, make)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gate")
    parser.add_argument("mode", nargs="?", default="plain", choices=MODES)
    parser.add_argument("--type")
    options = parser.parse_args()
    print(cached(Program(options.gate, options.mode, options.type)))
