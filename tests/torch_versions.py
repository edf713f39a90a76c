"""The suites on other versions of torch, against one wheel: `make test-torch VERSIONS="2.10.0 2.15.0"`.

    python tests/torch_versions.py 2.10.0 newest nightly --wheel dist/dnl_ext-*.whl

For each version a fresh environment gets that torch and the wheel, as a user would install them. The tests run in a
folder that holds the repository without `dnl_ext` and `csrc`: what they import is what was installed, in processes that
they start too. Left out are the folders that compile the kernels again and those about the repository. One line a
version, with the names of what failed below it. Exits 1 if a version failed.

A new environment takes several GB where the index has torch for CUDA alone; it is removed once its line is written.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "build/torch-versions"
SUITES = ("ops", "modules", "pytorch", "analysis", "distributed", "tuning", "integrations", "tools")
LEFT_OUT = ("dnl_ext", "csrc")
NIGHTLY = "https://download.pytorch.org/whl/nightly/cpu"


def tracked():
    """What git has of the repository, or all of it in a source distribution."""
    if shutil.which("git"):
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout
        if listed:  # nothing where a source distribution lies in some other repository
            return [path for path in listed.split("\0") if path]
    made = {"build", "dist", "runs"} | {path.parent.name for path in ROOT.glob("*/pyvenv.cfg")}  # gigabytes
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return [str(path) for path in found if path.parts[0] not in made]


def lay_out(folder):
    """A copy of the repository in `folder` that has the tests and not what they test."""
    for path in tracked():
        if pathlib.PurePath(path).parts[0] not in LEFT_OUT and (ROOT / path).is_file():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, folder / path)


def requirement(version):
    """What pip is asked for."""
    named = {"newest": ["torch"], "nightly": ["--pre", "torch", "--index-url", NIGHTLY]}
    return named.get(version, [f"torch=={version}"])


def run(log, command, **options):
    """Whether a command succeeds. What it says goes to `log`."""
    with log.open("ab") as file:
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, **options).returncode == 0


def outcome(report):
    """(counts by outcome, names of failed tests) of a pytest report in JUnit's form."""
    counts, failed = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        found = {element.tag for element in case}
        if found & {"failure", "error"}:
            counts["failed"] += 1
            failed.append(f"{case.get('classname')}.{case.get('name')}")
        else:
            counts["skipped" if "skipped" in found else "passed"] += 1
    return counts, failed


def in_words(counts):
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count) or "nothing ran"


def environment_of(folder):
    """Variables of a process that sees nothing of this one's Python, nor of the repository."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | {"PATH": os.pathsep.join([str(folder / "venv/bin"), os.environ.get("PATH", os.defpath)])}


def check(version, wheel, arguments):
    """(what to say of a version, whether all is well)."""
    folder = FOLDER / version
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log, report, copy = FOLDER / f"{version}.log", folder / "report.xml", folder / "repository"
    log.unlink(missing_ok=True)
    python, variables = folder / "venv/bin/python", environment_of(folder)
    lay_out(copy)
    # torch comes first, as in the Makefile: what depends on it would otherwise choose which build to fetch.
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    installed = (
        run(log, [sys.executable, "-m", "venv", folder / "venv"])
        and run(log, [*pip, *arguments.pip, *requirement(version)], env=variables)
        and run(log, [*pip, f"{wheel}[test]"], env=variables)
    )
    if not installed:
        return f"cannot be installed: {log}", False
    if not run(log, [folder / "venv/bin/dnl-ext", "doctor"], cwd=copy, env=variables):
        return f"dnl-ext doctor fails: {log}", False
    code = "import json, platform, dnl_ext, torch; print(json.dumps([torch.__version__, platform.python_version(), "
    code += "dnl_ext.__file__, dnl_ext._load.LEFT_OUT]))"
    answer = subprocess.run([python, "-c", code], cwd=copy, env=variables, capture_output=True, text=True, check=True)
    torch_version, python_version, module, left_out = json.loads(answer.stdout.splitlines()[-1])
    if folder / "venv" not in pathlib.Path(module).parents or left_out:
        return f"the wheel is not what runs: {module} {left_out}", False
    start = time.monotonic()
    suites = [f"tests/{suite}" for suite in arguments.suites]
    shared = ["-n", "auto", "--maxprocesses", "8", "--dist", "worksteal"]  # among processes, as in `make test`
    options = ["-q", *shared, "--no-emulator", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments.pytest]
    run(log, [folder / "venv/bin/pytest", *options, *suites], cwd=copy, env=variables)
    if not report.exists():
        return f"pytest wrote no report: {log}", False
    counts, failed = outcome(report)
    words = f"{in_words(counts)} in {time.monotonic() - start:.0f} s ({torch_version}, Python {python_version})"
    return "\n  ".join([words, *failed]), not failed and counts["passed"] > 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", help="such as 2.10.0, or newest or nightly")
    parser.add_argument("--wheel", required=True, type=pathlib.Path)
    parser.add_argument("--suites", nargs="+", default=SUITES, metavar="FOLDER", help=f"default: {' '.join(SUITES)}")
    parser.add_argument("--pip", default="", type=str.split, help="options for the installation of torch")
    parser.add_argument("--pytest", default="", type=str.split, help="more options for pytest")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    arguments = parser.parse_args()
    wheel = arguments.wheel.resolve()
    if not wheel.is_file():
        parser.error(f"--wheel: there is no {wheel}")
    good = True
    for version in arguments.versions:
        words, well = check(version, wheel, arguments)
        print(f"torch {version}: {words}", flush=True)
        good &= well
        if not arguments.keep:
            shutil.rmtree(FOLDER / version, ignore_errors=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
