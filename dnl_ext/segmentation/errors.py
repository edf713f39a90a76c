"""The one exception of the training tools that is the user's to fix: a message of one line, exit code 2."""

from pathlib import Path


class InputError(Exception):
    """A file, folder or option that cannot be used. The message is one line and names the thing and the remedy."""


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
