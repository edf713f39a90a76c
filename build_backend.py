"""Setuptools as a PEP 517 backend, for the torch that will run what is built, and whether CUDA is part of it.

DNL_EXT_NO_KERNELS=1 asks for a package without anything compiled, which needs neither a compiler nor torch to be built.

Build isolation hides the environment that pip installs into. With torch among the requirements of the build, pip would
fetch the newest one, often for CUDA, whatever torch that environment has. So torch is asked for only where there is
none, and setup.py imports the one that is there.
"""

import contextlib
import glob
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import site
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

OLDEST_SETUPTOOLS = 77
OLDEST_TORCH = (2, 10)
USUAL_TOOLKIT = "/usr/local/cuda"
#: Architectures that are built for, and the CUDA release whose nvcc first knows them. PTX is that of 9.0: what has no
#: machine code here, such as 11.0, compiles it at its first call.
ARCHS = {"8.0": (11, 0), "9.0a": (12, 0), "9.0+PTX": (11, 8), "10.0": (12, 8), "12.0": (12, 8)}


# ----------------------------------------------------------------------------------------------------------------------
# The torch to build against
# ----------------------------------------------------------------------------------------------------------------------


def target_folders():
    """The site-packages of the environment that this Python installs into, hidden by build isolation or not."""
    folders = site.getsitepackages()
    if sys.prefix == sys.base_prefix:  # in a virtual environment the user's packages do not count
        folders.append(site.getusersitepackages())
    return folders


def too_old(torch_version):
    return tuple(map(int, re.findall(r"\d+", torch_version)[:2])) < OLDEST_TORCH


def has_torch(folders):
    """Whether a torch lies there that dnl_ext can be built against and run with."""
    found = importlib.metadata.distributions(name="torch", path=folders)
    return any(not too_old(torch.version) for torch in found)


def torch_requirement():
    """What pip shall fetch for the build: the newest torch, as for the environment, only where that has none."""
    if kernels_left_out(os.environ, sys.platform):  # nothing is compiled against it
        return []
    if has_torch(target_folders()) or importlib.util.find_spec("torch"):
        return []
    return ["torch>={}.{}".format(*OLDEST_TORCH)]


def get_requires_for_build_wheel(config_settings=None):
    return [*build_meta.get_requires_for_build_wheel(config_settings), *torch_requirement()]


def get_requires_for_build_editable(config_settings=None):
    return [*build_meta.get_requires_for_build_editable(config_settings), *torch_requirement()]


@contextlib.contextmanager
def target_importable():
    """While entered, what the target environment has can be imported, after all that the build has itself."""
    hidden = [folder for folder in target_folders() if folder not in sys.path]
    sys.path += hidden
    try:
        yield
    finally:
        for folder in hidden:
            sys.path.remove(folder)


# ----------------------------------------------------------------------------------------------------------------------
# Kernels at all
# ----------------------------------------------------------------------------------------------------------------------

#: How an installation comes about whatever the compiler does.
WITHOUT_KERNELS = "DNL_EXT_NO_KERNELS=1 pip install . installs dnl_ext without kernels, as plain PyTorch"


def kernels_left_out(environ, platform):
    """Why the package is installed without kernels, in one line for users of it; empty where they are built.

    Args:
        environ: DNL_EXT_NO_KERNELS is read.
        platform: as sys.platform.
    """
    if flag(environ, "DNL_EXT_NO_KERNELS"):
        return (
            "installed with DNL_EXT_NO_KERNELS=1; pip install --force-reinstall --no-deps . without it builds them, "
            "with GCC 11 or Clang 15"
        )
    if platform == "win32":
        return "on Windows, whose compiler MSVC has not the vector types of GCC and Clang that they are written in"
    return ""


# ----------------------------------------------------------------------------------------------------------------------
# Other interpreters
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Python:
    """What compiling a module for another interpreter takes."""

    tag: str  # of wheels: "cp312"
    suffix: str  # of modules: ".cpython-312-x86_64-linux-gnu.so"
    includes: tuple[str, ...]  # folders of Python.h and pyconfig.h


def inspect_python(path):
    """The Python at a path or of a name on PATH, which needs its headers and nothing else."""
    code = (
        "import json, sys, sysconfig as s; print(json.dumps([sys.implementation.name, 'cp%d%d' % sys.version_info[:2], "
        "s.get_config_var('EXT_SUFFIX'), sorted({s.get_path('include'), s.get_path('platinclude')}), "
        "s.get_config_var('Py_GIL_DISABLED')]))"
    )
    answer = output_of(path, "-c", code)
    try:
        implementation, tag, suffix, includes, free_threaded = json.loads(answer)
    except ValueError as error:
        raise SystemExit(f"DNL_EXT_PYTHONS: {path} does not run: {answer or 'no such command'}") from error
    if implementation != "cpython" or free_threaded:  # pip would take a wheel without an ABI for both kinds of one tag
        raise SystemExit(f"DNL_EXT_PYTHONS: expected CPython with its lock, got {path}")
    if not any(Path(folder, "Python.h").is_file() for folder in includes):
        raise SystemExit(f"DNL_EXT_PYTHONS: {path} has no headers: there is no Python.h in {' or '.join(includes)}")
    return Python(tag, suffix, tuple(includes))


# ----------------------------------------------------------------------------------------------------------------------
# CUDA
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit in the folder `home`. Empty strings for what it lacks."""

    home: str
    include: str  # the folder of cuda_runtime.h
    libraries: str  # the folder of libcudart.so
    version: str  # nvcc's: "13.0"

    @property
    def major(self):
        return major(self.version)

    @property
    def lacks(self):
        needed = {"bin/nvcc": self.version, "cuda_runtime.h": self.include, "libcudart.so": self.libraries}
        return [name for name, found in needed.items() if not found]


def major(version):
    return version.split(".")[0]


def inspect_toolkit(home):
    """The Toolkit in a folder, in the layouts of NVIDIA's installers, conda and Debian (home /usr)."""

    def folder_of(name, *patterns):
        found = (path for pattern in patterns for path in sorted(glob.glob(f"{glob.escape(str(home))}/{pattern}")))
        return next((path for path in found if Path(path, name).is_file()), "")

    release = re.search(r"release (\d+\.\d+)", output_of(Path(home, "bin/nvcc"), "--version"))
    return Toolkit(
        str(home),
        folder_of("cuda_runtime.h", "include", "targets/*/include"),
        folder_of("libcudart.so", "lib64", "lib", "targets/*/lib", "lib/*-linux-gnu"),
        release[1] if release else "",
    )


def cublas_include(toolkit):
    """The folder of cublas_v2.h: the toolkit's, else that of NVIDIA's package that torch has cuBLAS from, else ""."""
    packages = (glob.glob(f"{glob.escape(folder)}/nvidia/*/include") for folder in [*target_folders(), *sys.path])
    folders = [toolkit.include, *sorted({path for found in packages for path in found})]
    return next((folder for folder in folders if folder and Path(folder, "cublas_v2.h").is_file()), "")


def output_of(*command):
    """What a command writes, or nothing if it does not run."""
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    except OSError:
        return ""


def find_toolkit(torch_cuda, environ):
    """A whole Toolkit of torch's major version, else a whole one, else one that lacks something, else None.

    CUDA_HOME or CUDA_PATH decide alone. An nvcc on the path may be a script that calls another: its own word for where
    it lies (TOP) counts as well.
    """
    if named := environ.get("CUDA_HOME") or environ.get("CUDA_PATH"):
        return inspect_toolkit(named)
    homes = []
    if nvcc := shutil.which("nvcc", path=environ.get("PATH", "")):
        homes += [Path(nvcc).parents[1], Path(nvcc).resolve().parents[1]]
        if top := re.search(r"^#\$ TOP=(.+)$", output_of(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull), re.MULTILINE):
            homes.append(Path(top[1].strip()).resolve())
    homes += filter(os.path.exists, [USUAL_TOOLKIT])
    toolkits = [inspect_toolkit(home) for home in homes]
    return min(toolkits, key=lambda toolkit: (len(toolkit.lacks), toolkit.major != major(torch_cuda)), default=None)


def default_archs(cuda):
    """TORCH_CUDA_ARCH_LIST where it is not set, for a toolkit of version `cuda` ("13.0")."""
    release = tuple(map(int, cuda.split(".")))
    return ";".join(arch for arch, first in ARCHS.items() if first <= release)


def flag(environ, name):
    return environ.get(name, "0").lower() not in ("", "0", "false", "off", "no")


def choose_cuda(torch_version, torch_cuda, environ):
    """The Toolkit to build CUDA with and "", or None and why CUDA is left out.

    Args:
        torch_version, torch_cuda: of the torch that is built against; its CUDA version is None in a CPU build.
        environ: DNL_EXT_CPU_ONLY, FORCE_CUDA, CUDA_HOME, CUDA_PATH and PATH are read.

    Raises:
        SystemExit: FORCE_CUDA is set, and CUDA cannot be built.
    """
    if flag(environ, "DNL_EXT_CPU_ONLY"):
        return None, "DNL_EXT_CPU_ONLY is set"
    force = flag(environ, "FORCE_CUDA")
    toolkit = find_toolkit(torch_cuda, environ) if torch_cuda else None
    if not torch_cuda:
        why = f"torch {torch_version} has no CUDA: install a torch for CUDA first"
    elif toolkit is None:
        why = "there is no CUDA toolkit: set CUDA_HOME to one"
    elif toolkit.lacks and not (force and toolkit.version):
        lacks = " and ".join(toolkit.lacks)
        why = f"the CUDA toolkit in {toolkit.home} lacks {lacks}: set CUDA_HOME to a whole one"
        if toolkit.version:
            why += ", or FORCE_CUDA=1 to build with it all the same"
    elif toolkit.major != major(torch_cuda):
        why = f"the CUDA toolkit in {toolkit.home} is {toolkit.version}, torch {torch_version} is for {torch_cuda}"
        why += f": set CUDA_HOME to a toolkit of {major(torch_cuda)}"
    elif not (force or cublas_include(toolkit)):
        why = f"cublas_v2.h is neither in the CUDA toolkit in {toolkit.home} nor in a package of NVIDIA's beside torch"
        why += ": install the headers of cuBLAS, or FORCE_CUDA=1 to build all the same"
    else:
        return toolkit, ""
    if force:
        raise SystemExit(f"FORCE_CUDA=1, but CUDA cannot be built: {why}")
    return None, why


def without_hopper(archs):
    """The architectures that files other than Hopper's kernels are compiled for, and whether those are to be built.

    Args:
        archs: TORCH_CUDA_ARCH_LIST. Hopper's kernels are for 9.0a and nothing else is: 9.0a asks for them.

    Raises:
        SystemExit: the kernels do not compile for one of them. Some containers list such in the environment.
    """
    names = [name for name in re.split(r"[;, ]+", archs) if name]
    for name in names:
        if re.match(r"[1-7]\.", name):
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected 8.0 or later, which the kernels are for, got {name}")
    others = [name for name in names if name.removesuffix("+PTX") != "9.0a"]
    hopper = len(others) < len(names)
    if hopper and not {"9.0", "9.0+PTX"}.intersection(others):
        others.append("9.0")  # a GPU that is named by 9.0a alone runs the other kernels too
    return ";".join(others), hopper
