"""Types: what ships beside the code, which `make lint` checks against itself alone."""

import ast
from pathlib import Path

import dnl_ext

PACKAGE = Path(dnl_ext.__file__).parent


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_the_stub_has_what_the_compiled_module_has():
    """basedpyright reads the stub in place of the module, and takes its word for it."""
    stub = ast.parse((PACKAGE / "_C.pyi").read_text())
    functions = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    assert functions == {name for name in dir(dnl_ext._C) if not name.startswith("_")}
