"""Every call of the library, valid, as a function and its arguments by name: what tests of wrong calls change.

There are two routes to an operator: the public functions, and torch.ops.dnl_ext.*.
"""

import warnings

import pytest
import torch
from cases import ARGUMENTS

import dnl_ext

B, NQ, NK, DQK, DV = 2, 5, 7, 3, 4
raw = torch.ops.dnl_ext


def attention_inputs(dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = {"query": (B, NQ, DQK), "key": (B, NK, DQK), "value": (B, NK, DV), "mask_logits": (B, NK)}
    return {name: torch.randn(s, generator=generator, dtype=dtype).to(device) for name, s in shapes.items()}


def public_calls(device="cpu"):
    inputs = attention_inputs(device=device)
    pick = {name: {key: inputs[key] for key in names} for name, names in ARGUMENTS.items() if names != ("x",)}
    return {**pick, "mean_subtract": {"x": inputs["query"]}, "whiten": {"x": inputs["query"], "name": "ln"}}


def raw_calls(device="cpu"):
    inputs = attention_inputs(device=device)
    q, _, v, m = inputs.values()

    def new(*shape):
        return torch.zeros(shape, device=device)

    saved = {"output": new(B, NQ, DV), "softmax_stats": new(B, NQ, 2), "residual": new(B, 0)}
    needs = dict.fromkeys(("need_query", "need_key", "need_value", "need_mask"), True)
    return {
        "mean_subtract": {"x": q, "dim": -2},
        "whiten_forward": {"x": q, "name": "ln", "apart": 0, "eps": 1e-5},
        "whiten_backward": {
            "grad_output": q, "output": q.clone(), "rstd": new(B), "name": "ln", "apart": 0, "eps": 1e-5,
        },
        "softmax": {"x": m},
        "softmax_backward": {"grad_output": m, "output": m.clone()},
        "unary_forward": {"mask_logits": m, "value": v},
        "unary_backward": {
            "grad_pooled": new(B, DV), "mask_logits": m, "value": v, "pooled": new(B, DV), "lse": new(B),
            "need_mask": True, "need_value": True,
        },
        "pairwise_forward": {**inputs, "scale": 0.5, "whiten": "channel", "save_residual": False},
        "pairwise_backward": {
            "grad_output": new(B, NQ, DV), **inputs, **saved, "pooled": new(B, DV), "mask_lse": new(B),
            "scale": 0.5, "whiten": "channel", **needs,
        },
    }  # fmt: skip


def call(route, name, arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if route == "raw":
            return getattr(raw, name)(*arguments.values())
        positional = [arguments[n] for n in ARGUMENTS[name]]
        return getattr(dnl_ext, name)(*positional, **{n: x for n, x in arguments.items() if n not in ARGUMENTS[name]})


CALLS = {"public": public_calls, "raw": raw_calls}
EVERY_CALL = [(route, name) for route, calls in CALLS.items() for name in calls()]
EVERY_TENSOR = [
    (route, name, argument)
    for route, calls in CALLS.items()
    for name, arguments in calls().items()
    for argument, x in arguments.items()
    if isinstance(x, torch.Tensor)
]
# At least two tensors that must agree.
SEVERAL = [
    entry
    for entry in EVERY_TENSOR
    if sum(isinstance(x, torch.Tensor) for x in CALLS[entry[0]]()[entry[1]].values()) > 1
]
tensors = pytest.mark.parametrize(("route", "name", "argument"), EVERY_TENSOR)
several = pytest.mark.parametrize(("route", "name", "argument"), SEVERAL)


def expect(error, route, name, arguments, *, match=None):
    with pytest.raises(error, match=match) as info:
        call(route, name, arguments)
    return info.value


def with_fault(route, name, argument, fault, device="cpu"):
    arguments = CALLS[route](device)[name]
    return {**arguments, argument: fault(arguments[argument])}


def says(argument):
    """What was wanted and what came, of this argument."""
    return rf"^{argument}: expected .*, got "
