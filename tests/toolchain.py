"""What tests need beside Python and torch. Where it is missing they skip, with a reason of the form
``needs WHAT: HOW TO GET IT``, which the summary of a run repeats."""

import importlib.util
import os
import pathlib
import re
import shutil
import sys

import compilers
import cuda_model.sass
import pytest
import routes
import torch

from dnl_ext._load import LEFT_OUT

#: The release of torch, as (2, 13). Where a limit of torch ends or begins, tests and docs/platforms.md name it.
TORCH = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])

DEV = 'pip install -e ".[dev]"'
WITHOUT_KERNELS = f"is about kernels, which are left out: {LEFT_OUT}"
NO_GPU = "needs a GPU and dnl_ext built with CUDA: make gpu-check"

needs_kernels = pytest.mark.skipif(bool(LEFT_OUT), reason=WITHOUT_KERNELS)
needs_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")),
    reason="needs g++, or CXX, for torch's inductor: the README lists the commands",
)
#: Beside this Python, where the extra dev puts it, or on the path.
CMAKE = shutil.which("cmake", path=pathlib.Path(sys.executable).parent) or shutil.which("cmake")
needs_cmake = pytest.mark.skipif(CMAKE is None, reason=f"needs cmake: {DEV}")
needs_aot = pytest.mark.skipif(
    not shutil.which("openssl"), reason="needs openssl, which AOTInductor calls: the README lists the commands"
)
needs_binutils = pytest.mark.skipif(
    not (shutil.which("nm") and shutil.which("readelf")), reason="needs nm and readelf: they are GNU binutils"
)
NVCC = shutil.which("nvcc") or f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc"
needs_nvcc = pytest.mark.skipif(
    not (shutil.which(NVCC) and cuda_model.sass.cuobjdump()),
    reason="needs nvcc and cuobjdump: a CUDA toolkit of 12.8 or later",
)
needs_gpu = pytest.mark.skipif(not routes.HAS_GPU, reason=NO_GPU)
needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason=f"needs onnx, onnxscript and onnxruntime: {DEV}",
)


def skip_without_compiler(purpose):
    """A compiler for a purpose of compilers.py. Inside a test, for it takes a program built and run to know."""
    if lacking := compilers.missing(purpose):
        pytest.skip(f"needs {lacking}")


def left_out(reasons):
    """One line for many reasons, those of the same remedy together; none if nothing was missing."""
    groups = {}
    for reason in reasons:
        if match := re.fullmatch(r"(?:Skipped: )?needs (.*?): (.*)", reason):
            groups.setdefault(match[2], []).append(match[1])
    parts = [f"{len(whats)} need {', '.join(dict.fromkeys(whats))} ({how})" for how, whats in groups.items()]
    return f"Tests left out: {'; '.join(parts)}" if parts else None
