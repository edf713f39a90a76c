"""The layers of dnl_ext, as pyproject.toml states them: no import points up."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def contracts(folder):
    pytest.importorskip("importlinter", reason="needs import-linter: pip install dnl_ext[dev]")
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, encoding="utf-8")


def test_no_import_points_up():
    done = contracts(ROOT)
    assert done.returncode == 0, done.stdout


def test_what_windows_lacks_is_not_imported_with_the_package():
    """In plain PyTorch all of it runs there."""
    lacking = ("resource", "fcntl", "termios", "pwd", "grp")
    code = f"import sys; sys.modules.update(dict.fromkeys({lacking}))\n"
    code += "import pkgutil, importlib, dnl_ext\n"
    code += "for module in pkgutil.walk_packages(dnl_ext.__path__, 'dnl_ext.'):\n"
    code += "    if not module.name.startswith(('dnl_ext.integrations.', 'dnl_ext.libdnl_ext')):\n"
    code += "        importlib.import_module(module.name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("ops/linear.py", "from .. import distributed"),
        ("modules/context.py", "from ..distributed import blocks"),
        ("segmentation/data/folders.py", "from ..training import trainer"),
        ("reference.py", "def late():\n    from . import modules"),
    ],
)
def test_an_import_that_does_is_found(tmp_path, file, line):
    shutil.copytree(ROOT / "dnl_ext", tmp_path / "dnl_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "dnl_ext" / file
    path.write_text(f"{path.read_text()}\n{line}\n")
    done = contracts(tmp_path)
    assert done.returncode == 1 and "is not allowed to import" in done.stdout
