"""What a build chooses: the torch it is built against, and whether CUDA is part of it (build_backend.py). Nothing is
compiled."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.append(str(ROOT))

import build_backend  # noqa: E402


def install_torch(folder, version):
    metadata = folder / f"torch-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")


class TestTorch:
    @pytest.fixture(autouse=True)
    def isolated(self, monkeypatch, tmp_path):
        """Build isolation: what is in the environment (tmp_path) cannot be imported."""
        monkeypatch.setattr(build_backend, "target_folders", lambda: [str(tmp_path)])
        monkeypatch.setattr(build_backend.importlib.util, "find_spec", lambda name: None)
        for kind in ("wheel", "editable"):
            monkeypatch.setattr(build_backend.build_meta, f"get_requires_for_build_{kind}", lambda settings: ["other"])

    @pytest.mark.parametrize("hook", ["get_requires_for_build_wheel", "get_requires_for_build_editable"])
    @pytest.mark.parametrize(
        ("version", "asked"),
        [
            ("2.13.0+cpu", []),
            ("2.10.0a0+git12", []),
            ("3.0.1", []),
            ("2.9.1", ["torch>=2.10"]),
            (None, ["torch>=2.10"]),
        ],
    )
    def test_is_asked_for_only_where_there_is_none_to_run_with(self, hook, version, asked, tmp_path):
        if version:
            install_torch(tmp_path, version)
        assert getattr(build_backend, hook)() == ["other", *asked]

    def test_is_not_asked_for_where_it_can_be_imported(self, monkeypatch):
        monkeypatch.setattr(build_backend.importlib.util, "find_spec", lambda name: object())
        assert build_backend.torch_requirement() == []

    def test_is_not_asked_for_where_nothing_is_compiled(self, monkeypatch):
        monkeypatch.setenv("DNL_EXT_NO_KERNELS", "1")
        assert build_backend.torch_requirement() == []

    def test_that_is_too_old_is_named(self, tmp_path):
        """With --no-build-isolation pip asks for none."""
        package = tmp_path / "torch"
        package.mkdir()
        (package / "__init__.py").write_text("from . import version\n__version__ = version.__version__\n")
        (package / "version.py").write_text('__version__ = "2.9.1+cpu"\ncuda = None\n')
        command = [
            sys.executable,
            "setup.py",
            "-q",
            "build_ext",
            "--build-lib",
            str(tmp_path),
            "--build-temp",
            str(tmp_path),
        ]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "DNL_EXT_NO_KERNELS": "0"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == "dnl_ext builds against torch 2.10 or later, and finds 2.9.1+cpu"

    def test_of_the_environment_is_importable_for_as_long_as_it_takes(self, tmp_path):
        (tmp_path / "only_in_the_environment.py").write_text("answer = 42\n")
        before = list(sys.path)
        with build_backend.target_importable():
            from only_in_the_environment import answer
        assert answer == 42 and sys.path == before

    def test_is_not_needed_for_metadata(self, tmp_path):
        """The hooks that ask for requirements, and an sdist, run setup.py before torch is there."""
        code = "import runpy, sys; sys.modules['torch'] = None; sys.path.insert(0, '.'); "
        code += (
            f"sys.argv = ['setup.py', '-q', 'egg_info', '--egg-base', {str(tmp_path)!r}]; runpy.run_path('setup.py')"
        )
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
        assert "Name: dnl_ext" in (tmp_path / "dnl_ext.egg-info/PKG-INFO").read_text()

    def test_the_environment_is_that_of_this_python(self):
        folders = [
            sys.executable,
            "-c",
            "import build_backend; print(build_backend.has_torch(build_backend.target_folders()))",
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONNOUSERSITE": "1"}
        done = subprocess.run(folders, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "True"


class TestKernels:
    @pytest.mark.parametrize("platform", ["linux", "darwin"])
    def test_are_built_unless_asked_not_to(self, platform):
        for environ in ({}, {"DNL_EXT_NO_KERNELS": "0"}, {"DNL_EXT_CPU_ONLY": "1"}):
            assert build_backend.kernels_left_out(environ, platform) == ""
        why = build_backend.kernels_left_out({"DNL_EXT_NO_KERNELS": "1"}, platform)
        assert why.startswith("installed with DNL_EXT_NO_KERNELS=1; pip install") and "\n" not in why

    def test_are_not_built_by_msvc(self):
        assert "Windows, whose compiler MSVC" in build_backend.kernels_left_out({}, "win32")


def make_toolkit(home, version="13.0", headers="include", libraries="lib64", top=None, cublas=True):
    """A folder that looks like a CUDA toolkit; None leaves a part out."""
    (home / "bin").mkdir(parents=True)
    if version:
        (home / "bin/nvcc").write_text(
            f'#!/bin/sh\necho "#$ TOP={top or home}"\necho "Cuda compilation, release {version}, V"\n'
        )
        (home / "bin/nvcc").chmod(0o755)
    for folder, name in ((headers, "cuda_runtime.h"), (libraries, "libcudart.so")):
        if folder:
            (home / folder).mkdir(parents=True, exist_ok=True)
            (home / folder / name).touch()
    if headers and cublas:
        (home / headers / "cublas_v2.h").touch()
    return home


class TestCuda:
    @pytest.fixture(autouse=True)
    def no_other_toolkit(self, monkeypatch, tmp_path):
        monkeypatch.setattr(build_backend, "USUAL_TOOLKIT", str(tmp_path / "usual"))

    def choose(self, torch_cuda="13.0", path=(), **environ):
        path = os.pathsep.join([*(str(folder / "bin") for folder in path), os.defpath])
        environ = {name: str(value) for name, value in environ.items()}
        return build_backend.choose_cuda("2.13", torch_cuda, {"PATH": path, **environ})

    @pytest.mark.parametrize(
        ("headers", "libraries"),
        [
            ("include", "lib64"),
            ("include", "lib"),
            ("targets/x86_64-linux/include", "targets/x86_64-linux/lib"),
            ("include", "lib/x86_64-linux-gnu"),
        ],
    )
    def test_a_whole_toolkit_is_taken_from_a_path_with_spaces(self, headers, libraries, tmp_path):
        home = make_toolkit(tmp_path / "my [cuda] 13", headers=headers, libraries=libraries)
        expected = build_backend.Toolkit(str(home), str(home / headers), str(home / libraries), "13.0")
        assert self.choose(CUDA_HOME=home) == self.choose(CUDA_PATH=home) == self.choose(path=[home]) == (expected, "")
        assert self.choose(CUDA_HOME=home, FORCE_CUDA=1) == (expected, "")

    def test_torch_without_cuda(self, tmp_path):
        home = make_toolkit(tmp_path / "cuda")
        toolkit, why = self.choose(None, [home])
        assert toolkit is None and why == "torch 2.13 has no CUDA: install a torch for CUDA first"
        with pytest.raises(SystemExit, match=r"FORCE_CUDA=1, but CUDA cannot be built: torch 2.13 has no CUDA"):
            self.choose(None, [home], FORCE_CUDA=1)

    def test_no_toolkit(self):
        assert self.choose() == (None, "there is no CUDA toolkit: set CUDA_HOME to one")
        with pytest.raises(SystemExit, match="no CUDA toolkit"):
            self.choose(FORCE_CUDA="on")

    @pytest.mark.parametrize(
        ("parts", "lacks"),
        [
            ({"libraries": None}, "libcudart.so"),
            ({"headers": None}, "cuda_runtime.h"),
            ({"headers": None, "libraries": None}, "cuda_runtime.h and libcudart.so"),
        ],
    )
    def test_an_incomplete_toolkit_is_left_out_unless_forced(self, parts, lacks, tmp_path):
        home = make_toolkit(tmp_path / "cuda", **parts)
        toolkit, why = self.choose(path=[home])
        assert (
            toolkit is None
            and f"the CUDA toolkit in {home} lacks {lacks}: set CUDA_HOME" in why
            and "FORCE_CUDA=1" in why
        )
        assert self.choose(path=[home], FORCE_CUDA=1)[0].home == str(home)

    def test_a_toolkit_without_nvcc_cannot_be_forced(self, tmp_path):
        home = make_toolkit(tmp_path / "cuda", version=None)
        assert "lacks bin/nvcc" in self.choose(CUDA_HOME=home)[1] and "FORCE" not in self.choose(CUDA_HOME=home)[1]
        with pytest.raises(SystemExit, match="lacks bin/nvcc"):
            self.choose(CUDA_HOME=home, FORCE_CUDA=1)

    def test_a_toolkit_of_another_major_version(self, tmp_path):
        home = make_toolkit(tmp_path / "cuda", "12.4")
        toolkit, why = self.choose(path=[home])
        assert toolkit is None
        assert why == f"the CUDA toolkit in {home} is 12.4, torch 2.13 is for 13.0: set CUDA_HOME to a toolkit of 13"
        assert self.choose("12.8", [home])[0].home == str(home)
        with pytest.raises(SystemExit, match=r"is 12\.4"):
            self.choose(path=[home], FORCE_CUDA=1)

    def test_an_nvcc_that_calls_another_leads_to_its_toolkit(self, tmp_path):
        """As scripts in /usr/local/bin do."""
        home = make_toolkit(tmp_path / "cuda")
        script = make_toolkit(tmp_path / "local", headers=None, libraries=None, top=home / "bin/..")
        assert self.choose(path=[script])[0].home == str(home)

    def test_headers_of_cublas_may_be_those_that_torch_came_with(self, tmp_path, monkeypatch):
        home, packages = make_toolkit(tmp_path / "cuda", cublas=False), tmp_path / "site-packages"
        monkeypatch.setattr(build_backend, "target_folders", lambda: [str(packages)])
        monkeypatch.setattr(sys, "path", [])
        toolkit, why = self.choose(path=[home])
        assert toolkit is None and "install the headers of cuBLAS" in why
        assert self.choose(path=[home], FORCE_CUDA=1)[0].home == str(home)
        include = packages / "nvidia/cu13/include"
        include.mkdir(parents=True)
        (include / "cublas_v2.h").touch()
        toolkit, why = self.choose(path=[home])
        assert why == "" and build_backend.cublas_include(toolkit) == str(include)
        (home / "include/cublas_v2.h").touch()
        assert build_backend.cublas_include(toolkit) == str(home / "include")

    @pytest.mark.parametrize("parts", [{"libraries": None}, {"version": "12.4"}])
    def test_the_one_that_serves_is_taken(self, parts, tmp_path):
        broken, usual = make_toolkit(tmp_path / "broken", **parts), make_toolkit(tmp_path / "usual")
        assert self.choose(path=[broken])[0].home == str(usual)
        assert self.choose(CUDA_HOME=broken)[0] is None  # what the user names is not passed over

    def test_cpu_only(self, tmp_path):
        home = make_toolkit(tmp_path / "cuda")
        assert self.choose(CUDA_HOME=home, DNL_EXT_CPU_ONLY=1) == (None, "DNL_EXT_CPU_ONLY is set")
        assert self.choose(CUDA_HOME=home, DNL_EXT_CPU_ONLY=0, FORCE_CUDA="off")[0].home == str(home)

    @pytest.mark.parametrize(
        ("release", "archs"), [("13.0", "8.0;9.0a;9.0+PTX;10.0;12.0"), ("12.6", "8.0;9.0a;9.0+PTX")]
    )
    def test_architectures_are_those_that_its_nvcc_knows(self, release, archs):
        assert build_backend.default_archs(release) == archs


@pytest.mark.parametrize(
    ("archs", "others", "hopper"),
    [
        ("8.0;9.0a;9.0+PTX", "8.0;9.0+PTX", True),
        ("8.0 9.0", "8.0;9.0", False),
        ("9.0a", "9.0", True),
        ("8.0, 9.0a+PTX", "8.0;9.0", True),
    ],
)
def test_kernels_of_hopper_are_built_where_9_0a_is_named(archs, others, hopper):
    assert build_backend.without_hopper(archs) == (others, hopper)


@pytest.mark.parametrize(("archs", "old"), [("7.5 8.0 8.6 9.0 10.0 12.0+PTX", "7.5"), ("8.0;7.0+PTX", r"7\.0\+PTX")])
def test_an_architecture_that_the_kernels_do_not_compile_for_is_refused(archs, old):
    with pytest.raises(SystemExit, match=f"expected 8.0 or later, which the kernels are for, got {old}$"):
        build_backend.without_hopper(archs)


def test_the_source_distribution_has_what_the_repository_has(tmp_path):
    """What builds it, its tests and its documentation, all but what is of use in a clone alone."""
    if not (shutil.which("git") and (ROOT / ".git").exists()):
        pytest.skip("needs git and a clone: apt-get install git")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    packed = set((tmp_path / "dnl_ext.egg-info/SOURCES.txt").read_text().splitlines())
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {path for path in listed.split("\0") if path and (ROOT / path).exists()}
    assert tracked - packed == {".ci/run", ".gitignore"}


def test_setuptools_that_is_too_old_is_named(tmp_path):
    """With --no-build-isolation pip asks for none."""
    code = "import runpy, sys, setuptools; setuptools.__version__ = '65.5.0'; sys.path.insert(0, '.'); "
    code += f"sys.argv = ['setup.py', '-q', 'egg_info', '--egg-base', {str(tmp_path)!r}]; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    oldest = build_backend.OLDEST_SETUPTOOLS
    words = f"dnl_ext is built with setuptools {oldest} or later, and finds 65.5.0: pip install --upgrade setuptools"
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == words
    for place, promise in (("pyproject.toml", "setuptools>={}"), ("README.md", "setuptools {} or later")):
        assert promise.format(oldest) in (ROOT / place).read_text()


def test_the_version_is_the_same_everywhere():
    pattern = re.compile(r'^(?:version(?: =|:)|__version__ =|##) "?(\d[\w.]*)"?$', re.MULTILINE)
    places = ("pyproject.toml", "dnl_ext/_version.py", "CITATION.cff", "CHANGELOG.md")  # the newest comes first there
    assert len({pattern.search((ROOT / place).read_text())[1] for place in places}) == 1


def test_the_hooks_of_a_commit_are_those_of_the_extra_dev():
    extra = set(re.findall(r'"([\w-]+==[\d.]+)', (ROOT / "pyproject.toml").read_text()))
    hooks = set(re.findall(r"[\w-]+==[\d.]+", (ROOT / ".pre-commit-config.yaml").read_text()))
    assert hooks and hooks <= extra
