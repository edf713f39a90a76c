"""Builds the operators and dnl_ext._C, for CPU alone or for CPU and CUDA. build_backend.py chooses torch and toolkit.

Environment:
    DNL_EXT_NO_KERNELS=1    compile nothing: a pure Python package, whose operators are plain PyTorch
    DNL_EXT_CPU_ONLY=1      leave CUDA out even where it could be built
    DNL_EXT_PYTHONS         other interpreters, separated by spaces: one wheel then serves them and this Python
    FORCE_CUDA=1            fail where CUDA cannot be built, and build it with a toolkit that seems incomplete
    CUDA_HOME               the CUDA toolkit, default: that of the nvcc on PATH, then /usr/local/cuda
    TORCH_CUDA_ARCH_LIST    architectures, default "8.0;9.0a;9.0+PTX;10.0;12.0", without the last two before CUDA 12.8;
                            9.0a adds Hopper's kernels, which have no other
    MAX_JOBS                parallel compilations, and architectures of one CUDA file compiled at a time
    DNL_EXT_QUICK_BUILD=1   optimise little: compiled in a third of the time, for work on all but the CPU's kernels
"""

import copy
import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import __version__ as setuptools_version
from setuptools import setup
from setuptools.command.build_py import build_py

import build_backend

ROOT = Path(__file__).resolve().parent
LIBRARY = "dnl_ext.libdnl_ext"
LINUX, MACOS = sys.platform.startswith("linux"), sys.platform == "darwin"
HOPPER = "csrc/ops/pairwise/hopper/hopper_cuda.cu"  # compiled for 9.0a alone, all else for the other architectures
#: Written into a package without kernels: why. dnl_ext/_load.py reads it.
MARKER = "_left_out.txt"
# The stable ABI version the operators are written for; a binary built with a later torch runs with this one too.
TORCH_TARGET = "0x020a000000000000"


def extensions(torch, cpp_extension, toolkit, left_out):
    """dnl_ext/libdnl_ext.so, the operators without Python, and dnl_ext._C, the Python module that links to it."""
    bindings = "csrc/bindings.cpp"
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
    sources.remove(bindings)
    defines = [("TORCH_TARGET_VERSION", TORCH_TARGET), ("DNL_EXT_TORCH_VERSION", f'"{torch.__version__}"')]
    # Of fast-math only what keeps NaN, Inf and the order of sums. -Wno-maybe-uninitialized: GCC's own AVX-512 headers.
    cxx = "-ffp-contract=fast -fno-math-errno -fno-trapping-math -fvisibility=hidden -Wall -Wno-maybe-uninitialized"
    # A variable of its own: many an environment's CFLAGS ask for -O2, with which some kernels take three times as long.
    arguments = {"cxx": ["-O1" if build_backend.flag(os.environ, "DNL_EXT_QUICK_BUILD") else "-O3", *cxx.split()]}
    if "-g" not in os.environ.get("CFLAGS", ""):  # many a Python asks for it: nine tenths of the library
        arguments["cxx"].append("-g0")
    includes, libraries = [str(ROOT / "csrc")], []
    if toolkit:
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or build_backend.default_archs(toolkit.version)
        os.environ["TORCH_CUDA_ARCH_LIST"], hopper = build_backend.without_hopper(archs)
        sources += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cu"))
        sources.remove(HOPPER)
        defines += [("DNL_EXT_HOPPER", None)] if hopper else []
        defines += [("DNL_EXT_WITH_CUDA", None), ("USE_CUDA", None), ("DNL_EXT_CUDA_ARCHS", f'"{archs}"')]
        arguments["nvcc"] = ["-O3", "-lineinfo", "-Xptxas=-v", "--expt-relaxed-constexpr"]
        # Architectures side by side: compiled for one after the other, the largest file outlasts all the others.
        jobs = os.environ.get("MAX_JOBS", "")
        arguments["nvcc"].append(f"--threads={jobs if jobs.isdigit() else 0}")  # 0: one for each core
        # torch adds those of CUDA_HOME itself. Those of the system are the compiler's own, and come in its order.
        headers = dict.fromkeys([toolkit.include, build_backend.cublas_include(toolkit)])
        includes += [folder for folder in headers if folder not in ("", "/usr/include")]
        libraries += [toolkit.libraries] if toolkit.libraries else []
    common = {"include_dirs": includes, "define_macros": defines, "extra_compile_args": arguments}
    extension = cpp_extension.CUDAExtension if toolkit else cpp_extension.CppExtension
    operators = extension(LIBRARY, sources, library_dirs=libraries, **copy.deepcopy(common))
    operators.libraries.remove("torch_python")
    module = cpp_extension.CppExtension("dnl_ext._C", [bindings], **common)
    for library in (operators, module) if LINUX else ():
        # Before torch's libraries, which hold parts of newer versions of it: another torch may lack what these have.
        library.libraries.insert(0, "stdc++")
    name = f"{LIBRARY.split('.')[-1]}.so"
    operators.extra_link_args.append(f"-Wl,-install_name,@rpath/{name}" if MACOS else f"-Wl,-soname,{name}")
    module.define_macros.append(("DNL_EXT_CUDA_LEFT_OUT", json.dumps(left_out)))
    module.runtime_library_dirs.append("@loader_path" if MACOS else "$ORIGIN")  # beside it, wherever that is
    return [operators, module]


def build_command(cpp_extension, pythons, toolkit):
    class Build(cpp_extension.BuildExtension):
        """Gives the library of operators its plain name, links the module to it, and says what to do if that fails.

        The module is built for each of `pythons` too: each finds its own by its suffix.
        """

        #: The Python that the module is built for, where it is not this one.
        python = None

        def run(self):
            try:
                super().run()
            except Exception as error:
                without_cuda = "DNL_EXT_CPU_ONLY=1 leaves those for CUDA out; " if toolkit else ""
                sys.exit(
                    f"{error}\n\ndnl_ext: its kernels do not compile here, for the reason above. They need GCC 11 or "
                    f"Clang 15 or later; {without_cuda}{build_backend.WITHOUT_KERNELS}."
                )
            if self.inplace:  # an editable installation without kernels may have left its note
                Path(ROOT, "dnl_ext", MARKER).unlink(missing_ok=True)

        def get_ext_filename(self, fullname):
            if LIBRARY.endswith(fullname):  # with the package in front or without
                return fullname.replace(".", os.sep) + ".so"
            if self.python:
                return fullname.replace(".", os.sep) + self.python.suffix
            return super().get_ext_filename(fullname)

        def build_extension(self, ext):
            is_library = ext.name == LIBRARY
            if is_library and ("DNL_EXT_HOPPER", None) in ext.define_macros:
                ext.extra_objects += self.compile_hopper(ext)
            if not is_library:
                ext.extra_link_args.append(self.get_ext_fullpath(LIBRARY))
            if MACOS:  # Python modules are bundles there, which nothing can link to
                ext.extra_link_args.append("-dynamiclib" if is_library else "-bundle")
                for linker in ("linker_so", "linker_so_cxx"):
                    words = getattr(self.compiler, linker, [])
                    words[:] = [word for word in words if word != "-bundle"]
            super().build_extension(ext)
            if not is_library and not self.inplace:
                for self.python in pythons:
                    self.build_for_other_python(ext)
                self.python = None

        def build_for_other_python(self, ext):
            """As the base class does, with the headers of `self.python` before those of this one."""
            objects = self.compiler.compile(
                ext.sources,
                output_dir=os.path.join(self.build_temp, self.python.tag),
                macros=ext.define_macros,
                include_dirs=[*self.python.includes, *ext.include_dirs],
                debug=self.debug,
                extra_postargs=ext.extra_compile_args,
                depends=ext.depends,
            )
            self.compiler.link_shared_object(
                objects,
                self.get_ext_fullpath(ext.name),
                libraries=self.get_libraries(ext),
                library_dirs=ext.library_dirs,
                runtime_library_dirs=ext.runtime_library_dirs,
                extra_postargs=ext.extra_link_args,
                debug=self.debug,
                build_temp=self.build_temp,
                target_lang="c++",
            )

        def compile_hopper(self, ext):
            """Object files of HOPPER: with an architecture among its arguments, torch adds none."""
            arguments = copy.deepcopy(ext.extra_compile_args)
            arguments["nvcc"].append("-gencode=arch=compute_90a,code=sm_90a")
            return self.compiler.compile(
                [HOPPER],
                output_dir=os.path.join(self.build_temp, "hopper"),
                macros=ext.define_macros,
                include_dirs=ext.include_dirs,
                debug=self.debug,
                extra_postargs=arguments,
                depends=ext.depends,
            )

    return Build


def wheel_command(pythons):
    from setuptools.command.bdist_wheel import bdist_wheel

    class Wheel(bdist_wheel):
        """Names every Python that the wheel has a module for."""

        def get_tag(self):
            python, abi, platform = super().get_tag()
            if not pythons:
                return python, abi, platform
            tags = {python, *(other.tag for other in pythons)}
            return ".".join(sorted(tags, key=lambda tag: int(tag[3:]))), "none", platform

    return Wheel


def build_python(left_out):
    class BuildPython(build_py):
        """Writes into the package why it has no kernels."""

        def run(self):
            # build/ outlives a build: a module gone from the sources, or one for another Python, would be packed.
            if not (self.editable_mode or self.distribution.have_run.get("build_ext")):
                shutil.rmtree(Path(self.build_lib, "dnl_ext"), ignore_errors=True)
            super().run()
            if left_out:
                folder = self.get_package_dir("dnl_ext") if self.editable_mode else Path(self.build_lib, "dnl_ext")
                Path(folder, MARKER).write_text(f"{left_out}\n")

    return BuildPython


def compiled():
    """The arguments of setup() for what is compiled."""
    # ninja lies beside the Python that builds, whether or not its environment is activated.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    with build_backend.target_importable():
        try:
            import torch
        except ImportError as error:
            sys.exit(f"dnl_ext builds against an installed torch, which cannot be imported: {error}")
        if build_backend.too_old(torch.__version__):
            oldest = "{}.{}".format(*build_backend.OLDEST_TORCH)
            sys.exit(f"dnl_ext builds against torch {oldest} or later, and finds {torch.__version__}")
        toolkit, left_out = build_backend.choose_cuda(torch.__version__, torch.version.cuda, os.environ)
        if toolkit:  # before torch looks for one
            os.environ["CUDA_HOME"] = toolkit.home
        from torch.utils import cpp_extension
    if toolkit:
        print(f"dnl_ext: built for torch {torch.__version__} and CUDA, with the toolkit in {toolkit.home}")
    else:
        print(f"dnl_ext: built for torch {torch.__version__} and the CPU. CUDA is left out: {left_out}")
    pythons = [build_backend.inspect_python(path) for path in os.environ.get("DNL_EXT_PYTHONS", "").split()]
    return {
        "ext_modules": extensions(torch, cpp_extension, toolkit, left_out),
        "cmdclass": {
            "build_ext": build_command(cpp_extension, pythons, toolkit),
            "bdist_wheel": wheel_command(pythons),
        },
    }


# Without build isolation pip does not ask for what pyproject.toml requires, and a new environment may come with 65.
if int(setuptools_version.split(".")[0]) < build_backend.OLDEST_SETUPTOOLS:
    sys.exit(
        f"dnl_ext is built with setuptools {build_backend.OLDEST_SETUPTOOLS} or later, and finds {setuptools_version}: "
        "pip install --upgrade setuptools"
    )
left_out = build_backend.kernels_left_out(os.environ, sys.platform)
arguments = {"cmdclass": {"build_py": build_python(left_out)}}
# Metadata and the source distribution alone need no torch.
if not left_out and ("bdist_wheel" in sys.argv or not {"egg_info", "dist_info", "sdist"}.intersection(sys.argv)):
    modules = compiled()
    arguments = {**modules, "cmdclass": {**arguments["cmdclass"], **modules["cmdclass"]}}
setup(**arguments)
