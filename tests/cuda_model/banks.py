"""Wavefronts of an access to shared memory, and sectors of one to global memory, from the addresses of lanes.

Shared memory has 32 banks of 4 bytes. What a wavefront serves lies in different banks or in the same word. Accesses of
8 and 16 bytes go by halves and quarters of a warp, `ldmatrix` by its 8 x 8 matrices: eight rows of 16 bytes.

Addresses and masks are (warps, 32); results one count per warp.
"""

import numpy as np

SECTOR, BANKS, WORD = 32, 32, 4


def conflicts(words):
    """Most different words in one bank, per row."""
    words = np.sort(words, axis=1)
    new = np.ones(words.shape, bool)
    new[:, 1:] = words[:, 1:] != words[:, :-1]
    counts = np.zeros((len(words), BANKS), int)
    rows = np.broadcast_to(np.arange(len(words))[:, None], words.shape)
    np.add.at(counts, (rows[new], words[new] % BANKS), 1)
    return counts.max(axis=1)


def _of_active(values, mask):
    """Inactive lanes repeat the first active one, which costs nothing."""
    first = np.take_along_axis(values, mask.argmax(axis=1)[:, None], axis=1)
    return np.where(mask, values, first)


def shared(addresses, width, mask):
    """Wavefronts of a load or store of `width` bytes a lane."""
    warps = len(addresses)
    steps = np.arange(max(1, width // WORD))
    per_group = min(32, 32 * WORD // width) if width > WORD else 32
    groups = addresses.reshape(warps * 32 // per_group, per_group)
    active = mask.reshape(groups.shape)
    words = _of_active(groups, active)[:, :, None] // WORD + steps
    counts = conflicts(words.reshape(len(groups), -1)) * active.any(axis=1)
    return np.maximum(1, counts.reshape(warps, -1).sum(axis=1))


def matrix(addresses, matrices):
    """Wavefronts of an ldmatrix or stmatrix of 1, 2 or 4 matrices."""
    warps = len(addresses)
    rows = addresses[:, : 8 * matrices].reshape(warps * matrices, 8)
    words = rows[:, :, None] // WORD + np.arange(4)
    return conflicts(words.reshape(len(rows), -1)).reshape(warps, matrices).sum(axis=1)


def sectors(addresses, width, mask):
    """Sectors of 32 bytes that the lanes touch."""
    steps = np.arange(0, max(width, SECTOR), SECTOR)
    touched = (_of_active(addresses, mask)[:, :, None] + steps) // SECTOR
    touched = np.sort(touched.reshape(len(addresses), -1), axis=1)
    return (1 + (touched[:, 1:] != touched[:, :-1]).sum(axis=1)) * mask.any(axis=1)
