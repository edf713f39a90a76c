"""``dnl-ext diagnose --model``: what it writes of a network that a factory makes, and one line for bad input."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import originals
import pytest
import torch
from PIL import Image
from test_cli import assert_one_line, run

from dnl_ext.analysis import measure_model
from dnl_ext.diagnosis import ImageInputs, build_model, diagnose_model
from dnl_ext.diagnosis.images import MEAN, STD
from dnl_ext.diagnosis.pictures import Grid, token_grid, token_grids

MODULE = """
import torch
from torch import nn


class Patches(nn.Module):
    '''A vision transformer: a class token, patches, layers of heads.'''

    def __init__(self, heads=2, width=16, side=32, patch=8, depth=2):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, (side // patch) ** 2 + 1, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, depth)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return self.layers(torch.cat([self.token.expand(len(tokens), -1, -1), tokens], 1) + self.position)


def made():
    torch.manual_seed(0)
    return Patches()


class OneQuery(nn.Module):
    def forward(self, images):
        x = images.flatten(1)[:, None]
        return nn.functional.scaled_dot_product_attention(x, x, x)


def diverged():
    model = made()
    model.patches.weight.data.fill_(float("nan"))
    return model


convolution = nn.Conv2d(3, 4, 3)
number = 7


def fails(**options):
    raise RuntimeError("no\\nsuch network")
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The module in the current folder, under a name that no other test has imported, and two images."""
    monkeypatch.chdir(tmp_path)
    name = f"network_{re.sub(r'[^a-z0-9]', '', str(tmp_path).lower())}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / "photos").mkdir()
    for number, size in enumerate([(40, 64), (70, 50)]):
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    (tmp_path / "photos" / "set.png").mkdir()
    (tmp_path / "photos" / "._0.png").write_text("what macOS leaves beside an image")
    return name


def diagnose(module, factory, *options):
    return run("diagnose", "--model", f"{module}:{factory}", "--images", "photos", "--size", "32x32", *options)


class TestReport:
    def test_what_it_writes(self, here, tmp_path):
        result = diagnose(here, "made", "--queries", 8, "--pictures", 1, "--out", "out")
        assert result.exit_code == 0, result.output
        out = tmp_path / "out"
        assert {path.name for path in out.iterdir()} == {
            "report.md", "report.html", "report.json", "heads.png", "maps-0.png",
        }  # fmt: skip
        found = json.loads((out / "report.json").read_text())
        model = build_model(f"{here}:made")
        images = ImageInputs.of_folder("photos", size=(32, 32))
        expected = measure_model(model, images, queries=8)
        assert [layer["name"] for layer in found["layers"]] == list(expected.layers)
        assert list(expected.layers) == ["layers.layers.0.self_attn", "layers.layers.1.self_attn"]
        for layer, (_, head, figures) in zip([x for x in found["layers"] for _ in "01"], expected.heads(), strict=True):
            assert layer["heads"][head]["images"] == 2
            for name, figure in figures.items():
                value = layer["heads"][head]["summary"][name]["value"]
                assert value == pytest.approx(figure.value, rel=1e-4, abs=1e-7)
        text = (out / "report.md").read_text()
        first = expected.ranking()[0]
        assert f"| 1 | {first[0]} | {first[1]} | {first[2]['total.jsd'].value:.3f}" in text
        assert "layers.layers.1.self_attn | 2 | 17 x 17" in text and "![Where heads look, image 0](maps-0.png)" in text
        page = (out / "report.html").read_text()
        assert page.count('src="data:image/png;base64,') == 2 and "Heads, those that ignore the query first" in page
        assert "Heads, those that ignore the query first" in result.output and "ranks all 4 heads" in result.output
        with Image.open(out / "maps-0.png") as picture:
            assert picture.width > 1000 and picture.height > 500

    def test_arguments_and_weights(self, here, tmp_path):
        model = build_model(f"{here}:Patches", ["heads=4", "width=8"])
        assert model.layers.layers[0].self_attn.num_heads == 4 and not model.training
        for state, name in (
            (model.state_dict(), "plain.pt"),
            ({"state_dict": model.state_dict(), "epoch": 3}, "nested.pt"),
            ({f"module.{key}": value for key, value in model.state_dict().items()}, "parallel.pt"),
        ):
            torch.save(state, tmp_path / name)
            again = build_model(f"{here}:Patches", ["heads=4", "width=8"], tmp_path / name)
            assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True)), name
        torch.save({key: value.half() for key, value in model.state_dict().items()}, tmp_path / "half.pt")
        half = build_model(f"{here}:Patches", ["heads=4", "width=8"], tmp_path / "half.pt")
        assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}

    def test_without_images_photographs_are_taken(self, here):
        result = run("diagnose", "--model", f"{here}:made", "--size", "32x32", "--limit", 1, "--pictures", 0)
        assert result.exit_code == 0, result.output
        with open("runs/diagnose/report.json") as file:
            assert json.load(file)["images"] == ["astronaut.png"]

    def test_blocks_that_convert_knows(self, tmp_path):
        """GCNet's, which the analysis does not know by itself: its one map is the same for all queries."""
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 8, 8), originals.ContextBlock(8, 0.5))
        assert not measure_model(model, [torch.rand(1, 3, 32, 32)]).layers
        report = diagnose_model(model, ImageInputs.of_folder("photos", size=(32, 32)), "out", title="mine")
        ((layer, head, figures),) = report.ranking()
        assert (layer, head) == ("1", 0) and figures["total.jsd"].value < 1e-6
        assert not (tmp_path / "out/maps-0.png").exists() and (tmp_path / "out/heads.png").exists()


COST = """
import resource, subprocess, sys
subprocess.run([sys.executable, "-m", "dnl_ext", *sys.argv[1:]], check=True, stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the largest resident set is in KiB on Linux")
def test_cost_of_a_base_vision_transformer(here):
    """577 tokens and 144 heads: less than 60 s of one CPU and 1 GB, imports and 340 MB of weights included."""
    shape = {"heads": 12, "width": 768, "side": 384, "patch": 16, "depth": 12}
    arguments = [x for name, value in shape.items() for x in ("--model-arg", f"{name}={value}")]
    options = ["--images", "photos", "--size", "384x384", "--limit", "1", "--threads", "1"]
    command = [sys.executable, "-c", COST, "diagnose", "--model", f"{here}:Patches", *arguments, *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, kibibytes = map(float, done.stdout.split())
    print(f"{seconds:.1f} s, {kibibytes * 1.024e-3:.0f} MB")
    assert kibibytes * 1024 < 1e9
    assert seconds < 60


class TestImages:
    def test_are_covered_cropped_and_normalised(self, tmp_path):
        image = Image.new("RGB", (60, 20), (255, 0, 0))
        image.paste((0, 0, 255), (20, 0, 40, 20))  # the middle third
        image.save(tmp_path / "thirds.png")
        (pixels,) = ImageInputs(["thirds.png"], (10, 10))
        expected = (torch.tensor([0.0, 0.0, 1.0]) - torch.tensor(MEAN)) / torch.tensor(STD)
        torch.testing.assert_close(pixels[0, :, 1:-1, 1:-1], expected.view(3, 1, 1).expand(3, 8, 8))
        (other,) = ImageInputs(["thirds.png"], (10, 10), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        assert other[0, :, 5, 5].tolist() == [-1, -1, 1]

    def test_grids_of_tokens(self):
        assert token_grid(577, (384, 384)) == Grid(1, 24, 24)
        assert token_grid(196, (224, 224)) == Grid(0, 14, 14)
        assert token_grid(5 + 16 * 32, (256, 512)) == Grid(5, 16, 32)
        assert token_grid(15 * 20, (480, 640)) == token_grid(15 * 20, (470, 630)) == Grid(0, 15, 20)
        assert token_grid(100, (224, 224)) is None  # object queries
        assert token_grids([100, 96, 96], (256, 384)) == {96: Grid(0, 8, 12)}
        assert token_grids([197, 50], (224, 224)) == {197: Grid(1, 14, 14), 50: Grid(1, 7, 7)}


class TestBadInput:
    @pytest.mark.parametrize(
        ("factory", "message"),
        [
            ("nothing", "has no nothing"),
            ("number", "expected a function or class, got int"),
            ("torch.device", "torch.device() fails: TypeError"),
            ("fails", "fails() fails: RuntimeError: no such network"),
            ("torch.Generator", "expected an nn.Module, torch.Generator made a Generator"),
            ("convolution", "makes no call of F.scaled_dot_product_attention"),
            ("diverged", "its attention is not finite in any head"),
            ("OneQuery", "has no attention to measure: (the model): fewer than two queries"),
        ],
    )
    def test_factory(self, here, factory, message):
        assert_one_line(diagnose(here, factory), here, message)

    def test_module(self, here, tmp_path):
        (tmp_path / f"{here}_broken.py").write_text("def (")
        assert_one_line(diagnose("gone.away", "x"), "cannot import gone.away: ModuleNotFoundError")
        assert_one_line(diagnose(f"{here}_broken", "x"), "cannot import", "SyntaxError")
        assert_one_line(run("diagnose", "--model", "timm"), "expected package.module:factory", "got timm")
        assert_one_line(run("diagnose", "--model", ":x"), "expected package.module:factory")

    def test_arguments(self, here):
        assert_one_line(diagnose(here, "made", "--model-arg", "heads"), "--model-arg: expected NAME=VALUE", "got heads")
        assert_one_line(diagnose(here, "made", "--model-arg", "heads=2"), "made(heads=2) fails: TypeError")
        assert_one_line(diagnose(here, "convolution", "--model-arg", "a=2"), "is a network already")

    def test_weights(self, here, tmp_path):
        good = build_model(f"{here}:made").state_dict()
        bad = {name: value for name, value in good.items() if name != "token"} | {"extra": torch.zeros(1)}
        bad["position"] = torch.zeros(3)
        for name, state, messages in (
            ("keys.pt", bad, ("lacks token", "has also extra", "has in another shape position")),
            ("list.pt", [1, 2], ("expected a state dict",)),
            ("numbers.pt", {"token": 1}, ("expected a state dict",)),
        ):
            torch.save(state, tmp_path / name)
            assert_one_line(diagnose(here, "made", "--weights", name), name, *messages)
        (tmp_path / "text.pt").write_text("no weights")
        (tmp_path / "text.safetensors").write_text("no weights")
        assert_one_line(diagnose(here, "made", "--weights", "text.pt"), "cannot read text.pt")
        assert_one_line(diagnose(here, "made", "--weights", "text.safetensors"), "text.safetensors")
        assert_one_line(diagnose(here, "made", "--weights", "gone.pt"), "gone.pt does not exist")

    def test_images(self, here, tmp_path):
        model = ("diagnose", "--model", f"{here}:made", "--images")
        (tmp_path / "empty").mkdir()
        (tmp_path / "text.png").write_text("no image")
        assert_one_line(run(*model, "gone"), "--images: gone does not exist")
        assert_one_line(run(*model, "empty"), "folder empty has no image")
        assert_one_line(run(*model, "text.png"), "cannot read image text.png")
        assert_one_line(run(*model, "photos"), "the model fails on an image of --size 224x224", "size of tensor")
        assert_one_line(run(*model, "photos", "--size", "32"), "--size must be HEIGHTxWIDTH")
        assert_one_line(run(*model, "photos", "--size", "0x4"), "--size: expected sides of 1 to 8192")
        assert_one_line(run(*model, "photos", "--size", "9000x4"), "--size: expected sides of 1 to 8192")
        assert_one_line(run(*model, "photos", "--mean", "1,2"), "--mean: expected three numbers", "got 2")
        assert_one_line(run(*model, "photos", "--mean", "a,b,c"), "--mean: expected R,G,B", "got a,b,c")
        assert_one_line(run(*model, "photos", "--std", "1,0,1"), "--std: expected numbers above 0, got 1,0,1")

    def test_options_that_do_not_go_together(self, here):
        assert_one_line(run("diagnose"), "expected CHECKPOINT", "--model package.module:factory")
        assert_one_line(run("diagnose", "a.pt", "--size", "3x3"), "--size does not go with CHECKPOINT")
        assert_one_line(diagnose(here, "made", "a.pt"), "CHECKPOINT does not go with --model")
        assert_one_line(diagnose(here, "made", "--data", "x"), "--data does not go with --model")
        assert_one_line(run("diagnose", "a.pt", "--images", "photos"), "expected a number of validation images")
        assert_one_line(run("diagnose", "a.pt", "--images", 0), "--images: expected at least 1, got 0")

    def test_out(self, here, tmp_path):
        (tmp_path / "file").write_text("")
        assert_one_line(diagnose(here, "made", "--out", "file/out"), "cannot write to file/out")
