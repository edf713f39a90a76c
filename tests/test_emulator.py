"""The emulator of CUDA kernels (tests/emulator) tests itself: plainly, and under sanitizers that each find a kind of
fault. CTest runs the same programs: see CMakeLists.txt."""

import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROGRAMS = ("test_emulator", "test_fragments")
# g++ sees misaligned vectors that clang++ lets pass; clang++'s ThreadSanitizer knows fibers and static shared memory.
CLANG = next(
    (name for name in ("clang++", *(f"clang++-{v}" for v in range(22, 13, -1))) if shutil.which(name)), "clang++"
)
BUILDS = {
    "plain": ("g++", "-O1"),
    "address": ("g++", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": (CLANG, "-O1", "-g", "-fsanitize=thread"),
}


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="module", params=BUILDS)
def build(request, tmp_path_factory):
    """A compiler's command line that links and runs here."""
    compiler, *flags = BUILDS[request.param]
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    program = tmp_path_factory.mktemp("probe") / "probe"
    built = run(compiler, *flags, "-x", "c++", "-", "-o", program, input="int main() { return 0; }")
    if built.returncode or run(program).returncode:
        pytest.skip(f"{compiler} {' '.join(flags)} does not make a program that runs here")
    return compiler, *flags


@pytest.mark.parametrize("name", PROGRAMS)
def test_emulator(build, name, tmp_path):
    includes = [f"-I{ROOT / folder}" for folder in ("csrc", "tests/cpp", "tests/emulator")]
    built = run(*build, "-std=c++17", "-Wall", "-Werror", *includes, ROOT / f"tests/emulator/{name}.cpp", "-o",
                tmp_path / name)  # fmt: skip
    assert built.returncode == 0, built.stderr
    result = run(tmp_path / name)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 failed" in result.stdout
