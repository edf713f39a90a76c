"""What the training tools say of the user's files and options: an error, a warning, each of one line; and stopping."""

from pathlib import Path


class InputError(Exception):
    """A file, folder or option that cannot be used. The message is one line and names the thing and the remedy."""


class InputWarning(UserWarning):
    """A file is read otherwise than it might be expected. ``what`` is the same for all files to which that happens."""

    def __init__(self, message: str, what: str) -> None:
        super().__init__(message, what)
        self.what = what

    def __str__(self) -> str:
        return self.args[0]


class Interrupted(Exception):
    """Training was asked to stop by a signal and has saved its state.

    Attributes:
        signum: number of the signal; the process should exit with 128 + signum.
        checkpoint: path of the saved state.
        step: number of finished steps in it.
    """

    def __init__(self, signum: int, checkpoint: Path | None, step: int) -> None:
        super().__init__(f"stopped by signal {signum} after step {step}")
        self.signum: int = signum
        self.checkpoint: Path | None = checkpoint
        self.step: int = step
