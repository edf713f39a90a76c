"""Machine code written by hand, for tests of the model of a multiprocessor."""

from cuda_model import interpret, sass

WAIT = "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R0], R2"


def high(stall=1, stay=True, write=7, read=7, wait=0):
    """The upper half of an instruction's word, of its control code alone."""
    return stall << 41 | int(stay) << 45 | write << 46 | read << 49 | wait << 52


def program(*lines):
    """Code of lines of text, or of (text, control)."""
    code = []
    for i, line in enumerate(lines):
        text, control = line if isinstance(line, tuple) else (line, {})
        code.append(sass.decode(16 * i, text, high(**control)))
    return code


def traced(code, parameters=b"", threads=32):
    """What each warp of a block of the code passes."""
    launch = interpret.Launch(1, threads, 0, parameters)
    return interpret.trace(interpret.Program(code, "8.0"), launch)
