"""What the training tools report: an unusable file or option, a file read in an unexpected way, an interruption."""

from pathlib import Path


class InputError(Exception):
    """A file, folder or option that cannot be used. The message is one line and names the thing and the remedy.

    Example:
        >>> from dnl_ext.segmentation.data import find_layout
        >>> find_layout("nowhere")
        Traceback (most recent call last):
        dnl_ext.segmentation.errors.InputError: data folder nowhere does not exist
    """


def described(error: BaseException) -> str:
    """An exception of other code on one line, with its kind: some say hardly more than a number.

    Example:
        >>> from dnl_ext.segmentation.errors import described
        >>> described(KeyError(101))
        'KeyError: 101'
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class InputWarning(UserWarning):
    """A file is read in another way than its user may expect, such as with fewer bits than it stores.

    Attributes:
        what: names the kind of surprise, which is the same text for all files to which that happens; None where the
            warning is not of one file. Of each kind the command line prints the first warning alone.

    Example:
        >>> import numpy, warnings
        >>> from PIL import Image
        >>> from dnl_ext.segmentation.data import read_image
        >>> Image.fromarray(numpy.full((2, 2), 40_000, dtype=numpy.uint16)).save("deep.png")
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     pixels = read_image("deep.png")
        >>> print(caught[0].message)
        image deep.png: its grey values 0 .. 65535 are scaled to 0 .. 1
    """

    def __init__(self, message: str, what: str | None = None) -> None:
        super().__init__(message, what)
        self.what: str | None = what

    def __str__(self) -> str:
        return self.args[0]


class Interrupted(Exception):
    """Training was asked to stop by Ctrl-C or SIGTERM, and has saved its state where it has a folder for it.

    Attributes:
        signum: number of the signal; the process should exit with 128 + signum.
        checkpoint: path of the saved state, None where the trainer has no folder.
        step: number of finished steps in it.

    Example:
        >>> import signal
        >>> from dnl_ext.segmentation import Interrupted
        >>> from dnl_ext.segmentation.training import Listener, TrainConfig, Trainer
        >>> class StopAtOnce(Listener):
        ...     def step(self, step, loss, rate, seconds):
        ...         signal.raise_signal(signal.SIGTERM)
        >>> trainer = Trainer(TrainConfig(steps=9, crop=(32, 32), batch_size=1, width=4, val_images=1), "run")
        >>> try:
        ...     trainer.run(StopAtOnce())
        ... except Interrupted as stop:
        ...     print(stop, "in", stop.checkpoint.name)
        stopped by signal 15 after step 1 in checkpoint.pt
    """

    def __init__(self, signum: int, checkpoint: Path | None, step: int) -> None:
        super().__init__(f"stopped by signal {signum} after step {step}")
        self.signum: int = signum
        self.checkpoint: Path | None = checkpoint
        self.step: int = step
