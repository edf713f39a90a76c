"""The formulas of every operator, output and gradients, written out for torch tensors and numpy arrays alike.

r(x, kind) is called on every intermediate that an implementation must round: "sum" is kept in the accumulate type,
"operand" is multiplied again and may be kept in the tensors' own dtype, "result" is written in it, "factor" enters a
product, which in TF32 rounds it.
"""

import math

import numpy as np
import torch


def exact(x, kind):
    return x


def _library(x):
    return torch if isinstance(x, torch.Tensor) else np


def _sum(x, axis=-1):
    return x.sum(axis=axis, keepdims=True)


def _mean(x, axis=-2):
    return x.mean(axis=axis, keepdims=True)


def _product(x, y, r):
    return r(x, "factor") @ r(y, "factor")


def _softmax(x, r, kind):
    """Probabilities, divided by their sum as rounded, as every implementation can."""
    library = _library(x)
    p = r(library.exp(r(x - library.amax(x, axis=-1, keepdims=True), "sum")), kind)
    return p / _sum(p)


def _softmax_gradient(p, dp, r, kind):
    return r(p * (dp - r(_sum(p * dp), "sum")), kind)


#: Axes of the mean of every whitening; those of DEVIATION are divided by one.
WHITEN_AXES = {
    "channel": (-2,), "in_nostd": (-2,), "in": (-2,), "spatial": (-1,), "ln_nostd": (-2, -1), "ln": (-2, -1),
    "fln_nostd": None, "fln": None,
}  # fmt: skip
DEVIATION = ("in", "ln", "fln")


def _moments(x, whiten, r):
    """Axes, number of elements that share a mean, and 1 / deviation or None."""
    axes = WHITEN_AXES[whiten] or tuple(range(-len(x.shape), 0))
    count = math.prod(x.shape[axis] for axis in axes)
    if whiten not in DEVIATION:
        return axes, count, None
    variance = r(_sum((x - _mean(x, axes)) ** 2, axes) / (count - 1), "sum")
    return axes, count, r((variance + 1e-5) ** -0.5, "sum")


def _centred(x, whiten, r, kind="sum"):
    if whiten is None:
        return x
    axes, _, rstd = _moments(x, whiten, r)
    # "channel" happens inside the operators, in the accumulate type; the others make a tensor of the inputs' dtype.
    kind = kind if whiten == "channel" else "result"
    centred = x - r(_mean(x, axes), "sum")
    return r(centred if rstd is None else centred * rstd, kind)


def _centred_gradient(x, dy, whiten, r):
    """From dy of _centred(x) to dx."""
    axes, count, rstd = _moments(x, whiten, r)
    dx = dy - r(_mean(dy, axes), "sum")
    if rstd is None:
        return dx
    y = _centred(x, whiten, r)
    return (dx - y * r(_sum(dy * y, axes) / (count - 1), "sum")) * rstd


def _scale(query, scale):
    return 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale


def _logits(query, key, scale, whiten, r):
    """q', k' and S."""
    q, k = _centred(query, whiten, r), _centred(key, whiten, r)
    return q, k, r(_scale(query, scale) * _product(q, k.swapaxes(-1, -2), r), "sum")


def _logit_gradients(ds, query, key, q, k, scale, whiten, r):
    dq, dk = _product(ds, k, r), _product(ds.swapaxes(-1, -2), q, r)
    if whiten == "channel":
        dq = r(dq, "sum") - r(_mean(dq), "sum")
    elif whiten is not None:
        dq = _centred_gradient(query, r(dq, "result"), whiten, r)
        dk = _centred_gradient(key, r(dk, "result"), whiten, r)
    return r(scale * dq, "result"), r(scale * dk, "result")


def mean_subtract_steps(x, *, grad, dim=-2, r=exact):
    return (
        r(x - r(_mean(x, dim), "sum"), "result"),
        {"x": r(grad - r(_mean(grad, dim), "sum"), "result")},
    )


def whiten_steps(x, *, grad, name="channel", r=exact):
    return _centred(x, name, r, "result"), {"x": r(_centred_gradient(x, grad, name, r), "result")}


def unary_softmax_steps(mask_logits, *, grad, r=exact):
    p = r(_softmax(mask_logits, r, "sum"), "result")
    return p, {"mask_logits": _softmax_gradient(p, grad, r, "result")}


def pairwise_softmax_steps(query, key, *, grad, scale=None, whiten="channel", r=exact):
    q, k, s = _logits(query, key, scale, whiten, r)
    p = _softmax(s, r, "operand")
    ds = _softmax_gradient(p, grad, r, "operand")
    dq, dk = _logit_gradients(ds, query, key, q, k, _scale(query, scale), whiten, r)
    return r(p, "result"), {"query": dq, "key": dk}


def unary_attention_steps(mask_logits, value, *, grad, r=exact):
    u = _softmax(mask_logits, r, "sum")
    pooled = r((u[..., None, :] @ value)[..., 0, :], "result")
    dot = r((value @ grad[..., :, None])[..., 0], "sum")
    dm = r(u * (dot - r(_sum(u * dot), "sum")), "result")
    return pooled, {"mask_logits": dm, "value": r(u[..., :, None] * grad[..., None, :], "result")}


def disentangled_attention_steps(query, key, value, mask_logits=None, *, grad, scale=None, whiten="channel", r=exact):
    """The unary term is rank one: dv_j += u_j G and dm_j = u_j (<G, v_j> - <G, pooled>), with G = sum_i dy_i."""
    q, k, s = _logits(query, key, scale, whiten, r)
    p = _softmax(s, r, "operand")
    output, dv, dm = _product(p, value, r), _product(p.swapaxes(-1, -2), grad, r), None
    if mask_logits is not None:
        total = r(grad.sum(axis=-2), "sum")
        pooled, unary = unary_attention_steps(mask_logits, value, grad=total, r=r)
        output, dv, dm = output + pooled[..., None, :], dv + unary["value"], unary["mask_logits"]
    # Delta = <dy, y> from the pairwise output that the forward keeps: a fused backward has no row of P to take it from.
    delta = (grad * r(p @ value, "saved")).sum(axis=-1)[..., None]
    ds = r(p * (r(_product(grad, value.swapaxes(-1, -2), r), "sum") - delta), "operand")
    dq, dk = _logit_gradients(ds, query, key, q, k, _scale(query, scale), whiten, r)
    gradients = {"query": dq, "key": dk, "value": r(dv, "result")}
    if dm is not None:
        gradients["mask_logits"] = dm
    return r(output, "result"), gradients


STEPS = {
    "disentangled_attention": disentangled_attention_steps,
    "pairwise_attention": disentangled_attention_steps,
    "unary_attention": unary_attention_steps,
    "mean_subtract": mean_subtract_steps,
    "whiten": whiten_steps,
    "pairwise_softmax": pairwise_softmax_steps,
    "unary_softmax": unary_softmax_steps,
}
