"""The emulator of CUDA kernels (tests/emulator) tests itself: plainly, and under sanitizers that each find a kind of
fault. CTest runs the same programs: see CMakeLists.txt."""

import pathlib
import subprocess

import compilers
import pytest
from toolchain import skip_without_compiler

ROOT = pathlib.Path(__file__).parents[2]
# Build: purpose in compilers.py, flags.
BUILDS = {
    "plain": ("plain", "-O1"),
    "address": ("asan", "-O0", "-g1"),
    "thread": ("tsan", "-O1", "-g1"),
}


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


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
    purpose, *flags = BUILDS[build]
    skip_without_compiler(purpose)
    includes = [f"-I{ROOT / folder}" for folder in ("csrc", "tests/cpp", "tests/emulator")]
    source, program = ROOT / f"tests/emulator/{name}.cpp", tmp_path / name
    built = run(*compilers.find(purpose), *flags, "-std=c++17", "-Wall", "-Werror", *includes, source, "-o", program)
    assert built.returncode == 0, built.stderr
    result = run(program)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 failed" in result.stdout
