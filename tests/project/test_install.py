"""`pip install .` in a virtual environment of its own: without kernels, and where the compiler fails."""

import importlib.machinery
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = ("csrc", "dnl_ext", "setup.py", "build_backend.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
# Asked by way of sys.meta_path for pip, a hook of setuptools gives up its distutils before Python 3.12, and setuptools
# could not be imported by another test.
pytestmark = pytest.mark.skipif(
    not all(importlib.machinery.PathFinder.find_spec(name) for name in ("pip", "setuptools", "wheel")),
    reason='needs pip, setuptools and wheel: pip install pip "setuptools>=77" wheel',
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The Python of a fresh environment, which sees torch and pip of this one; a copy of the sources, not built; and
    the environment's own packages."""
    folder = tmp_path_factory.mktemp("install")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    scheme = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
    packages = pathlib.Path(sysconfig.get_path("purelib", "venv", scheme))
    (packages / "of_the_tests.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "_left_out.txt")
    for name in SOURCES:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / "source" / name, **({"ignore": ignore} if source.is_dir() else {}))
    python = pathlib.Path(sysconfig.get_path("scripts", "venv", scheme), pathlib.Path(sys.executable).name)
    return python, folder / "source", packages


def run(environment, *arguments, **variables):
    python, source, _ = environment
    variables = {**os.environ, "PYTHONPATH": "", "DNL_EXT_KERNELS": "on", **variables}
    return subprocess.run([python, *arguments], cwd=source.parent, env=variables, capture_output=True, text=True)


def install(environment, *options, **variables):
    # Nothing is fetched: torch and what builds are those of the tests' own environment.
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--ignore-installed", *options)
    return run(environment, "-m", "pip", "install", *options, environment[1], **variables)


def assert_runs_without_kernels(environment):
    done = run(environment, "-W", "error::ImportWarning", "-m", "dnl_ext", "doctor", "--json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] and "plain PyTorch" in report["call"]["path"]
    assert "DNL_EXT_NO_KERNELS=1" in report["kernels"]["left_out"] == report["call"]["why"]
    assert "GCC 11 or Clang 15" in report["kernels"]["left_out"]  # what would bring them
    code = "import torch, dnl_ext; q = torch.ones(2, 3); print(dnl_ext.pairwise_attention(q, q, q).sum().item())"
    done = run(environment, "-c", code)
    assert done.stdout == "6.0\n"
    assert done.stderr.count("dnl_ext computes as plain PyTorch") == 1


def test_without_kernels(environment):
    """Neither a compiler nor torch is asked for while it is built; the wheel fits every Python and system. It has
    nothing of an earlier build in the same folder."""
    earlier = environment[1] / "build/lib/dnl_ext"
    earlier.mkdir(parents=True)
    (earlier / "gone.py").touch()
    done = install(environment, "-v", DNL_EXT_NO_KERNELS="1", CXX="false", CC="false")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "py3-none-any.whl" in done.stdout
    assert not (environment[2] / "dnl_ext/gone.py").exists()
    package = environment[2] / "dnl_ext"
    assert (package / "_left_out.txt").exists() and not list(package.glob("*.so"))
    assert_runs_without_kernels(environment)


def test_an_editable_one_without_kernels(environment):
    done = install(environment, "--editable", DNL_EXT_NO_KERNELS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_runs_without_kernels(environment)


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is compiled on Windows")
def test_a_compiler_that_fails(environment):
    """The last sentence says what installs all the same."""
    done = install(environment, CXX="false", CC="false", DNL_EXT_CPU_ONLY="1", MAX_JOBS="1")
    assert done.returncode != 0
    assert "DNL_EXT_NO_KERNELS=1 pip install ." in done.stdout + done.stderr
    assert "GCC 11 or Clang 15" in done.stdout + done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is compiled on Windows")
def test_a_build_in_place_takes_the_note_away_that_one_without_kernels_left(environment, tmp_path):
    package, compiler = environment[1] / "dnl_ext", tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do if [ "$1" = -o ]; then : > "$2"; fi; shift; done\n')
    compiler.chmod(0o755)
    (package / "_left_out.txt").touch()
    options = ("-q", "build_ext", "--inplace", "--build-temp", tmp_path / "temp")
    variables = {"CXX": str(compiler), "CC": str(compiler), "DNL_EXT_CPU_ONLY": "1", "DNL_EXT_NO_KERNELS": "0"}
    code = (
        f"import os, runpy, sys; os.chdir({str(environment[1])!r}); sys.path.insert(0, '.'); sys.argv[0] = 'setup.py'; "
    )
    done = run(environment, "-c", code + "runpy.run_path('setup.py')", *options, **variables)
    built = [*package.glob("*.so"), *package.glob("_left_out.txt")]
    for path in built:
        path.unlink()
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(built) == 2 and all(path.suffix == ".so" for path in built)
