"""Progress of a training on the terminal: a bar with ETA, loss and mIoU; plain lines where there is no terminal."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from typing_extensions import Self

from .trainer import Listener


class TerminalProgress(Listener):
    """Shows the progress of :meth:`Trainer.run` on the terminal: a bar, or some lines where stdout is a file.

    It is a context, and a :class:`Listener`.

    Args:
        title: shown in front of the bar.
        first, steps: finished steps at the start, and steps in all.
        lines: about how many lines to print where stdout is no terminal.

    Example:
        >>> from dnl_ext.segmentation.training import TerminalProgress, TrainConfig, Trainer
        >>> trainer = Trainer(TrainConfig(steps=2, crop=(32, 32), batch_size=1, width=4, val_images=1))
        >>> with TerminalProgress("mine", trainer.step, trainer.config.steps, lines=1) as progress:
        ...     trainer.run(progress)  # doctest: +ELLIPSIS
        mine: step 2/2  loss ...  ... s/step  ETA 0 s
        mine: step 2/2  held-out mIoU ... %
    """

    def __init__(self, title: str, first: int, steps: int, lines: int = 20) -> None:
        self.console: Console = Console()
        self.title: str = title
        self.first: int = first
        self.steps: int = steps
        self.every: int = max(1, steps // lines)
        self.started: float = time.perf_counter()
        self.last_loss: float | None = None
        self.last_miou: float | None = None
        self.bar: Progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
            TextColumn("ETA"), TimeRemainingColumn(), console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task: TaskID = self.bar.add_task(title, total=steps, completed=first, note="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def _note(self, extra: str = "") -> str:
        loss = "" if self.last_loss is None else f"loss {self.last_loss:.3f}"
        miou = "" if self.last_miou is None else f"mIoU {100 * self.last_miou:.1f} %"
        return "  ".join(part for part in (loss, miou, extra) if part)

    def step(self, step: int, loss: float, rate: float, seconds: float) -> None:
        # Smoothed, so that one odd batch does not catch the eye.
        self.last_loss = loss if self.last_loss is None else 0.9 * self.last_loss + 0.1 * loss
        self.bar.update(self.task, completed=step, note=self._note())
        if not self.console.is_terminal and (step % self.every == 0 or step == self.steps):
            left = (time.perf_counter() - self.started) / (step - self.first) * (self.steps - step)
            pace = f"{seconds:.2f} s/step  ETA {left:.0f} s"
            self.print(f"{self.title}: step {step}/{self.steps}  {self._note()}  {pace}")

    def validation(self, step: int, done: int, total: int, miou: float | None) -> None:
        if miou is None and done < total:
            self.bar.update(self.task, note=self._note(f"validating {done}/{total}"))
        elif miou is not None:
            self.last_miou = miou
            self.bar.update(self.task, note=self._note())
            self.print(f"{self.title}: step {step}/{self.steps}  held-out mIoU {100 * miou:.1f} %")

    def encoding(self, done: int, total: int) -> None:
        self.bar.update(self.task, note=f"features {done}/{total}")
        if not self.console.is_terminal and (done % max(1, total // 10) == 0 or done == total):
            self.print(f"{self.title}: features of {done}/{total} images")

    def print(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
