"""Commands of prove.py and gpu_check.py, which must end in time."""

import os
import pathlib
import signal
import subprocess

ROOT = pathlib.Path(__file__).parents[1]


def run(command, seconds, **environment):
    """Exit status of a command, run in this folder with the checkout's dnl_ext, and its output.

    A command that does not end within `seconds` has status 124 and what it had written until then. It is stopped with
    all that it has started: what a sanitizer runs would otherwise keep the GPU.
    """
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT / "tests",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        status = process.returncode
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        status, output = 124, output + f"\nno end within {seconds:.0f} s".encode()
    return status, output.decode(errors="replace")
