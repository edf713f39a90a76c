"""The pages that say where things are: docs/layout.md and csrc/README.md name what there is, and nothing else."""

import re
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11 or later, which reads pyproject.toml")
ROOT = Path(__file__).parents[2]


def layers(container):
    """The layers of a package in pyproject.toml, from the top, without private modules."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = [c for c in settings["contracts"] if c["containers"] == [container]]
    rows = [[name.strip() for name in layer.split("|")] for layer in contract["layers"]]
    return [public for row in rows if (public := [name for name in row if not name.startswith("_")])]


def test_layout_has_every_layer_in_its_order():
    table = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", (ROOT / "docs/layout.md").read_text(), re.MULTILINE)
    order = {name: place for place, row in enumerate(layers("dnl_ext")) for name in row}
    places = [order[name] for name, _ in table if name != "csrc"]
    assert sorted(order) == sorted(name for name, _ in table if name != "csrc")
    assert places == sorted(places)
    folders = {folder for _, tests in table for folder in re.findall(r"`([\w/]+)`", tests)}
    assert all((ROOT / folder).is_dir() for folder in folders)
    ours = {f"tests/{path.parent.name}" for path in ROOT.glob("tests/*/test_*.py")}
    assert ours <= folders


def test_layout_has_the_order_within_segmentation():
    line = re.search(
        r"^Within `segmentation`, from the top: (.*)\.$", (ROOT / "docs/layout.md").read_text(), re.MULTILINE
    )
    assert re.findall(r"`(\w+)`", line[1]) == [name for row in layers("dnl_ext.segmentation") for name in row]


def test_kernels_page_names_every_folder_and_no_file_that_is_not():
    csrc = ROOT / "csrc"
    operators = {path.parent for path in csrc.glob("ops/*/*.cpp")}
    rows = [row for row in (csrc / "README.md").read_text().splitlines() if row.startswith("|") and "`ops/" in row]
    for operator in operators:
        folders = {f"{path.name}/" for path in operator.iterdir() if path.is_dir()}
        mine = [re.findall(r"`([\w./]+)`", row) for row in rows if f"`ops/{operator.name}/" in row]
        assert mine, f"{operator.name} has no row"
        assert folders <= {name for row in mine for name in row} | {f"{n.split('/')[0]}/" for row in mine for n in row}
        for name in (name for row in mine for name in row if "." in name or name.endswith("/")):
            assert (csrc / name).exists() or (operator / name).exists(), name
