"""What a mask adds to the logits of one map, a few rows at a time.

A mask of ``F.scaled_dot_product_attention`` is one of two things. One that is the same for all queries, such as the
padding of a batch, belongs to the keys: those that it forbids have no mass and are left out, and what it adds to the
others is a part of the unary logits (:func:`key_mask`). One that depends on the query, such as a causal mask or a
relative position bias, belongs to the pairs: it is added to the pairwise logits (:class:`PairMask`).
"""

from typing import NamedTuple, Protocol

import torch

#: Rows of a mask to look at once.
ROWS = 256


class PairMask(Protocol):
    """What is added to the logits of each pair of query and key; -inf where the query must not see the key."""

    def rows(self, queries: torch.Tensor) -> torch.Tensor:
        """Rows (n, Nk), float, of the queries with these numbers (n,)."""
        ...


class CausalMask:
    """Query i sees the keys 0 .. i, as ``is_causal=True`` has it also where there are fewer queries than keys.

    Args:
        keys: their number. like: a tensor of the device and float type of the rows.
    """

    def __init__(self, keys: int, like: torch.Tensor) -> None:
        self.numbers: torch.Tensor = torch.arange(keys, device=like.device)
        self.allowed: torch.Tensor = like.new_zeros(())
        self.forbidden: torch.Tensor = like.new_full((), -torch.inf)

    def rows(self, queries: torch.Tensor) -> torch.Tensor:
        """See :class:`PairMask`."""
        seen = self.numbers <= queries.to(self.numbers.device)[:, None]
        return torch.where(seen, self.allowed, self.forbidden)


class TensorMask:
    """The ``attn_mask`` (Nq, keys) of a call, without the keys that no query sees.

    Args:
        mask: bool, True where a query sees a key, or float, which is added.

    Attributes:
        kept: numbers of the keys that any query sees, int64 tensor (Nk,).
    """

    def __init__(self, mask: torch.Tensor) -> None:
        self.mask = mask
        seen = torch.zeros(mask.shape[1], dtype=torch.bool, device=mask.device)
        for part in mask.split(ROWS):
            seen |= (additive(part) > -torch.inf).any(0)
        self.kept: torch.Tensor = seen.nonzero()[:, 0]

    def rows(self, queries: torch.Tensor) -> torch.Tensor:
        """See :class:`PairMask`."""
        return additive(self.mask[queries.to(self.mask.device)][:, self.kept])


def additive(mask: torch.Tensor) -> torch.Tensor:
    """A bool or float mask as float32 or wider, -inf where it forbids.

    Many models forbid by the least finite number of a type, or nearly that. Half of it is below anything that a softmax
    can tell from -inf.
    """
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
    forbidden = mask <= torch.finfo(mask.dtype).min / 2
    return mask.to(torch.promote_types(mask.dtype, torch.float32)).masked_fill(forbidden, -torch.inf)


def depends_on_query(mask: torch.Tensor) -> bool:
    """Whether the rows of a mask (Nq, Nk) differ."""
    if mask.shape[0] < 2 or mask.stride(0) == 0:
        return False
    return any(bool((part != mask[:1]).any()) for part in mask.split(ROWS))


class KeyMask(NamedTuple):
    """A mask that all queries share.

    Attributes:
        kept: numbers of the keys that may be seen, int64 tensor (n,).
        bias: what is added to their logits, tensor (n,); None where that is nothing.
    """

    kept: torch.Tensor
    bias: torch.Tensor | None


def key_mask(row: torch.Tensor) -> KeyMask:
    """The :class:`KeyMask` of a mask's row (Nk,)."""
    added = additive(row)
    (kept,) = (added > -torch.inf).nonzero(as_tuple=True)
    added = added[kept]
    return KeyMask(kept, added if bool((added != 0).any()) else None)


def queries_with_keys(mask: PairMask, queries: int, device: torch.device) -> torch.Tensor:
    """Which of ``queries`` queries see any key, bool tensor (queries,); a softmax over nothing is no map."""
    parts = torch.arange(queries, device=device).split(ROWS)
    return torch.cat([(mask.rows(part) > -torch.inf).any(1) for part in parts])
