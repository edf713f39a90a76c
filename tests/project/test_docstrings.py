"""Docstrings: every public name has an example, and every example gives what it says."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import dnl_ext

#: Not to be imported: they need a framework of mmengine's, run the command line, or are no Python.
LEFT_OUT = ("mmseg", "mmdet", "mmaction", "_registry", "__main__", "libdnl_ext")
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(dnl_ext.__path__, "dnl_ext.")
    if module.name.rpartition(".")[2] not in LEFT_OUT
)
#: Those whose `__all__` lists what is public.
PUBLIC = (
    "", ".analysis", ".benchmark", ".cli", ".diagnosis", ".distributed", ".export", ".integrations", ".modules", ".ops",
    ".reference", ".segmentation", ".segmentation.data", ".segmentation.experiments", ".segmentation.looking",
    ".segmentation.training", ".segmentation.training.checkpoint", ".segmentation.training.distributed", ".tuning",
)  # fmt: skip


def public():
    """Functions and classes by the name under which they are public."""
    for package in PUBLIC:
        module = importlib.import_module(f"dnl_ext{package}")
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value) or inspect.isclass(value):
                yield pytest.param(value, id=f"{module.__name__}.{name}")


def methods():
    """The classmethods that make blocks, which are as public as their class."""
    block = dnl_ext.DisentangledNonLocal2d
    return [pytest.param(value, id=value.__qualname__) for value in (block.mmseg, block.official)]


def test_every_package_says_what_is_public():
    """Apart from packages that are private, or are public by the one above them."""
    packages = {name for name in MODULES if hasattr(importlib.import_module(name), "__path__")}
    public = {f"dnl_ext{package}" for package in PUBLIC}
    assert packages - public == {name for name in packages if "._" in name}


@pytest.mark.parametrize("value", [*public(), *methods()])
def test_has_an_example(value):
    assert value.__doc__ and ">>> " in value.__doc__


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0, "see the output above"


def test_examples_are_found():
    """An example that no finder collects would always pass."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = {test.name for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples}
    assert "dnl_ext.ops.pairwise.disentangled_attention" in found
    assert "dnl_ext.modules.disentangled._DisentangledNonLocal.mmseg" in found
    missing = [
        value.values[0]
        for value in [*public()]
        if f"{value.values[0].__module__}.{value.values[0].__name__}" not in found
    ]
    assert not missing
