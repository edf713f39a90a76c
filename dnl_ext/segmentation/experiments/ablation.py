"""The talk's experiment: one block, its terms alone, multiplied and added, each trained several times and measured.

Every run has a folder of its own below ``out``: its checkpoint while it trains, and ``result.json`` when it is done. A
run with a result is not run again; one with a checkpoint goes on from there. So a stopped ablation continues where it
was, and the same command with more seeds adds to it. The tables are written anew after every run.
"""

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ..._version import __version__
from ...analysis import AttentionProbe
from ..data.context import PretextData
from ..errors import InputError
from ..training import checkpoint
from ..training.config import FREE, TrainConfig
from ..training.trainer import CHECKPOINT, FEATURES, Data, Listener, Trainer, open_data
from .recipes import RECIPES, VARIANT_NAMES, Recipe
from .runs import Run, plan
from .samples import ValidationSamples
from .unary_detail import unary_detail

#: Takes a title, the first step and the number of steps; gives a context in which a Listener listens.
ListenerFactory: TypeAlias = Callable[[str, int, int], AbstractContextManager[Listener]]

RESULT = "result.json"
#: Queries per image whose rows are measured.
QUERIES = 256
#: Learning rate of the encoder's own training.
PRETEXT_LR = 4e-3


class Ablation:
    """Variants of the block, each trained at several temperatures and with several seeds, and measured.

    Every run has a folder of its own below ``out``. What is finished there is not trained again, and what was stopped
    is continued.

    Args:
        out: folder of all runs.
        recipe: a key of ``RECIPES``.
        overrides: settings of :class:`~dnl_ext.segmentation.training.TrainConfig` in place of the recipe's.
        variants, temperatures, seeds: what to train; None is what the recipe has.
        pretext: steps of the encoder's own training, in place of the recipe's.
        images: validation images that the attention is measured on, in place of the recipe's.

    Attributes:
        runs: list of every :class:`Run`.
        results: dict of the results so far, by run.

    Raises:
        InputError: settings that cannot be used, or a folder that cannot be written.

    Example:
        >>> from dnl_ext.segmentation.experiments import Ablation
        >>> tiny = {"steps": 1, "crop": (64, 64), "batch_size": 1, "width": 4, "val_images": 1}
        >>> ablation = Ablation("runs", overrides=tiny, variants=["dnl"], temperatures=[0.05], seeds=[0], pretext=0)
        >>> results = ablation.run()
        >>> [run.name for run in results]
        ['dnl-T0.05-seed0']
    """

    def __init__(
        self,
        out: str | Path,
        recipe: str = "context",
        overrides: dict[str, Any] | None = None,
        variants: Sequence[str] | None = None,
        temperatures: Sequence[float] | None = None,
        seeds: Sequence[int] = (0, 1, 2),
        pretext: int | None = None,
        images: int | None = None,
    ) -> None:
        if recipe not in RECIPES:
            raise InputError(f"--recipe must be one of {', '.join(RECIPES)}, got {recipe}")
        self.out: Path = Path(out)
        self.recipe_name: str = recipe
        self.recipe: Recipe = RECIPES[recipe]
        settings = {**self.recipe.settings, "layout": self.recipe.layout, **(overrides or {})}
        self.base: TrainConfig = TrainConfig(**settings)
        if self.base.freeze_backbone and self.base.feature_cache is None:
            self.base.feature_cache = str(self.out / FEATURES)
        if self.recipe.layout is not None and self.base.data is None:
            raise InputError(f"--recipe {recipe} needs --data DIR in the {self.recipe.layout} layout")
        if self.recipe.layout is None and self.base.data is not None:
            named = ", ".join(name for name, entry in RECIPES.items() if entry.layout)
            raise InputError(f"--data DIR needs a --recipe of its own: {named}")
        for variant in variants or ():
            if variant not in VARIANT_NAMES:
                raise InputError(f"--variants must be among {', '.join(VARIANT_NAMES)}, got {variant}")
        for temperature in temperatures or ():
            if not 0 < temperature < math.inf:
                raise InputError(f"--temperatures must be numbers above 0, got {temperature:g}")
        for seed in seeds:
            if seed < 0:
                raise InputError(f"--seeds must not be negative, got {seed}")
        self.runs: list[Run] = plan(self.recipe.choose(variants, temperatures), seeds)
        if not self.runs:
            raise InputError("--seeds: expected at least one")
        self.pretext: int = self.recipe.pretext if pretext is None else pretext
        self.images: int = self.recipe.images if images is None else images
        self.results: dict[Run, dict[str, Any]] = {}
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write to {self.out}: {error.strerror}") from None

    @functools.cached_property
    def data(self) -> Data:
        """The data set of all runs, opened when it is first asked for. Raises InputError where it cannot be."""
        return open_data(self.base, self.recipe.split)

    def config(self, run: Run) -> TrainConfig:
        """Settings of a run, a :class:`~dnl_ext.segmentation.training.TrainConfig`."""
        return dataclasses.replace(self.base, variant=run.variant, temperature=run.temperature, seed=run.seed)

    def run(
        self, listener: ListenerFactory | None = None, on_result: Callable[[Run, dict[str, Any]], object] | None = None
    ) -> dict[Run, dict[str, Any]]:
        """Train and measure what has no result yet.

        Args:
            listener: ``listener(title, first step, steps)`` is a context that gives a
                :class:`~dnl_ext.segmentation.training.Listener`.
            on_result: called as ``on_result(run, result)`` for every run, also for those found done.

        Returns:
            dict of results by :class:`Run`, each with "miou", "attention", "seconds_per_step", "settings", "versions".

        Raises:
            InputError: the folder has runs of other settings.
            Interrupted: Ctrl-C or SIGTERM. The run that was training is saved.
        """
        listener = listener or quiet
        data = self.data
        for run in self.runs:  # found results first: another setting in one of them is an error before any training
            found = self.read(run)
            if found is not None:
                self.results[run] = found
        for number, run in enumerate(self.runs, 1):
            if run not in self.results:
                trainer = self.train(run, f"[{number}/{len(self.runs)}] {run.name}", data, listener)
                self.results[run] = self.measure(run, trainer)
                write_json(self.out / run.name / RESULT, self.results[run])
            if on_result is not None:
                on_result(run, self.results[run])
        return self.results

    def fingerprint(self, config: TrainConfig) -> dict[str, Any]:
        """What must be equal for a result to be reused: the run's settings, the pretext steps, the images measured."""
        settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in FREE}
        settings |= {"crop": list(config.crop), "pretext": self.pretext, "images": self.images}
        return settings

    def read(self, run: Run) -> dict[str, Any] | None:
        """A run's result where it is done, else None. Raises InputError where the file is of other settings."""
        path = self.out / run.name / RESULT
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text())
            settings = found["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{path} is no result of dnl-ext ablate: remove it to run again") from None
        wanted = self.fingerprint(self.config(run))
        defaults = dataclasses.asdict(TrainConfig())  # of settings that an older result does not name
        settings = {name: value for name, value in defaults.items() if name in wanted} | settings
        for key in sorted(wanted.keys() | settings.keys()):
            if wanted.get(key) != settings.get(key):
                raise InputError(
                    f"{path} was made with {key} {settings.get(key)}, not {wanted.get(key)}: choose another --out"
                )
        return found

    def trainer(self, config: TrainConfig, folder: Path, data: Data) -> Trainer:
        """A trainer in a folder, which continues from the checkpoint of the same settings that lies there, if any."""
        path = folder / CHECKPOINT
        state = checkpoint.load(path) if path.is_file() else None
        if state is not None:
            wanted = self.fingerprint(config)
            saved = self.fingerprint(TrainConfig(**state["config"]))
            different = sorted(key for key in wanted if wanted[key] != saved[key])
            if different:
                key = different[0]
                raise InputError(f"{path} was made with {key} {saved[key]}, not {wanted[key]}: choose another --out")
        return Trainer(config, folder, state=state, state_path=path, data=data)

    def encoder(self, seed: int, listener: ListenerFactory) -> dict[str, torch.Tensor] | None:
        """Weights of the encoder that all runs of a seed begin with, trained first; None where they begin untrained."""
        if not self.pretext:
            return None
        config = dataclasses.replace(
            self.base, variant="none", temperature=None, seed=seed, steps=self.pretext, lr=PRETEXT_LR
        )
        data = PretextData(self.base.crop, 8)
        trainer = self.trainer(config, self.out / f"encoder-seed{seed}", data)
        if trainer.step < config.steps or trainer.miou is None:
            with listener(f"encoder, seed {seed}", trainer.step, config.steps) as progress:
                trainer.run(progress)
        return trainer.network.encoder.state_dict()

    def train(self, run: Run, title: str, data: Data, listener: ListenerFactory) -> Trainer:
        """Train a run to its end; returns its trainer."""
        weights = self.encoder(run.seed, listener)
        trainer = self.trainer(self.config(run), self.out / run.name, data)
        if weights is not None and trainer.step == 0:
            trainer.network.encoder.load_state_dict(weights)
        with listener(title, trainer.step, trainer.config.steps) as progress:
            trainer.run(progress)
        return trainer

    def measure(self, run: Run, trainer: Trainer) -> dict[str, Any]:
        """A run's result: mIoU, and the attention's figures over validation images."""
        figures = {}
        if trainer.network.block is not None:
            with AttentionProbe(trainer.network, QUERIES, seed=0) as probe:
                probe.run(ValidationSamples(trainer, self.images), forward=trainer.evaluate, progress=False)
            figures = {name: figure.value for name, figure in probe.blocks["block"].summary().items()}
            figures |= unary_detail(trainer, self.images)
        return {
            "run": dataclasses.asdict(run),
            "settings": self.fingerprint(self.config(run)),
            "miou": trainer.miou,
            "seconds_per_step": trainer.seconds_per_step(),
            "attention": figures,
            "versions": {"dnl_ext": __version__, "torch": torch.__version__},
        }


def quiet(*_: object) -> AbstractContextManager[Listener]:
    """A listener that says nothing."""
    return contextlib.nullcontext(Listener())


def write_json(path: Path, content: object) -> None:
    """Write a whole file or none."""
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
