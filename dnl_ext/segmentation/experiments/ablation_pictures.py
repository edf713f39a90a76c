"""Pictures of an ablation: where the same queries look in every row."""

from pathlib import Path

from ..looking.diagnosis import draw
from ..training.trained import restore
from ..training.trainer import CHECKPOINT
from .ablation import Ablation
from .ablation_report import row_name


def draw_pictures(ablation: Ablation, count: int = 2, photographs: bool = True) -> list[Path]:
    """Draw where a few pixels look, in all rows that have a block and whose first seed is trained.

    Args:
        ablation: an :class:`Ablation`.
        count: validation images, evenly spread; a picture each.
        photographs: draw the maps over the photograph, otherwise over the outlines of what the first row predicts.

    Returns:
        Paths of the pictures in the ablation's folder, ``maps-0.png``, ``maps-1.png``, ...; none where nothing is
        trained.

    Raises:
        InputError: a file cannot be written, or a checkpoint not be read.

    Example:
        >>> from dnl_ext.segmentation.experiments import Ablation, draw_pictures
        >>> tiny = {"steps": 1, "crop": (64, 64), "batch_size": 1, "width": 4, "val_images": 1}
        >>> ablation = Ablation("runs", overrides=tiny, variants=["dnl"], temperatures=[0.05], seeds=[0], pretext=0)
        >>> _ = ablation.run()
        >>> [path.name for path in draw_pictures(ablation)]
        ['maps-0.png']
    """
    first = ablation.runs[0].seed
    networks = {
        row_name(run.row): restore(ablation.out / run.name / CHECKPOINT)
        for run in ablation.runs
        if run.seed == first and run.variant != "none" and run in ablation.results
    }
    if not networks:
        return []
    size = ablation.data.validation_size
    numbers = [number * size // min(count, size) for number in range(min(count, size))]
    return [
        ablation.out / draw(ablation.out, networks, ablation.data, number, f"maps-{place}.png", photographs)
        for place, number in enumerate(numbers)
    ]
