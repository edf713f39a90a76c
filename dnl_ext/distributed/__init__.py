"""Attention over positions that are sharded across the processes of a torch.distributed group.

Each rank gives its own queries, keys, values and mask logits and gets the output of its own queries; attention is over
the keys of all ranks, and what a rank holds grows with its own shard. `docs/scaling.md` has the figures.

Functions: :func:`disentangled_attention`, :func:`pairwise_attention`, :func:`unary_attention`,
:func:`shared_key_logits`. Blocks: :func:`shard_positions`. DTensors need nothing from here: the functions of
:mod:`dnl_ext` take them, sharded over leading dimensions or over positions (`dtensor.py`).

Shards may differ in size and be empty. Results repeat bit for bit. Gradients are those of the sum of all ranks'
losses: a parameter that all ranks have, such as a convolution's weight, gets a rank's own share, to be added up over
the ranks.

Every rank must make the same calls in the same order, and must run the backward, also one whose own loss does not need
it (``(output * 0).sum()`` connects it). A rank that dies or never comes makes the others raise within the group's
time-out.
"""

from importlib import import_module

import torch.distributed as dist

if not dist.is_available():
    raise ImportError("dnl_ext.distributed needs a torch with torch.distributed; this one was built without")

from ..modules._sharding import register_sharding
from ..ops._handlers import register_handler
from ._shards import is_dtensor
from .blocks import shard_block, shard_positions
from .functions import disentangled_attention, pairwise_attention, shared_key_logits, unary_attention

__all__ = ["disentangled_attention", "pairwise_attention", "shard_positions", "shared_key_logits", "unary_attention"]

register_handler(is_dtensor, lambda: import_module(".dtensor", __name__))
register_sharding(shard_block)
