"""Builds the operators and dnl_ext._C, for CPU alone or for CPU and CUDA.

Environment:
    DNL_EXT_CPU_ONLY=1      leave CUDA out even where it could be built
    FORCE_CUDA=1            build CUDA even where no GPU is seen (CUDA_HOME names the toolkit)
    TORCH_CUDA_ARCH_LIST    architectures, default "8.0;9.0+PTX"
    MAX_JOBS                parallel compilations
"""

import copy
import os
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError:
    sys.exit("dnl_ext builds against an installed torch: pip install torch, then pip install --no-build-isolation .")

ROOT = Path(__file__).resolve().parent
LIBRARY = "dnl_ext.libdnl_ext"
DEFAULT_ARCHS = "8.0;9.0+PTX"
# The stable ABI version the operators are written for; a binary built with a later torch runs with this one too.
TORCH_TARGET = "0x020a000000000000"

# ninja lies beside the Python that builds, whether or not its environment is activated.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


def flag(name):
    return os.environ.get(name, "0").lower() not in ("", "0", "false", "off", "no")


def with_cuda():
    if flag("DNL_EXT_CPU_ONLY"):
        return False
    can_build = torch.version.cuda is not None and CUDA_HOME is not None
    if flag("FORCE_CUDA"):
        if not can_build:
            missing = "a CUDA build of torch" if torch.version.cuda is None else "a CUDA toolkit (set CUDA_HOME)"
            sys.exit(f"FORCE_CUDA=1: building with CUDA needs {missing}; torch here is {torch.__version__}")
        return True
    return can_build


def extensions():
    """dnl_ext/libdnl_ext.so, the operators without Python, and dnl_ext._C, the Python module that links to it."""
    cuda = with_cuda()
    bindings = "csrc/bindings.cpp"
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
    sources.remove(bindings)
    defines = [("TORCH_TARGET_VERSION", TORCH_TARGET), ("DNL_EXT_TORCH_VERSION", f'"{torch.__version__}"')]
    # Of fast-math only what keeps NaN, Inf and the order of sums. -Wno-maybe-uninitialized: GCC's own AVX-512 headers.
    cxx = "-O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math -fvisibility=hidden -Wall -Wno-maybe-uninitialized"
    arguments = {"cxx": cxx.split()}
    if cuda:
        archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS)
        sources += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cu"))
        defines += [("DNL_EXT_WITH_CUDA", None), ("USE_CUDA", None), ("DNL_EXT_CUDA_ARCHS", f'"{archs}"')]
        arguments["nvcc"] = ["-O3", "-lineinfo", "-Xptxas=-v", "--expt-relaxed-constexpr"]
    common = {"include_dirs": [str(ROOT / "csrc")], "define_macros": defines, "extra_compile_args": arguments}
    operators = (CUDAExtension if cuda else CppExtension)(LIBRARY, sources, **copy.deepcopy(common))
    operators.libraries.remove("torch_python")
    operators.extra_link_args.append(f"-Wl,-soname,{LIBRARY.split('.')[-1]}.so")
    module = CppExtension("dnl_ext._C", [bindings], **common)
    module.runtime_library_dirs.append("$ORIGIN")  # beside it, wherever that is
    return [operators, module]


class Build(BuildExtension):
    """Gives the library of operators its plain name, and links the module to it."""

    def get_ext_filename(self, fullname):
        if LIBRARY.endswith(fullname):  # with the package in front or without
            return fullname.replace(".", os.sep) + ".so"
        return super().get_ext_filename(fullname)

    def build_extension(self, ext):
        if ext.name != LIBRARY:
            ext.extra_link_args.append(self.get_ext_fullpath(LIBRARY))
        super().build_extension(ext)


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
