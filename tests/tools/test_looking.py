"""Commands maps, diagnose and ablate: what they write, what they compute, and one line for bad input."""

import dataclasses
import json
import re
import signal
import time

import pytest
import torch
from PIL import Image
from test_cli import assert_one_line, run, start, train
from test_data import MAKERS

from dnl_ext.analysis import AttentionProbe
from dnl_ext.segmentation.data import read_image
from dnl_ext.segmentation.errors import InputError
from dnl_ext.segmentation.experiments.ablation import Ablation, quiet
from dnl_ext.segmentation.experiments.comparison import over_seeds
from dnl_ext.segmentation.experiments.recipes import VARIANTS, rows
from dnl_ext.segmentation.experiments.runs import Run, plan
from dnl_ext.segmentation.looking import maps
from dnl_ext.segmentation.looking.diagnosis import Samples
from dnl_ext.segmentation.looking.overlay import outlines
from dnl_ext.segmentation.training.trained import restore
from dnl_ext.segmentation.training.trainer import open_data

TINY = ("--steps", "3", "--pretext", "2", "--crop", "64x96", "--width", "4", "--val-images", "2", "--images", "1",
        "--batch-size", "1", "--threads", "1")  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints of each variant, trained for two steps."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for variant in (*VARIANTS, "none"):
        result = train("--out", folder / variant, "--variant", variant, "--block-gain", "1")
        assert result.exit_code == 0, result.output
    return {variant: folder / variant / "checkpoint.pt" for variant in (*VARIANTS, "none")}


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    path = tmp_path_factory.mktemp("photograph") / "image.png"
    Image.effect_noise((96, 64), 60).convert("RGB").save(path)
    return path


class TestMaps:
    def test_one_picture_of_all_variants(self, checkpoints, photograph, tmp_path):
        options = [x for variant in VARIANTS for x in ("--checkpoint", checkpoints[variant])]
        out = tmp_path / "new" / "maps.png"
        result = run("maps", photograph, *options, "--query", "10,20", "--query", "95,63", "--out", out)
        assert result.exit_code == 0, result.output
        with Image.open(out) as picture:
            assert picture.width > 1500 and picture.height > 500

    def test_default_queries_and_pdf(self, checkpoints, photograph, tmp_path):
        out = tmp_path / "maps.pdf"
        assert run("maps", photograph, "--checkpoint", checkpoints["dnl"], "--out", out).exit_code == 0
        assert out.read_bytes().startswith(b"%PDF")

    def test_outlines(self):
        label = torch.tensor([[3, 3, 1], [3, 3, 1], [3, 2, 2]])
        expected = torch.tensor([[0, 0, 1], [0, 0, 1], [0, 1, 1]]).bool()
        assert torch.equal(outlines(label) == 1, expected.expand(3, -1, -1))

    def test_without_the_photograph(self, checkpoints, photograph, tmp_path, monkeypatch):
        """Nothing of it is drawn: only outlines of what is predicted."""
        shown = []
        monkeypatch.setattr(maps, "draw_maps", lambda path, image, queries, rows, *_: shown.append((image, rows)))
        options = ("--checkpoint", checkpoints["dnl"], "--out", tmp_path / "x.png")
        assert run("maps", photograph, *options, "--no-photograph").exit_code == 0
        assert run("maps", photograph, *options).exit_code == 0
        (drawn, rows), (seen, _) = shown
        assert torch.equal(drawn, outlines(rows[0].prediction)) and torch.equal(seen, read_image(photograph))

    def test_bad_input(self, checkpoints, photograph, tmp_path):
        good = ("--checkpoint", checkpoints["dnl"], "--out", tmp_path / "x.png")
        text = tmp_path / "text.png"
        text.write_text("no image")
        assert_one_line(run("maps", tmp_path / "none.png", *good), "none.png does not exist")
        assert_one_line(run("maps", text, *good), "cannot read image", text)
        assert_one_line(run("maps", photograph, *good, "--query", "96,0"), "--query 96,0 is outside", "96 x 64")
        assert_one_line(run("maps", photograph, *good, "--query", "-1,0"), "--query -1,0 is outside")
        assert_one_line(run("maps", photograph, *good, "--query", "5"), "--query: expected X,Y", "got 5")
        assert_one_line(run("maps", photograph, *good, *(("--query", "1,1") * 7)), "expected 1 to 6")
        assert_one_line(run("maps", photograph), "--checkpoint: give at least one")
        assert_one_line(run("maps", photograph, "--checkpoint", tmp_path / "no.pt"), "no.pt does not exist")
        assert_one_line(run("maps", photograph, "--checkpoint", text), "cannot read checkpoint")
        assert_one_line(run("maps", photograph, "--checkpoint", checkpoints["none"]), "without a block")
        assert_one_line(run("maps", photograph, "--checkpoint", checkpoints["dnl"], "--out", "x.gif"), "--out", "x.gif")
        assert not (tmp_path / "x.png").exists()

    def test_checkpoint_of_something_else(self, photograph, tmp_path):
        for state, message in (
            ({"weights": 1}, "is not a checkpoint of dnl_ext train"),
            ({"format": 1}, "lacks config"),
            ({"format": 1, "config": {"odd": 1}, "classes": [], "network": {}, "step": 1}, "of another version"),
        ):
            torch.save(state, tmp_path / "x.pt")
            assert_one_line(run("maps", photograph, "--checkpoint", tmp_path / "x.pt"), "x.pt", message)


@pytest.fixture(scope="module")
def report(checkpoints, tmp_path_factory):
    """Folder and output of a diagnosis of three variants."""
    out = tmp_path_factory.mktemp("diagnose")
    paths = [checkpoints[variant] for variant in ("nl", "dnl", "unary")]
    result = run("diagnose", *paths, "--images", 2, "--queries", 16, "--pictures", 1, "--out", out)
    assert result.exit_code == 0, result.output
    return out, result.output


class TestDiagnose:
    def test_figures_are_the_probe_s(self, report, checkpoints):
        found = json.loads((report[0] / "report.json").read_text())
        trained = restore(checkpoints["nl"])
        data = open_data(dataclasses.replace(trained.config, val_images=2))
        with AttentionProbe(trained.network, 16) as probe:
            probe.run(Samples(data, 2), progress=False)
        for name, figure in probe.summary()["block"].items():
            assert found["networks"]["nl"]["summary"][name]["value"] == pytest.approx(figure.value, rel=1e-4, abs=1e-7)
        assert set(found["networks"]) == {"nl", "dnl", "unary"}

    def test_markdown_and_terminal(self, report):
        text = (report[0] / "report.md").read_text()
        for part in ("### Degeneration", "### Decomposition", "### Entropy", "### Coupling", "our definition"):
            assert part in text
        assert "| unary, mass on boundaries |" in text and "![Validation image 0](maps-0.png)" in text
        assert "Degeneration" in report[1]
        assert "nl is flat: pairwise rows have" in text and "unary is " not in text  # two steps of training

    def test_page_needs_no_other_file(self, report):
        page = (report[0] / "report.html").read_text()
        sources = re.findall(r'src="([^"]*)"', page)
        assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")
        assert "http" not in re.sub(r"base64,[^\"]*", "", page) and page.count("<table>") == page.count("</table>") >= 5

    def test_bad_input(self, checkpoints, tmp_path):
        assert_one_line(run("diagnose", tmp_path / "no.pt"), "no.pt does not exist")
        assert_one_line(run("diagnose", checkpoints["none"]), "without a block")
        assert_one_line(run("diagnose", checkpoints["dnl"], "--data", tmp_path / "no"), "does not exist")
        assert_one_line(run("diagnose", checkpoints["dnl"], "--classes", 3), "belong to --data")
        assert_one_line(run("diagnose", checkpoints["dnl"], checkpoints["dnl"]), "expected each once")


class TestAblate:
    def ablate(self, out, *arguments):
        return run("ablate", *TINY, "--out", out, *arguments)

    def test_plan(self):
        runs = plan(rows(VARIANTS, (1.0, 0.05)), (0, 1, 2))
        assert len(runs) == 3 * (4 * 2 + 1) and len({entry.name for entry in runs}) == len(runs)
        assert Run("unary", None, 0) in runs and Run("dnl", 0.05, 2).name == "dnl-T0.05-seed2"

    def test_writes_the_table(self, tmp_path):
        result = self.ablate(tmp_path, "--variants", "nl,unary", "--seeds", "0,1", "--temperatures", "0.05")
        assert result.exit_code == 0, result.output
        table = (tmp_path / "table.md").read_text()
        assert "| standard non-local (product) | 0.05 | 2 |" in table and "| unary alone | - | 2 |" in table
        assert "4 of 4 runs done" in table
        found = json.loads((tmp_path / "results.json").read_text())
        assert len(found["runs"]) == 4
        with Image.open(tmp_path / "ablation.png") as picture:
            assert picture.width > 1000
        again = self.ablate(tmp_path, "--variants", "nl,unary", "--seeds", "0,1", "--temperatures", "0.05")
        assert again.exit_code == 0 and "step" not in again.output.split("\n", 1)[1]

    def test_continues_and_adds(self, tmp_path):
        """Two runs, then the same command with one more: what was done is not done again."""
        first = self.ablate(tmp_path, "--variants", "nl", "--seeds", "0", "--temperatures", "1,0.05")
        assert first.exit_code == 0, first.output
        path = tmp_path / "nl-T1-seed0" / "result.json"
        before = path.stat().st_mtime_ns
        second = self.ablate(tmp_path, "--variants", "nl,dnl", "--seeds", "0", "--temperatures", "1,0.05")
        assert second.exit_code == 0 and path.stat().st_mtime_ns == before
        assert "[3/4] dnl-T1-seed0" in second.output and "encoder" not in second.output

    def test_a_stopped_run_goes_on_to_the_same_result(self, tmp_path):
        settings = {"steps": 4, "crop": (64, 96), "width": 4, "val_images": 1, "batch_size": 1, "threads": 1}
        one = Run("dnl", 0.05, 0)

        def ablation(out):
            return Ablation(out, "context", settings, ("dnl",), (0.05,), (0,), 2, 1)

        straight = ablation(tmp_path / "straight").run()[one]
        parts = ablation(tmp_path / "parts")
        weights = parts.encoder(0, quiet)
        trainer = parts.trainer(parts.config(one), tmp_path / "parts" / one.name, open_data(parts.base))
        trainer.network.encoder.load_state_dict(weights)
        trainer.run(stop_after=2)
        continued = ablation(tmp_path / "parts").run()[one]
        assert continued["miou"] == straight["miou"] and continued["attention"] == straight["attention"]

    def test_interrupt(self, tmp_path):
        arguments = ("ablate", *TINY, "--out", tmp_path, "--variants", "nl", "--seeds", "0", "--temperatures", "1")
        process = start(*("100000" if x == "3" else x for x in arguments))
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (tmp_path / "nl-T1-seed0" / "log.csv").is_file():
            time.sleep(0.2)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGINT and "the same command goes on" in errors
        assert (tmp_path / "nl-T1-seed0" / "checkpoint.pt").is_file()
        assert not (tmp_path / "nl-T1-seed0" / "result.json").exists()

    def test_bad_input(self, tmp_path):
        assert_one_line(self.ablate(tmp_path, "--variants", "nl,fly"), "--variants must be among", "got fly")
        assert_one_line(self.ablate(tmp_path, "--temperatures", "a"), "--temperatures: expected values", "'a'")
        assert_one_line(self.ablate(tmp_path, "--seeds", "0,0"), "--seeds: expected each value once")
        for wrong in ("0.05,0", "0.05,nan", "0.05,inf"):  # said before the first run, not when its turn comes
            assert_one_line(self.ablate(tmp_path, "--temperatures", wrong), "--temperatures must be numbers above 0")
        assert_one_line(self.ablate(tmp_path, "--seeds", "0,-1"), "--seeds must not be negative, got -1")
        assert not [path for path in tmp_path.iterdir() if path.is_dir()]
        assert_one_line(self.ablate(tmp_path, "--recipe", "coco"), "--recipe must be one of", "got coco")
        assert_one_line(self.ablate(tmp_path, "--recipe", "cityscapes"), "needs --data DIR")
        assert_one_line(self.ablate(tmp_path, "--data", tmp_path), "needs a --recipe of its own")
        MAKERS["plain"](tmp_path / "no_test_part")
        camvid = run("ablate", "--recipe", "camvid", "--data", tmp_path / "no_test_part", "--out", tmp_path / "camvid")
        assert_one_line(camvid, "no_test_part (camvid layout) has no test images with labels")
        assert self.ablate(tmp_path, "--variants", "unary", "--seeds", "0").exit_code == 0
        changed = run("ablate", *("5" if x == "3" else x for x in TINY), "--out", tmp_path, "--variants", "unary",
                      "--seeds", "0")  # fmt: skip
        assert_one_line(changed, "result.json was made with steps 3, not 5")
        (tmp_path / "unary-seed0" / "result.json").write_text("{")
        assert_one_line(self.ablate(tmp_path, "--variants", "unary", "--seeds", "0"), "is no result of dnl-ext ablate")

    @pytest.mark.parametrize("name", ["cityscapes", "ade20k", "pascal_context"])
    def test_recipes_are_valid_settings(self, name, tmp_path):
        ablation = Ablation(tmp_path, name, {"data": "somewhere"})
        assert len(ablation.runs) == 27 and ablation.base.optimizer == "sgd" and ablation.pretext == 0
        assert all(
            ablation.config(entry).temperature in (None, *ablation.recipe.temperatures) for entry in ablation.runs
        )

    @pytest.mark.parametrize(
        ("recipe", "layout"),
        [("cityscapes", "cityscapes"), ("ade20k", "ade20k"), ("pascal_context", "pascal-context")],
    )
    def test_recipe_on_a_folder(self, recipe, layout, tmp_path):
        """A recipe's own layout is read, and diagnose finds the data of its checkpoints again."""
        MAKERS[layout](tmp_path / "data")
        result = self.ablate(tmp_path / "out", "--recipe", recipe, "--data", tmp_path / "data", "--variants", "dnl",
                             "--seeds", "0", "--temperatures", "0.1", "--pretext", "0")  # fmt: skip
        assert result.exit_code == 0, result.output
        assert f"Recipe {recipe}" in (tmp_path / "out" / "table.md").read_text()
        path = tmp_path / "out" / "dnl-T0.1-seed0" / "checkpoint.pt"
        again = run("diagnose", path, "--images", 1, "--queries", 8, "--out", tmp_path / "report")
        assert again.exit_code == 0, again.output

    def test_spread(self):
        results = {
            Run("nl", 1.0, seed): {"miou": miou, "attention": {"total.jsd": 0.5}}
            for seed, miou in enumerate((0.2, 0.4, 0.6))
        }
        figures = over_seeds(results)["nl", 1.0]
        assert figures["miou"] == (pytest.approx(0.4), pytest.approx(0.2), 3) and figures["total.jsd"][1] == 0


def test_restore_refuses_what_it_cannot_open(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        restore(tmp_path / "x.pt")


def test_restore_of_a_training_that_diverged(checkpoints, tmp_path):
    state = torch.load(checkpoints["nl"], weights_only=True)
    first = next(name for name, tensor in state["network"].items() if tensor.is_floating_point())
    state["network"][first].fill_(float("nan"))
    torch.save(state, tmp_path / "nan.pt")
    with pytest.warns(UserWarning, match=f"nan.pt: {first} has values that are not finite$"):
        restore(tmp_path / "nan.pt")
