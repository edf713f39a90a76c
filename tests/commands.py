"""Commands of prove.py and gpu_check.py, which must end in time."""

import os
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).parents[1]


def run(command, seconds, **environment):
    """Exit status of a command, run in this folder with the checkout's dnl_ext, and its output.

    A command that does not end within `seconds` has status 124 and what it had written until then.
    """
    try:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT / "tests",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        status, output = 124, (error.stdout or b"") + f"\nno end within {seconds:.0f} s".encode()
    return status, output.decode(errors="replace")
