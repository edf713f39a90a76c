"""Training a segmentation network with a non-local block, and looking at its attention.

The command line of :mod:`dnl_ext.cli` is built from this package; it needs the extra ``dnl_ext[cli]``. `network` and
`metrics` are what all of it is about, and each package imports from those before it alone:

- `data`: the built-in mosaics and the context task, and images and labels from folders of several layouts;
- `training`: the training loop, its settings and checkpoints, in one process or several;
- `looking`: attention maps of a trained network as pictures, and their diagnosis over a data set;
- `experiments`: the demonstration, the ablation, and the memory of a training step.
"""

from .errors import InputError, InputWarning, Interrupted
from .metrics import IGNORE, Confusion
from .network import VARIANTS, SegmentationNetwork, tokens

__all__ = [
    "IGNORE",
    "VARIANTS",
    "Confusion",
    "InputError",
    "InputWarning",
    "Interrupted",
    "SegmentationNetwork",
    "tokens",
]
