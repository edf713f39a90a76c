"""The C++ compilers that tests call themselves, by what they are asked for.

- ``plain``: any compiler of C++17.
- ``asan``: AddressSanitizer and UndefinedBehaviorSanitizer by g++, since clang++ lets misaligned vectors pass.
- ``tsan``: ThreadSanitizer by clang. g++'s does not say where static shared memory lies, so that blocks of an emulated
  kernel would seem to race in it.
- ``tsan-gnu``: ThreadSanitizer by g++, for code without emulated kernels.
"""

import functools
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]


def zig(target):
    """The command of zig's clang for a machine and system, such as "aarch64-macos".

    It compiles its C++ runtime when it first needs it, which takes a minute; the cache goes with `make clean`.
    """
    cache = (f"ZIG_{kind}_CACHE_DIR={ROOT / 'build/zig'}" for kind in ("GLOBAL", "LOCAL"))
    return ("env", *cache, sys.executable, "-m", "ziglang", "c++", "-target", target)


ZIG = zig(f"{os.uname().machine}-linux-gnu")
CXX = tuple(shlex.split(os.environ.get("CXX", ""))) or ("c++",)
GNU = (CXX, *((f"g++{version}",) for version in ("", *(f"-{v}" for v in range(20, 10, -1)))))
CLANG = (ZIG, CXX, *((f"clang++{version}",) for version in ("", *(f"-{v}" for v in range(30, 14, -1)))))

ASAN = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TSAN = ("-fsanitize=thread",)
IS_GNU, IS_CLANG = "!defined(__clang__)", "defined(__clang__)"
# purpose: candidates, flags, what the preprocessor must find true, what is missing where none serves and how to get it
PURPOSES = {
    "plain": ((CXX, *GNU, *CLANG[1:]), (), "1", "a C++17 compiler: the README lists the commands"),
    "asan": (GNU, ASAN, IS_GNU, "g++ and its AddressSanitizer: the README lists the commands"),
    "tsan": (CLANG, TSAN, IS_CLANG, 'clang and its ThreadSanitizer: pip install -e ".[dev]" brings them on Linux'),
    "tsan-gnu": (GNU, TSAN, IS_GNU, "g++ and its ThreadSanitizer: the README lists the commands"),
}


def works(command, condition):
    """Whether the compiler makes a program that runs here."""
    if not shutil.which(command[0]):
        return False
    with tempfile.TemporaryDirectory() as folder:
        source, program = pathlib.Path(folder, "main.cpp"), pathlib.Path(folder, "program")
        source.write_text(f"#include <string>\n#if !({condition})\n#error another compiler\n#endif\nint main() {{}}\n")
        built = subprocess.run([*command, "-std=c++17", source, "-o", program], capture_output=True)
        return built.returncode == 0 and program.exists() and subprocess.run([program]).returncode == 0


@functools.cache
def find(purpose):
    """The first compiler that serves, with its flags; None where there is none."""
    candidates, flags, condition, _ = PURPOSES[purpose]
    return next(((*command, *flags) for command in candidates if works((*command, *flags), condition)), None)


def missing(purpose):
    """What tests lack, and how to get it; None where a compiler serves."""
    return None if find(purpose) else PURPOSES[purpose][-1]
