"""Wheels: which Pythons and which torch they say they serve, and whether what is compiled asks for no more than those
have."""

import importlib.machinery
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest
import toolchain
import torch_versions

import dnl_ext
from dnl_ext._load import LEFT_OUT

ROOT = pathlib.Path(__file__).parents[2]
sys.path.append(str(ROOT))

import build_backend  # noqa: E402

PACKAGE = pathlib.Path(dnl_ext.__file__).parent
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="is about ELF")


def symbols(library):
    """The dynamic symbols of a library, undefined and defined, with their versions: {"exp@GLIBC_2.29", ...}."""
    command = ["readelf", "--wide", "--dyn-syms", library]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in table.splitlines() if re.match(r"\s*\d+: ", line)]
    named = [(row[6], row[7]) for row in rows if len(row) > 7]
    return {name for place, name in named if place == "UND"}, {name for place, name in named if place != "UND"}


def needed(library):
    """The libraries that a library names."""
    command = ["readelf", "--wide", "--dynamic", library]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", table))


#: Of every library that a compiler links.
WEAK = r"_ITM_(de)?registerTMCloneTable|__gmon_start__|__cxa_finalize|__cxa_thread_atexit_impl"
#: Of the system, each with the version that it came with.
SYSTEM = r".+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+"
#: Functions in C, and no other of torch: its stable ABI.
STABLE_ABI = r"(aoti_)?torch_\w+"
CUDA = r"(cu|cublas|cuda|__cuda)[A-Z]\w+(@.*)?"
PYTHON = r"_?Py\w+"
OURS = r"_ZN?K?3dnl\w+"
SYSTEM_LIBRARIES = r"lib(stdc\+\+|m|gcc_s|c|pthread|dl|rt)\.so\.\d+|ld-linux[-\w]*\.so\.\d+"
TORCH_LIBRARIES = r"lib(torch|torch_cpu|torch_cuda|c10|c10_cuda)\.so"


def beyond(names, *allowed):
    return sorted(name for name in names if not re.fullmatch("|".join(allowed), name))


@linux
@toolchain.needs_kernels
@toolchain.needs_binutils
class TestLibraries:
    cuda = (CUDA,) if not LEFT_OUT and dnl_ext._C.build_info()["cuda"] else ()

    def test_the_operators_use_the_stable_abi_and_the_system(self):
        """Nothing of Python, no C++ of torch: parts of libstdc++ that torch's libraries hold count as such."""
        undefined, _ = symbols(PACKAGE / "libdnl_ext.so")
        assert {"aoti_torch_empty_strided", "torch_library_impl"} <= undefined
        assert beyond(undefined, WEAK, SYSTEM, STABLE_ABI, *self.cuda) == []
        names = needed(PACKAGE / "libdnl_ext.so")
        assert "libtorch_cpu.so" in names
        assert beyond(names, SYSTEM_LIBRARIES, TORCH_LIBRARIES, *(r"libcu\w+\.so\.\d+" for _ in self.cuda)) == []

    def test_the_module_uses_the_operators_and_python(self):
        modules = list(PACKAGE.glob("_C.*.so"))
        assert modules
        _, exported = symbols(PACKAGE / "libdnl_ext.so")
        for module in modules:
            undefined, _ = symbols(module)
            assert beyond(undefined, WEAK, SYSTEM, PYTHON, OURS) == []
            assert {name for name in undefined if re.fullmatch(OURS, name)} <= exported
            assert beyond(needed(module), SYSTEM_LIBRARIES, r"libdnl_ext\.so", TORCH_LIBRARIES) == []

    def test_hold_no_debug_information(self):
        if "-g" in os.environ.get("CFLAGS", ""):
            pytest.skip("CFLAGS asks for it")
        for library in (PACKAGE / "libdnl_ext.so", *PACKAGE.glob("_C.*.so")):
            command = ["readelf", "--wide", "--sections", library]
            assert ".debug_info" not in subprocess.run(command, capture_output=True, text=True, check=True).stdout


# ----------------------------------------------------------------------------------------------------------------------
# Names of wheels
# ----------------------------------------------------------------------------------------------------------------------


def interpreter(folder, name="python", *, tag="cp312", free_threaded=0, headers=True, implementation="cpython"):
    """Something that answers as an interpreter does when it is asked what compiling for it takes."""
    include = folder / f"include-{name}"
    include.mkdir()
    if headers:
        (include / "Python.h").touch()
    suffix = f".{implementation}-{tag[2:]}-x86_64-linux-gnu.so"
    answer = f'["{implementation}", "{tag}", "{suffix}", ["{include}"], {free_threaded}]'
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{answer}'\n")
    path.chmod(0o755)
    return path


class TestOtherPythons:
    def test_this_one(self):
        found = build_backend.inspect_python(sys.executable)
        assert found.tag == "cp{}{}".format(*sys.version_info)
        assert found.suffix == importlib.machinery.EXTENSION_SUFFIXES[0]

    def test_another(self, tmp_path):
        found = build_backend.inspect_python(interpreter(tmp_path))
        expected = ("cp312", ".cpython-312-x86_64-linux-gnu.so", (str(tmp_path / "include-python"),))
        assert (found.tag, found.suffix, found.includes) == expected

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"headers": False}, "has no headers: there is no Python.h in"),
            ({"free_threaded": 1}, "expected CPython with its lock"),
            ({"implementation": "pypy"}, "expected CPython with its lock"),
        ],
    )
    def test_one_that_cannot_be_built_for(self, options, words, tmp_path):
        with pytest.raises(SystemExit, match=words):
            build_backend.inspect_python(interpreter(tmp_path, **options))

    def test_one_that_is_not_there(self):
        with pytest.raises(SystemExit, match="no-such-python does not run: no such command"):
            build_backend.inspect_python("no-such-python")


@linux
@toolchain.needs_kernels
@pytest.mark.skipif(not importlib.util.find_spec("wheel"), reason='needs wheel: pip install "setuptools>=77" wheel')
@pytest.mark.parametrize("others", [(), ("cp310", "cp39", "cp314")])
def test_a_wheel_names_the_pythons_that_it_has_a_module_for(others, tmp_path):
    """Named by setup.py for what a build has left; nothing is compiled."""
    packaging_tags = pytest.importorskip("packaging.tags", reason="needs packaging: pip install packaging")
    for name in ("setup.py", "build_backend.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("csrc", "dnl_ext"):  # what setup.py lists
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "pythons").mkdir()
    pythons = " ".join(str(interpreter(tmp_path / "pythons", tag, tag=tag)) for tag in others)
    command = [sys.executable, "setup.py", "-q", "egg_info", "bdist_wheel", "--skip-build", "--dist-dir", "dist"]
    environment = {**os.environ, "DNL_EXT_CPU_ONLY": "1", "DNL_EXT_PYTHONS": pythons}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    python, abi, platform = wheel.stem.split("-")[2:]
    own = "cp{}{}".format(*sys.version_info)
    if not others:
        assert (python, abi) == (own, own)
        return
    assert abi == "none"
    assert python.split(".") == sorted({own, *others}, key=lambda tag: int(tag[3:]))
    taken = packaging_tags.parse_tag(f"{python}-{abi}-{platform}")
    for minor, takes in ((9, True), (10, True), (14, True), (sys.version_info[1], True), (15, False)):
        assert any(tag in taken for tag in packaging_tags.cpython_tags((3, minor), platforms=[platform])) is takes


def test_a_python_that_a_wheel_has_no_module_for_is_told_so(tmp_path):
    shutil.copytree(
        PACKAGE, tmp_path / "dnl_ext", ignore=shutil.ignore_patterns("*.so", "_left_out.txt", "__pycache__")
    )
    (tmp_path / "dnl_ext/_C.cpython-39-x86_64-linux-gnu.so").touch()
    paths = os.pathsep.join([str(tmp_path), sysconfig.get_path("purelib")])
    environment = {**os.environ, "PYTHONPATH": paths, "DNL_EXT_KERNELS": "on"}
    command = [sys.executable, "-S", "-c", "import dnl_ext"]  # without what an editable installation adds
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    own = importlib.machinery.EXTENSION_SUFFIXES[0].split(".")[1]
    words = f"ImportError: dnl_ext._C was built for cpython-39-x86_64-linux-gnu, and this Python is {own}; rebuild it"
    assert done.returncode == 1 and words in done.stderr


@linux
@pytest.mark.parametrize(
    ("files", "words"),
    [
        ((), "dnl_ext is not built: .* is missing; rebuild it against the torch you run: pip install"),
        (("setup.py",), "dnl_ext is not built: .* is missing; these are the sources in .*: run Python elsewhere, or "),
        (("dnl_ext/_C.own",), "dnl_ext is not built: .* is missing; rebuild it"),
        (("dnl_ext/_C.own", "dnl_ext/libdnl_ext.so"), "dnl_ext._C was built for another torch or Python and does not"),
    ],
)
def test_a_package_that_cannot_be_loaded_says_what_is_wrong(files, words, tmp_path):
    """An empty file is no library that loads."""
    ignored = shutil.ignore_patterns("*.so", "_left_out.txt", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "dnl_ext", ignore=ignored)
    for name in files:
        (tmp_path / name.replace(".own", importlib.machinery.EXTENSION_SUFFIXES[0])).touch()
    paths = os.pathsep.join([str(tmp_path), sysconfig.get_path("purelib")])
    environment = {**os.environ, "PYTHONPATH": paths, "DNL_EXT_KERNELS": "on"}
    command = [sys.executable, "-S", "-c", "import dnl_ext"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(f"ImportError: {words}", done.stderr), done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Versions of torch
# ----------------------------------------------------------------------------------------------------------------------


def test_the_oldest_torch_is_the_same_everywhere():
    """What is promised, what is compiled for, and what is tested weekly and by `make test-torch`."""
    oldest = "{}.{}".format(*build_backend.OLDEST_TORCH)
    assert f'dependencies = ["torch>={oldest}"]' in (ROOT / "pyproject.toml").read_text()
    target = re.search(r'TORCH_TARGET = "0x(..)(..)0{12}"', (ROOT / "setup.py").read_text())
    assert (int(target[1], 16), int(target[2], 16)) == build_backend.OLDEST_TORCH
    assert re.search(rf"^VERSIONS \?= {oldest}\.0 ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert f'torch: ["{oldest}.0", ' in (ROOT / ".github/workflows/torch.yml").read_text()
    for page in ("README.md", "docs/start.md"):
        assert f"{oldest} or later" in (ROOT / page).read_text()


class TestTorchVersions:
    def test_what_pip_is_asked_for(self):
        assert torch_versions.requirement("2.10.0") == ["torch==2.10.0"]
        assert torch_versions.requirement("newest") == ["torch"]
        assert "--pre" in torch_versions.requirement("nightly")

    def test_the_folder_of_the_tests_has_nothing_that_could_be_imported_in_place_of_the_wheel(self, tmp_path):
        torch_versions.lay_out(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} >= {"tests", "examples", "docs", "pyproject.toml"}
        assert not {"dnl_ext", "csrc"} & {path.name for path in tmp_path.iterdir()}
        assert all((tmp_path / "tests" / suite).is_dir() for suite in torch_versions.SUITES)

    def test_in_a_source_distribution_the_folder_has_neither_environments_nor_builds(self, tmp_path, monkeypatch):
        """Within a repository that does not know it, as anywhere without git."""
        repository = tmp_path / "repository/source"
        for name in (
            "setup.py",
            "tests/one.py",
            "build/lib/one.py",
            "dist/one.whl",
            "own/pyvenv.cfg",
            "own/lib/one.py",
        ):
            (repository / name).parent.mkdir(parents=True, exist_ok=True)
            (repository / name).touch()
        monkeypatch.setattr(torch_versions, "ROOT", repository)
        for git in (True, False):
            if git and shutil.which("git"):
                subprocess.run(["git", "init", "--quiet", tmp_path / "repository"], check=True)
            elif not git:
                monkeypatch.setenv("PATH", "")
            assert sorted(torch_versions.tracked()) == ["setup.py", "tests/one.py"]

    def test_the_environment_of_the_tests_sees_nothing_of_this_one(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        variables = torch_versions.environment_of(tmp_path)
        assert "PYTHONPATH" not in variables and variables["PATH"].startswith(f"{tmp_path}/venv/bin:")

    def test_counts_what_a_report_says(self, tmp_path):
        (tmp_path / "test_three.py").write_text(
            "import pytest\n"
            "def test_right(): pass\n"
            "def test_wrong(): assert False\n"
            "def test_left_out(): pytest.skip('reason')\n"
            "@pytest.mark.xfail(strict=True)\n"
            "def test_that_should_fail(): pass\n"
            "@pytest.fixture\n"
            "def broken(): raise ValueError\n"
            "def test_of_it(broken): pass\n"
        )
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml", "report.xml"]
        subprocess.run(command, cwd=tmp_path, capture_output=True)
        counts, failed = torch_versions.outcome(tmp_path / "report.xml")
        assert counts == {"passed": 1, "failed": 3, "skipped": 1}
        assert failed == [f"test_three.test_{name}" for name in ("wrong", "that_should_fail", "of_it")]
        assert torch_versions.in_words(counts) == "1 passed, 3 failed, 1 skipped"

    def test_a_wheel_that_cannot_be_installed_is_said_so(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torch_versions, "FOLDER", tmp_path / "versions")
        monkeypatch.setattr(torch_versions, "run", lambda log, command, **options: command[1:3] == ["-m", "venv"])
        options = type("Options", (), {"pip": [], "pytest": [], "suites": ["ops"]})
        words, well = torch_versions.check("2.10.0", tmp_path / "no.whl", options)
        assert words.startswith("cannot be installed: ") and not well
