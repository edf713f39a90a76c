"""What tests compile once and keep in build/, while other tests run beside them."""

import filelock


def once(path, make):
    """`path`, made by `make()` where it is missing: by one process, while others that ask for it wait.

    A linker's output is there before it is whole, so that nobody looks without the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.parent / f".{path.name}.lock"):
        if not path.exists():
            make()
    return path
