"""Small inputs of every operator, in order, for tests of what torch does with them."""

import torch
from cases import ARGUMENTS

import dnl_ext

LAYOUTS = ("contiguous", "channel_first", "sliced")


def lay_out(x, layout):
    if layout == "channel_first" and x.dim() > 1:
        return x.transpose(-2, -1).contiguous().transpose(-2, -1)
    if layout == "sliced":
        larger = torch.full([n + 3 for n in x.shape], torch.nan, dtype=x.dtype)
        view = larger[tuple(slice(1, n + 1) for n in x.shape)]
        return view.copy_(x)
    return x.contiguous()


def make(op, lead=(2,), nq=4, nk=5, dqk=3, dv=2, dtype=torch.float64, layout="contiguous", seed=0):
    """Inputs of an op, in order."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "query": (nq, dqk),
        "key": (nk, dqk),
        "value": (nk, dv),
        "mask_logits": (nk,),
        "x": (nq, dqk),
    }
    inputs = (torch.randn(*lead, *shapes[name], generator=generator, dtype=torch.float64) for name in ARGUMENTS[op])
    return [lay_out(x.to(dtype), layout) for x in inputs]


def function(op, ops=dnl_ext):
    return getattr(ops, op)
