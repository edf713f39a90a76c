"""The pages: links and paths lead somewhere, their programs run, every public name is in the reference.

``make docs`` builds the site from them, with warnings as errors; nothing here needs what it needs.
"""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

import dnl_ext

ROOT = Path(__file__).parents[2]
PAGES = [
    path
    for pattern in ("*.md", ".github/*.md", "docs/**/*.md", "csrc/**/*.md", "benchmarks/**/*.md", "tests/**/*.md")
    for path in sorted(ROOT.glob(pattern))
]
page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def prose(path):
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    found = []
    for heading in re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return found


def dead_links(path):
    """Relative links of a page, pictures too, whose file or anchor does not exist."""
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(target)
    return dead


def dead_paths(path):
    """Paths in a page's `code` that begin with a folder of the repository, or of the page's, and do not exist."""
    dead = []
    for name in re.findall(r"`([\w.*-]+/[\w.*/-]*)`", prose(path)):
        for base in (ROOT, path.parent):
            if (base / name.split("/")[0]).is_dir() and not name.startswith(("build/", "runs/", "dist/")):
                if not any(base.glob(name.rstrip("/"))):
                    dead.append(name)
                break
    return dead


@page
def test_links(page):
    assert dead_links(page) == []


@page
def test_paths(page):
    assert dead_paths(page) == []


def test_dead_links_and_paths_are_found(tmp_path):
    other, path = tmp_path / "other.md", tmp_path / "page.md"
    other.write_text("# A title\n\n## What `it` does, and why\n")
    path.write_text(
        "[a](other.md#what-it-does-and-why) [b](other.md#nowhere) [c](gone.md) ![d](gone.png) [e](https://host/gone)\n"
        "`tests/project/test_docs.py` `tests/*/test_*.py` `tests/gone.py` `gone/gone.py`\n"
        "```\n[f](gone.md) `tests/gone.py`\n```\n"
    )
    assert dead_links(path) == ["other.md#nowhere", "gone.md", "gone.png"]
    assert dead_paths(path) == ["tests/gone.py"]


def run_page(name, folder, monkeypatch, **replaced):
    """The namespace of a page's program, run in a folder; `replaced` changes the value of its constants."""
    spec = importlib.util.spec_from_file_location("run_page", ROOT / "docs/run_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    for constant, value in replaced.items():
        text, count = re.subn(rf"^{constant} = .*$", f"{constant} = {value}", text, flags=re.MULTILINE)
        assert count == 1
    (folder / "images").mkdir()
    monkeypatch.chdir(folder)
    return module.run(text, f"docs/{name}")


def test_start(tmp_path, monkeypatch):
    _, text = run_page("start.md", tmp_path, monkeypatch)
    assert text == (ROOT / "docs/start.md").read_text(encoding="utf-8")  # its printed output too


def test_systems(tmp_path, monkeypatch):
    _, text = run_page("systems.md", tmp_path, monkeypatch)
    assert text == (ROOT / "docs/systems.md").read_text(encoding="utf-8")


#: What makes a command of docs/systems.md short.
SHORT = {
    "train": ["--steps", "1", "--crop", "64x64", "--batch-size", "1", "--width", "4", "--val-images", "1"],
    "diagnose": ["--images", "1", "--queries", "4", "--pictures", "0"],
}


def test_commands_of_systems(tmp_path, monkeypatch):
    """Those of the library run, in their order; tests/integrations trains all configurations of the others."""
    from dnl_ext.cli import main

    commands = re.findall(r"^    (\S+) (.*)$", prose(ROOT / "docs/systems.md"), re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    ours = [rest.split() for tool, rest in commands if tool == "dnl-ext"]
    assert [arguments[0] for arguments in ours] == list(SHORT)
    for arguments in ours:
        with pytest.raises(SystemExit) as end:
            main([*arguments, *SHORT[arguments[0]]])
        assert end.value.code == 0, arguments
    configurations = {rest.split()[2] for tool, rest in commands if tool == "mim"}
    there = {str(path.relative_to(ROOT)) for path in ROOT.glob("examples/mm*/*.py")}
    assert configurations == there and len(commands) == len(ours) + len(there)


def pictures(folder):
    return {path.name for path in (folder / "images").iterdir()}


TUTORIAL_PICTURES = {path.name for path in (ROOT / "docs/images").glob("tutorial-*.png")}


def test_tutorial(tmp_path, monkeypatch):
    """Every line of it, with short trainings."""
    run_page("tutorial.md", tmp_path, monkeypatch, STEPS=2)
    assert pictures(tmp_path) == TUTORIAL_PICTURES


@pytest.mark.slow
def test_tutorial_finds_what_it_says(tmp_path, monkeypatch):
    namespace, _ = run_page("tutorial.md", tmp_path, monkeypatch)
    before, after = namespace["before"], namespace["after"]
    assert before["total.jsd"].value < 0.01 and before["total.entropy_share"].value > 0.99
    assert after["total.jsd"].value > 0.1 and after["pairwise.own_class.mass"].value > 0.9
    assert before["pairwise.own_class.mass"].value < before["pairwise.own_class.uniform"].value + 0.05


@pytest.mark.slow
def test_how_to_cpp(tmp_path, monkeypatch):
    run_page("howto/cpp.md", tmp_path, monkeypatch)
    assert (tmp_path / "block.pt2").exists()


#: Those whose `__all__` the reference must have.
DOCUMENTED = (
    "dnl_ext", "dnl_ext.modules", "dnl_ext.analysis", "dnl_ext.cli", "dnl_ext.diagnosis", "dnl_ext.distributed",
    "dnl_ext.integrations",
    "dnl_ext.export", "dnl_ext.reference", "dnl_ext.segmentation", "dnl_ext.segmentation.data",
    "dnl_ext.segmentation.experiments", "dnl_ext.segmentation.looking", "dnl_ext.segmentation.training",
    "dnl_ext.segmentation.training.checkpoint", "dnl_ext.segmentation.training.distributed", "dnl_ext.tuning",
)  # fmt: skip


@pytest.mark.parametrize("module", DOCUMENTED)
def test_every_public_name_is_in_the_reference(module):
    text = "".join(path.read_text() for path in sorted((ROOT / "docs/api").glob("*.rst")))
    if re.search(rf"automodule:: {module}\n   :members:", text):
        return  # all of its __all__
    documented = set(re.findall(r"auto(?:function|class|module):: (?:dnl_ext\.)?(?:modules\.)?(\w+)", text))
    assert set(importlib.import_module(module).__all__) <= documented


def test_versions_are_one():
    """The citation's is the package's, and pre-commit's tools are those of the extra `dev`."""
    assert f"\nversion: {dnl_ext.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    dev = re.search(r"^dev = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)[1]
    pins = set(re.findall(r"[\w-]+==[\w.]+", (ROOT / ".pre-commit-config.yaml").read_text()))
    assert {pin.split("==")[0] for pin in pins} == {"ruff", "clang-format", "check-jsonschema"}
    assert pins <= set(re.findall(r'"([\w-]+==[\w.]+)"', dev))
