"""Make docs/experiment.md from docs/experiment.md.in and the results in docs/results.

    python docs/experiment_page.py                                     # print the page
    python docs/experiment_page.py --write                             # write it
    python docs/experiment_page.py --take camvid=OUT --write           # with the results of dnl-ext ablate --out OUT

``--take`` adds to what docs/results has: more seeds, from as many folders as there are (``--take camvid=A camvid=B``).
They must be of one recipe and have the same settings but for variant, temperature and seed. A run that is kept stays as
it is; to measure one anew, remove its line first.

``{{ expression }}`` in the template is Python on the names of ``namespace``: every number of the page comes from there.
"""

import argparse
import dataclasses
import functools
import json
import math
import re
import sys
from pathlib import Path

from PIL import Image

from dnl_ext.analysis.tables import markdown_lines
from dnl_ext.segmentation.experiments import RECIPES, Run, difference, over_seeds
from dnl_ext.segmentation.experiments.ablation_report import draw, table
from dnl_ext.segmentation.training import TrainConfig, checkpoint

DOCS = Path(__file__).parent
TEMPLATE, PAGE = DOCS / "experiment.md.in", DOCS / "experiment.md"

#: Short name -> figure, factor, digits.
FIGURES = {
    "miou": ("miou", 100, 1),
    "own": ("pairwise.own_class.mass", 100, 1),
    "own_uniform": ("pairwise.own_class.uniform", 100, 1),
    "total_own": ("total.own_class.mass", 100, 1),
    "edge": ("unary.boundaries.mass", 100, 1),
    "edge_uniform": ("unary.boundaries.uniform", 100, 1),
    "band1": ("unary.band1.mass", 100, 1),
    "band1_uniform": ("unary.band1.uniform", 100, 1),
    "band2": ("unary.band2.mass", 100, 1),
    "band2_uniform": ("unary.band2.uniform", 100, 1),
    "edge_gradient": ("unary.gradient.mass", 100, 1),
    "unary_entropy": ("unary.entropy_share", 1, 2),
    "jsd": ("total.jsd", 1, 3),
    "pairwise_jsd": ("pairwise.jsd", 1, 3),
    "entropy": ("pairwise.entropy_share", 1, 2),
    "variance": ("decomposition.variance", 1, 1),
    "unary_share": ("decomposition.unary_of_map", 1, 2),
    "coupling": ("coupling.pairwise_by_unary.slope", 1, 2),
    "coupling_back": ("coupling.unary_by_pairwise.slope", 1, 2),
}
#: Significant digits that are kept of a figure.
DIGITS = 5
#: Above this p a difference is called none that these seeds show. Divided by the number of the verdicts, it is what a
#: difference has to keep below to be called more than weak (Bonferroni).
LEVEL = 0.05
NONE_YET = "-"
#: Pixels along the longer side of the picture of maps.
WIDTH = 1600
#: What tells the runs of an ablation apart. All other settings are the same in all of them.
OF_A_RUN = ("variant", "temperature", "seed")


class Refused(Exception):
    """Results that cannot be kept; says why in one line."""


def row(name):
    """("dnl", 0.05) of "dnl@0.05", ("none", None) of "none"."""
    variant, _, temperature = name.partition("@")
    return variant, float(temperature) if temperature else None


def text(value, digits):
    """A number, never as -0.0."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


class Results:
    """The results of one recipe, for the template."""

    def __init__(self, path, tests=1):
        #: How many verdicts the page has.
        self.tests = tests
        #: What was trained, of these results or, before there are any, of the recipe of that name.
        recipe = RECIPES.get(path.stem)
        content = json.loads(path.read_text()) if path.is_file() else {"planned": 0, "runs": []}
        self.settings = content.get("settings") or (recipe.settings if recipe else {})
        self.images = self.settings.get("images", recipe.images if recipe else 0)
        self.planned = content.get("planned", content.get("runs_planned"))
        self.runs = {}
        for entry in content["runs"]:
            run = entry.get("run", entry)
            self.runs[Run(run["variant"], run["temperature"], run["seed"])] = entry
        self.groups = over_seeds(self.runs)
        self.done = len(self.runs)

    @property
    def progress(self):
        """How many trainings there are: "27 of 50 trainings"."""
        return f"{self.done} of {self.planned} trainings" if self.done else "no training"

    @property
    def seeds(self):
        """How many seeds the rows have: "5", or "1 to 2"."""
        counts = sorted({group["miou"][2] for group in self.groups.values()})
        return "none" if not counts else str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"

    def table(self):
        """The report's table."""
        return "\n".join(table(self.groups)) if self.runs else "*No training has finished yet.*"

    def value(self, name, figure):
        """Mean ± deviation over seeds of a row's figure."""
        key, factor, digits = FIGURES[figure]
        mean, deviation, _ = self.groups.get(row(name), {}).get(key, (math.nan, math.nan, 0))
        if math.isnan(mean):
            return NONE_YET
        shown = text(factor * mean, digits)
        return shown if math.isnan(deviation) else f"{shown} ± {text(factor * deviation, digits)}"

    def mean(self, figure):
        """Mean of a figure over all rows that have it, such as that of uniform attention."""
        key, factor, digits = FIGURES[figure]
        values = [group[key][0] for group in self.groups.values() if key in group]
        return text(factor * sum(values) / len(values), digits) if values else NONE_YET

    def versus(self, first, second, figure):
        """How much more of a figure the first row has than the second, and p of a paired t-test."""
        _, factor, digits = FIGURES[figure]
        found = difference(self.runs, row(first), row(second), FIGURES[figure][0])
        if math.isnan(found.mean):
            return NONE_YET
        shown = f"{round(factor * found.mean, digits) + 0.0:+.{digits}f}"
        if found.seeds == 1:
            return f"{shown} (one seed)"
        shown += f" ± {text(factor * found.deviation, digits)}"
        if math.isnan(found.p):
            return shown
        return f"{shown} (p {'< 0.001' if found.p < 0.001 else f'= {found.p:.2g}'}, {found.seeds} seeds)"

    def verdict(self, first, second, figure):
        """What the seeds say of the claim that the first row has more of a figure than the second."""
        found = difference(self.runs, row(first), row(second), FIGURES[figure][0])
        if math.isnan(found.mean):
            return NONE_YET
        if found.seeds < 3:
            return f"too few seeds ({found.seeds})"
        if math.isnan(found.p) or found.p >= LEVEL:
            return "not shown"
        weakly = "" if found.p < LEVEL / self.tests else "weakly"
        return (weakly or "yes") if found.mean > 0 else f"{weakly} the opposite".strip()

    def lifts(self, names, classes):
        """A table of the unary map's mass on each class, as a multiple of the class's share."""
        head = ["class", *names]
        lines = []
        for number, title in enumerate(classes):
            cells = []
            for name in names:
                mean, deviation, seeds = self.groups.get(row(name), {}).get(
                    f"unary.class.{number}.lift", (math.nan,) * 3
                )
                cells.append(
                    "-"
                    if math.isnan(mean)
                    else text(mean, 2)
                    if seeds < 2
                    else f"{text(mean, 2)} ± {text(deviation, 2)}"
                )
            lines.append([title, *cells])
        return "\n".join(markdown_lines(head, lines))

    def epochs(self, images):
        """Passes over that many training images."""
        return round(self.settings["steps"] * self.settings["batch_size"] / images)

    def size(self, stride=1):
        """The crop in pixels, or in tokens of ``stride`` pixels: "32 x 44"."""
        return " x ".join(str(side // stride) for side in self.settings["crop"])

    def hours(self):
        """Hours of training steps alone: median seconds of a step, else the others' mean, times the steps."""
        known = [e["steps"] * e["seconds_per_step"] for e in self.runs.values() if e["seconds_per_step"] is not None]
        return f"{len(self.runs) * sum(known) / max(1, len(known)) / 3600:.1f}"


def compare(recipes, *lines):
    """A table with a column for each recipe that has results.

    A line is (text, row, figure), or (text, row, other row, figure).
    """
    recipes = {name: results for name, results in recipes.items() if results.done}
    head = ["", *recipes]
    cells = []
    for title, *what in lines:
        cells.append([
            title,
            *(results.value(*what) if len(what) == 2 else results.versus(*what) for results in recipes.values()),
        ])  # fmt: skip
    return "\n".join(markdown_lines(head, cells))


def figure(name):
    """The figure of an ablation, where it has been kept."""
    return (
        f"![mIoU, regions, boundaries, degeneration](images/{name}.png)"
        if (DOCS / f"images/{name}.png").is_file()
        else ""
    )


def picture():
    """The maps of an ablation, where they have been kept."""
    if not (DOCS / "images/camvid-maps.png").is_file():
        return ""
    return (
        "The attention of the same two pixels of a test image in every row (seed 0), over grey in place of the "
        "photograph.\n\n![Maps of the same queries for all rows](images/camvid-maps.png)"
    )


def saturation(runs):
    """The table of short trainings from scratch."""
    head = ["learning rate", "T", "entropy of pairwise rows", "variance of logits", "own class, %", "uniform, %"]
    lines = []
    for run in runs:
        lines.append([
            f"{run['lr']:g}", f"{run['temperature']:g}", text(run["pairwise.entropy_share"], 2),
            f"{run['decomposition.variance']:,.1f}", text(100 * run["pairwise.own_class.mass"], 1),
            text(100 * run["pairwise.own_class.uniform"], 1),
        ])  # fmt: skip
    return "\n".join(markdown_lines(head, lines))


def namespace():
    """What the template's expressions can use."""
    from dnl_ext.segmentation.data.layouts import CAMVID_CLASSES

    tests = TEMPLATE.read_text(encoding="utf-8").count(".verdict(")
    frozen, trained = (Results(DOCS / f"results/{name}.json", tests) for name in ("camvid", "camvid_trained"))
    return {
        "frozen": frozen,
        "trained": trained,
        "tests": tests,
        "mosaics": Results(DOCS / "results/ablation-context.json"),
        "compare": functools.partial(compare, {"frozen features": frozen, "trained backbone": trained}),
        "classes": CAMVID_CLASSES,
        "figure": figure,
        "picture": picture,
        "scratch": json.loads((DOCS / "results/saturation.json").read_text())["runs"],
        "saturation": saturation,
    }


def render(template):
    """The page of a template."""
    names = namespace()
    return re.sub(
        r"\{\{ (.*?) \}\}", lambda match: str(eval(match[1], {"__builtins__": {}}, names)), template, flags=re.DOTALL
    )


def rounded(figures):
    return {name: float(f"{value:.{DIGITS}g}") for name, value in figures.items() if value is not None}


def load(path):
    """The content of a JSON file of results. Raises Refused."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("runs"), list):
        raise Refused(f"{path} holds no results of dnl-ext ablate")
    return content


def settings_of(entry):
    """Settings of a run of dnl-ext ablate that all runs of its recipe share."""
    return {key: value for key, value in entry["settings"].items() if key not in OF_A_RUN}


def check_settings(path, kept, new):
    """Raise Refused where settings differ. A setting that only one of them names has its default in the other."""
    defaults = dataclasses.asdict(TrainConfig())
    for key in sorted(kept.keys() | new.keys()):
        ours, theirs = (settings.get(key, defaults.get(key)) for settings in (kept, new))
        if ours != theirs:
            raise Refused(f"{path} was made with {key} {theirs}, what is kept with {ours}")


class Kept:
    """The results of one recipe as docs/results keeps them, to which those of further folders are added.

    Args:
        path: of the JSON file, which need not exist.

    Raises:
        Refused: the file is there and holds something else.
    """

    def __init__(self, path):
        self.path = path
        content = load(path) if path.is_file() else {"runs": []}
        if path.is_file() and "settings" not in content:
            raise Refused(f"{path} is not in the form that can be added to")
        #: Line of the file by run.
        self.runs = {Run(*(run[key] for key in OF_A_RUN)): run for run in content.pop("runs")}
        #: All else that the file says.
        self.head = content

    def add(self, path):
        """Add the runs of a results.json that are new. Returns how many there are. Raises Refused."""
        content = load(path)
        try:
            return self.add_runs(path, content)
        except (KeyError, TypeError, AttributeError):
            raise Refused(f"{path} holds no results of dnl-ext ablate") from None

    def add_runs(self, path, content):
        entries = content["runs"]
        if not self.head and entries:
            self.head = {
                "recipe": content["recipe"], "source": content["source"], "planned": 0,
                "settings": settings_of(entries[0]), "versions": entries[0]["versions"],
            }  # fmt: skip
        lines = {}
        for entry in entries:
            if content["recipe"] != self.head["recipe"]:
                raise Refused(f"{path} is of the recipe {content['recipe']}, what is kept of {self.head['recipe']}")
            check_settings(path, self.head["settings"], settings_of(entry))
            line = {
                **entry["run"], "miou": round(entry["miou"], 5), "steps": entry["settings"]["steps"],
                # None of a run that was stopped between its last step and its measurement.
                "seconds_per_step": entry["seconds_per_step"] and round(entry["seconds_per_step"], 3),
                "attention": rounded(entry["attention"]),
            }  # fmt: skip
            if entry["versions"] != self.head["versions"]:
                line["versions"] = entry["versions"]
            lines[Run(**entry["run"])] = line
        new = {run: line for run, line in lines.items() if run not in self.runs}
        self.runs |= new
        if self.head:
            self.head["planned"] = max(self.head["planned"], content["runs_planned"], len(self.runs))
        return len(new)

    def write(self):
        """Write the file, a line for each run, by seed."""
        runs = sorted(self.runs.items(), key=lambda item: (item[0].seed, item[0].name))
        lines = ",\n  ".join(json.dumps(line) for _, line in runs)
        body = json.dumps(self.head, indent=1)[:-2] + ',\n "runs": [\n  ' + lines + "\n ]\n}\n"
        self.path.write_text(body, encoding="utf-8")


def take(folders, docs=DOCS):
    """Add the results of ablations' folders to docs/results/NAME.json, and draw docs/images/NAME.png of all of them.

    Args:
        folders: {NAME: [folder of dnl-ext ablate --out, ...]}.
        docs: the folder that has results and images.

    Returns:
        A line for each folder, of what it added.

    Raises:
        Refused: results that cannot be read, or are of other settings than those that are kept. Nothing is written.
    """
    said, all_kept = [], {}
    for name, outs in folders.items():
        kept = all_kept[name] = Kept(docs / f"results/{name}.json")
        for out in outs:
            added = kept.add(out / "results.json")
            said.append(f"{name}: {len(kept.runs)} runs, {added} of them new from {out}")
    for name, kept in all_kept.items():
        if not kept.runs:
            continue
        kept.write()
        draw(docs / f"images/{name}.png", kept.runs, over_seeds(kept.runs))
        first = min(run.seed for run in kept.runs)
        for out in folders[name]:
            seeds = {entry["run"]["seed"] for entry in load(out / "results.json")["runs"]}
            if first in seeds and (out / "maps-0.png").is_file():  # the maps are of the folder's first seed
                keep_maps(out / "maps-0.png", docs / f"images/{name}-maps.png")
    return said


def keep_maps(path, target):
    """A picture of maps at modest size."""
    with Image.open(path) as picture:
        small = picture.convert("RGB")
        small.thumbnail((WIDTH, WIDTH))
        small.quantize(128).save(target, optimize=True)


def take_saturation(folder):
    """Keep what dnl-ext diagnose found of trainings that differ in learning rate and temperature."""
    runs = []
    for path in sorted(folder.glob("*/report/report.json")):
        (entry,) = json.loads(path.read_text())["networks"].values()
        config = checkpoint.load(path.parents[1] / "checkpoint.pt")["config"]
        names = ("pairwise.entropy_share", "decomposition.variance", "pairwise.own_class.mass",
                 "pairwise.own_class.uniform", "total.jsd")  # fmt: skip
        runs.append({
            "variant": config["variant"], "lr": config["lr"], "temperature": config["temperature"],
            "steps": entry["step"], "crop": config["crop"], "batch_size": config["batch_size"],
            "miou": round(entry["miou"], 4), **rounded({name: entry["summary"][name]["value"] for name in names}),
        })  # fmt: skip
    runs.sort(key=lambda run: (-run["lr"], run["temperature"]))
    (DOCS / "results/saturation.json").write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--take", nargs="+", default=[], metavar="NAME=OUT", help="add results of dnl-ext ablate")
    parser.add_argument("--write", action="store_true", help="write docs/experiment.md")
    parser.add_argument("--take-saturation", type=Path, metavar="DIR", help="keep DIR/*/report of dnl-ext diagnose")
    arguments = parser.parse_args()
    if arguments.take_saturation:
        take_saturation(arguments.take_saturation)
    folders = {}
    for entry in arguments.take:
        name, equals, out = entry.partition("=")
        if not (name and equals and out):
            parser.exit(2, f"--take: expected NAME=OUT, got {entry}\n")
        folders.setdefault(name, []).append(Path(out))
    try:
        for line in take(folders):
            print(line, file=sys.stderr)
    except Refused as error:
        parser.exit(2, f"{error}\n")
    page = render(TEMPLATE.read_text(encoding="utf-8"))
    if arguments.write:
        PAGE.write_text(page, encoding="utf-8")
    else:
        print(page, end="")


if __name__ == "__main__":
    main()
