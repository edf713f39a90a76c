"""Blocks of the attention map, for operators made of torch's products: memory stays linear in Nq and Nk."""

from collections.abc import Iterator

#: Numbers in a block of the map, by type of device: 2 MB in float32 on a CPU; it takes more to fill a GPU.
BLOCK = {"cpu": 2**19, "cuda": 2**24}
#: Of accelerators that nobody has measured.
OTHER_BLOCK = 2**22


def blocks(batches: int, queries: int, keys: int, device: str) -> Iterator[tuple[slice, slice]]:
    """Slices of batches and of queries that cover the map, each of at most a block of numbers or one row.

    All blocks of some batch elements come one after another, and have equal slices of batches.
    """
    rows = max(1, BLOCK.get(device, OTHER_BLOCK) // keys)
    step = max(1, rows // max(1, queries))
    for batch in range(0, batches, step):
        for first in range(0, queries, rows):
            yield slice(batch, batch + step), slice(first, first + rows)
