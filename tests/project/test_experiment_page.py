"""docs/experiment.md is made from its results, which grow by the folders of dnl-ext ablate that are added to them."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from dnl_ext.segmentation.experiments import RECIPES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def page():
    pytest.importorskip("scipy", reason="needs scipy: pip install dnl_ext[cli]")
    spec = importlib.util.spec_from_file_location("experiment_page", ROOT / "docs/experiment_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_experiment_is_made_from_its_results(page):
    """Every number of it: the page is what its template and docs/results give."""
    text = (ROOT / "docs/experiment.md").read_text(encoding="utf-8")
    assert page.render(page.TEMPLATE.read_text(encoding="utf-8")) == text, "python docs/experiment_page.py --write"
    assert "{{" not in text


def test_experiment_s_figures_and_verdicts(page, tmp_path):
    scores = {("dnl", 0.05): (0.53, 0.62, 0.71), ("nl", 1.0): (0.50, 0.60, 0.68), ("unary", None): (0.5, 0.6)}
    runs = [
        {"variant": variant, "temperature": temperature, "seed": seed, "miou": miou, "steps": 10,
         "seconds_per_step": 36, "attention": {"pairwise.own_class.uniform": 0.25}}
        for (variant, temperature), values in scores.items() for seed, miou in enumerate(values)
    ]  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps({"planned": 9, "runs": runs}))
    results = page.Results(tmp_path / "x.json")
    assert (results.done, results.planned, results.seeds, results.hours()) == (8, 9, "2 to 3", "0.8")
    assert results.progress == "8 of 9 trainings"
    assert results.value("dnl@0.05", "miou") == "62.0 ± 9.0" and results.value("pairwise@1", "miou") == "-"
    assert results.versus("dnl@0.05", "nl@1", "miou") == "+2.7 ± 0.6 (p = 0.015, 3 seeds)"
    assert results.verdict("dnl@0.05", "nl@1", "miou") == "yes"
    assert results.verdict("nl@1", "dnl@0.05", "miou") == "the opposite"
    strict = page.Results(tmp_path / "x.json", tests=10)
    assert strict.verdict("dnl@0.05", "nl@1", "miou") == "weakly"
    assert strict.verdict("nl@1", "dnl@0.05", "miou") == "weakly the opposite"
    assert results.verdict("unary", "nl@1", "miou") == "too few seeds (2)"
    assert results.mean("own_uniform") == "25.0"
    nothing = page.Results(tmp_path / "none.json")
    assert (
        nothing.seeds == "none"
        and nothing.progress == "no training"
        and nothing.verdict("dnl@0.05", "nl@1", "miou") == "-"
    )


def outcome(variant, temperature, seed, miou, **changes):
    """A run's result as dnl-ext ablate has it."""
    settings = {"variant": variant, "temperature": temperature, "seed": seed, "steps": 9, "lr": 0.001, "crop": [8, 8]}
    return {
        "run": {"variant": variant, "temperature": temperature, "seed": seed}, "settings": settings | changes,
        "miou": miou, "seconds_per_step": 0.12345, "attention": {"total.jsd": 0.123456789},
        "versions": {"dnl_ext": "0.1.0", "torch": "2.13.0"},
    }  # fmt: skip


def folder(path, *runs, recipe="camvid", planned=6):
    """A folder as dnl-ext ablate leaves it."""
    path.mkdir(parents=True)
    content = {"recipe": recipe, "source": "Words.", "runs_planned": planned, "runs": list(runs)}
    (path / "results.json").write_text(json.dumps(content))
    return path


@pytest.fixture
def docs(tmp_path):
    for name in ("results", "images"):
        (tmp_path / "docs" / name).mkdir(parents=True)
    return tmp_path / "docs"


def test_results_accumulate(page, docs, tmp_path):
    """Seeds of several folders and sessions; a run that is kept stays; the figure is of all of them."""
    first = folder(tmp_path / "a", outcome("dnl", 0.05, 0, 0.5), outcome("nl", 1.0, 0, 0.4))
    page.take({"x": [first]}, docs)
    other = outcome("nl", 1.0, 1, 0.41) | {"versions": {"dnl_ext": "0.1.0", "torch": "2.14.0"}}
    second = folder(tmp_path / "b", outcome("dnl", 0.05, 0, 0.9), outcome("dnl", 0.05, 1, 0.6), planned=2)
    third = folder(tmp_path / "c", other)
    figure = (docs / "images/x.png").read_bytes()
    said = page.take({"x": [second, third]}, docs)
    assert said == [f"x: 3 runs, 1 of them new from {second}", f"x: 4 runs, 1 of them new from {third}"]
    assert (docs / "images/x.png").read_bytes() != figure
    content = json.loads((docs / "results/x.json").read_text())
    assert content["planned"] == 6 and content["settings"] == {"steps": 9, "lr": 0.001, "crop": [8, 8]}
    assert [(run["variant"], run["seed"], run["miou"], "versions" in run) for run in content["runs"]] == [
        ("dnl", 0, 0.5, False), ("nl", 0, 0.4, False), ("dnl", 1, 0.6, False), ("nl", 1, 0.41, True),
    ]  # fmt: skip
    results = page.Results(docs / "results/x.json")
    assert results.progress == "4 of 6 trainings" and results.seeds == "2"
    assert results.value("dnl@0.05", "miou") == "55.0 ± 7.1"
    whole = (docs / "results/x.json").read_text()
    page.take({"x": [first, second, third]}, docs)
    assert (docs / "results/x.json").read_text() == whole


def test_a_run_without_a_timed_step(page, docs, tmp_path):
    """Such as one that was stopped after its last step: its figures count, its time is taken for that of the others."""
    timed = outcome("nl", 1.0, 0, 0.4) | {"seconds_per_step": 3600.0}
    untimed = outcome("dnl", 0.05, 0, 0.5) | {"seconds_per_step": None}
    page.take({"x": [folder(tmp_path / "a", timed, untimed)]}, docs)
    results = page.Results(docs / "results/x.json")
    assert results.value("dnl@0.05", "miou") == "50.0" and results.hours() == "18.0"


def test_maps_are_of_the_first_seed(page, docs, tmp_path):
    for name, seed in (("later", 1), ("first", 0)):
        out = folder(tmp_path / name, outcome("dnl", 0.05, seed, 0.5))
        shutil.copy(ROOT / "docs/images/camvid-maps.png", out / "maps-0.png")
    page.take({"x": [tmp_path / "first"]}, docs)
    (docs / "images/x-maps.png").unlink()
    page.take({"x": [tmp_path / "later"]}, docs)
    assert not (docs / "images/x-maps.png").exists()


REFUSED = {
    "other settings": (outcome("dnl", 0.05, 1, 0.5, lr=0.01), "camvid", "made with lr 0.01, what is kept with 0.001"),
    "a default left out": (
        outcome("dnl", 0.05, 1, 0.5, batch_size=3), "camvid", "was made with batch_size 3, what is kept with",
    ),
    "other recipe": (outcome("dnl", 0.05, 1, 0.5), "context", "is of the recipe context, what is kept of camvid"),
    "no result": ({"run": {}}, "camvid", "holds no results of dnl-ext ablate"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_results_that_do_not_belong_are_refused(page, docs, tmp_path, case):
    run, recipe, message = REFUSED[case]
    page.take({"x": [folder(tmp_path / "a", outcome("dnl", 0.05, 0, 0.5))]}, docs)
    before = {path: path.read_bytes() for path in docs.rglob("*.*")}
    good = folder(tmp_path / "b", outcome("nl", 1.0, 0, 0.5))
    bad = folder(tmp_path / "c", run, recipe=recipe)
    with pytest.raises(page.Refused) as refused:
        page.take({"x": [good, bad]}, docs)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert before == {path: path.read_bytes() for path in docs.rglob("*.*")}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("camvid", "--take: expected NAME=OUT, got camvid"),
        ("camvid=nowhere", "cannot read nowhere/results.json: No such file or directory"),
        ("camvid=list", "list/results.json holds no results of dnl-ext ablate"),
        ("ablation-context=run", "ablation-context.json is not in the form that can be added to"),
    ],
)
def test_wrong_folders_are_one_line(page, tmp_path, monkeypatch, capsys, argument, message):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "run", outcome("dnl", 0.05, 0, 0.5))
    (folder(tmp_path / "list") / "results.json").write_text("[]")
    monkeypatch.setattr("sys.argv", ["experiment_page.py", "--take", argument])
    with pytest.raises(SystemExit) as stopped:
        page.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1


def test_kept_results_are_of_the_recipes_as_they_are(page):
    """A recipe that changes would mix trainings of two kinds in one table."""
    for name in ("camvid", "camvid_trained"):
        path = ROOT / f"docs/results/{name}.json"
        if path.is_file():
            content = json.loads(path.read_text())
            settings, recipe = content["settings"], RECIPES[name]
            wanted = {key: value for key, value in recipe.settings.items() if key in settings}
            assert json.loads(json.dumps(wanted)) == {key: settings[key] for key in wanted}
            assert settings["images"] == recipe.images and content["recipe"] == name
            rows = {(run["variant"], run["temperature"]) for run in content["runs"]}
            assert rows <= set(recipe.choose(None, None))
