"""The CSV log of a training: one row per step, and one with the mIoU per validation."""

import csv
import os
from pathlib import Path

COLUMNS: tuple[str, ...] = ("step", "epoch", "lr", "loss", "seconds", "miou")


class CsvLog:
    """A table of steps in a CSV file, with the columns step, epoch, lr, loss, seconds and miou.

    A row is on disk when :meth:`write` returns.

    Args:
        path: the file. Rows of steps after ``last_step`` are removed first, so that a resumed run leaves no row twice.
        last_step: the last step whose row is kept; 0 starts an empty log.

    Example:
        >>> from dnl_ext.segmentation.training import CsvLog
        >>> log = CsvLog("log.csv")
        >>> log.write(step=1, loss=0.7)
        >>> print(open("log.csv").read(), end="")
        step,epoch,lr,loss,seconds,miou
        1,,,0.7,,
    """

    def __init__(self, path: str | Path, last_step: int = 0) -> None:
        self.path: Path = Path(path)
        rows = []
        if last_step and self.path.is_file():
            with open(self.path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if (row["step"] or "").isdigit()]
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(row for row in rows if int(row["step"]) <= last_step)
        os.replace(temporary, self.path)

    def write(self, **values: object) -> None:
        """Append one row; columns not given stay empty."""
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(values)
