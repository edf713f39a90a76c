"""Builds the programs of this folder, plainly and under sanitizers.

python tests/gates/programs.py GATE [MODE] [--type TYPE]     prints the path of the program
"""

import hashlib
import pathlib
import subprocess
import sys
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests")]

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


@dataclass(frozen=True)
class Program:
    gate: str
    mode: str = "plain"
    type: str | None = None  # element type; None: all of them


class BuildError(RuntimeError):
    pass


def command(program, csrc, out):
    """The compiler's command line for `program` over the sources in the folder `csrc`."""
    purpose, *flags = MODES[program.mode]
    if lacking := compilers.missing(purpose):
        raise BuildError(f"needs {lacking}")
    name, *macros = PARTS.get(program.gate, (program.gate,))
    source = ROOT / "tests/gates" / f"{name}.cpp"
    defines = [f"-D{macro}" for macro in (*macros, *([f"GATE_TYPE={program.type}"] if program.type else []))]
    includes = [f"-I{csrc}", *(f"-I{ROOT / 'tests' / name}" for name in ("emulator", "cpp", "gates"))]
    return [*compilers.find(purpose), *flags, "-std=c++17", "-w", *defines, *includes, str(source), "-o", str(out)]


def build(program, csrc, out, timeout=600):
    done = subprocess.run(command(program, csrc, out), capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise BuildError(done.stderr)
    return out


def cached(program, folder=ROOT / "build/gates"):
    """The program for the sources as they are, built if they have changed."""
    key = hashlib.sha256(repr(command(program, ROOT / "csrc", "out")).encode())
    for name in ("csrc", "tests/emulator", "tests/cpp", "tests/gates"):
        for path in sorted((ROOT / name).rglob("*")):
            if path.suffix in (".h", ".cuh", ".cpp", ".cu"):
                key.update(path.read_bytes())
    out = folder / f"{program.gate}-{program.mode}-{program.type or 'all'}-{key.hexdigest()[:12]}"
    if not out.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{program.gate}-{program.mode}-{program.type or 'all'}-*"):
            old.unlink()
        build(program, ROOT / "csrc", out)
    return out


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gate")
    parser.add_argument("mode", nargs="?", default="plain", choices=MODES)
    parser.add_argument("--type")
    options = parser.parse_args()
    print(cached(Program(options.gate, options.mode, options.type)))
