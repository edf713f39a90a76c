"""The emulator of CUDA kernels (tests/emulator) tests itself: plainly, and under sanitizers that each find a kind of
fault. CTest runs the same programs: see CMakeLists.txt."""

import functools
import pathlib
import shutil
import subprocess
import tempfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# g++ sees misaligned vectors that clang++ lets pass; clang++'s ThreadSanitizer knows fibers and static shared memory.
CLANG = next(filter(shutil.which, ("clang++", *(f"clang++-{version}" for version in range(22, 13, -1)))), "clang++")
BUILDS = {
    "plain": ("g++", "-O1"),
    "address": ("g++", "-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": (CLANG, "-O1", "-g1", "-fsanitize=thread"),
}


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@functools.cache
def works(compiler, *flags):
    """Whether the compiler makes a program that runs here."""
    if not shutil.which(compiler):
        return False
    with tempfile.TemporaryDirectory() as folder:
        program = pathlib.Path(folder) / "program"
        source = "int main() { return 0; }"
        built = run(compiler, *flags, "-x", "c++", "-", "-o", program, input=source)
        return built.returncode == 0 and run(program).returncode == 0


@pytest.mark.parametrize(
    ("build", "name"),
    [
        ("plain", "test_emulator"),
        ("plain", "test_fragments"),
        ("plain", "test_sm90"),
        ("address", "test_emulator"),
        ("thread", "test_emulator"),
        pytest.param("address", "test_sm90", marks=pytest.mark.slow),
        pytest.param("thread", "test_sm90", marks=pytest.mark.slow),
    ],
)
def test_emulator(build, name, tmp_path):
    command = BUILDS[build]
    if not works(*command):
        pytest.skip(f"{' '.join(command)} does not make a program that runs here")
    includes = [f"-I{ROOT / folder}" for folder in ("csrc", "tests/cpp", "tests/emulator")]
    source, program = ROOT / f"tests/emulator/{name}.cpp", tmp_path / name
    built = run(*command, "-std=c++17", "-Wall", "-Werror", *includes, source, "-o", program)
    assert built.returncode == 0, built.stderr
    result = run(program)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 failed" in result.stdout
