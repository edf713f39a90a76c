"""The CPU kernels compile for systems that are not here: clang for macOS on Arm and for Windows, from the extra dev.

What comes out is not run. It shows that the sources ask for nothing that only Linux or GCC has.
"""

import importlib.util
import subprocess

import compilers
import pytest

ROOT = compilers.ROOT
TARGETS = ("aarch64-macos", "x86_64-windows-gnu", "x86_64-macos", "aarch64-linux-gnu", "x86_64-linux-gnu")
SHORT_FORM = {("aarch64-macos", "isa_neon_bf16"), ("x86_64-windows-gnu", "isa_avx512_bf16")}
FILES = sorted(path.stem for path in (ROOT / "csrc/core/cpu").glob("*.cpp"))
#: GCC's pragmas stand beside those of clang, which knows them not.
FLAGS = ("-std=c++17", "-O0", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-fvisibility=hidden", f"-I{ROOT}/csrc")


@pytest.mark.skipif(not importlib.util.find_spec("ziglang"), reason='needs ziglang: pip install -e ".[dev]" on Linux')
@pytest.mark.parametrize(
    ("target", "file"),
    [
        pytest.param(target, file, marks=() if (target, file) in SHORT_FORM else pytest.mark.slow)
        for target in TARGETS
        for file in FILES
    ],
)
def test_kernels_compile(target, file, tmp_path):
    command = [*compilers.zig(target), *FLAGS, "-c", ROOT / f"csrc/core/cpu/{file}.cpp", "-o", tmp_path / "kernels.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "kernels.o").stat().st_size > 0
