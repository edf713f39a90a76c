"""What tests need beside Python and torch: each is a mark that skips cleanly where it is missing."""

import importlib.util
import os
import pathlib
import shutil
import sys

import pytest
import routes

needs_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="torch's inductor needs a C++ compiler: g++, or CXX"
)
#: On the path, or beside this Python, where the extra dev puts it.
CMAKE = shutil.which("cmake") or shutil.which("cmake", path=pathlib.Path(sys.executable).parent)
needs_cmake = pytest.mark.skipif(CMAKE is None, reason="needs cmake")
needs_gpu = pytest.mark.skipif(not routes.HAS_GPU, reason="needs a GPU and dnl_ext built with CUDA")
needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the extra onnx",
)
