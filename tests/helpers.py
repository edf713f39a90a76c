"""Random cases of every operator, and what they are held against: an error no larger than plain PyTorch's own.

A case is drawn from its seed alone: ``check(random_case(17))`` repeats it anywhere. Errors are Frobenius norms against
the same computation in a wider type (float64; long double for float64), relative to the norm of the true result.

The bar is BAR times the error that `dnl_ext.reference` makes in the case's own dtype. Where the reference lands exactly
by luck (one key, a softmax that is one-hot, a constant row) no multiple of its error can be asked for. There, and only
there, the error may instead be that of a *model* of a careful implementation: the formulas of csrc/ops in
the wider type, with every intermediate off by a random ULPS units in the last place of the type it must be kept in.
"""

import contextlib
import dataclasses
import math
import random

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dnl_ext

ATTENTION = ("disentangled_attention", "pairwise_attention")
ARGUMENTS = {
    "disentangled_attention": ("query", "key", "value", "mask_logits"),
    "pairwise_attention": ("query", "key", "value"),
    "unary_attention": ("mask_logits", "value"),
    "mean_subtract": ("x",),
    "whiten": ("x",),
    "pairwise_softmax": ("query", "key"),
    "unary_softmax": ("mask_logits",),
}
OPTIONS = {
    "disentangled_attention": ("scale", "whiten"),
    "pairwise_attention": ("scale", "whiten"),
    "unary_attention": (),
    "mean_subtract": ("dim",),
    "whiten": ("name",),
    "pairwise_softmax": ("scale", "whiten"),
    "unary_softmax": (),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channel_first", "permuted", "sliced", "expanded")
GRADIENTS = ("contiguous", "summed", "cat_slice", "transposed", "huge", "zero")
HUGE = {torch.float64: 1e100, torch.float32: 1e25, torch.bfloat16: 1e25, torch.float16: 8.0}

BAR = {"output": 2.0, "gradient": 3.0}
#: float64 has no wider type to add in: a running sum of n terms is off by about sqrt(n) / 2 units, 10 for n = 400.
ULPS = {torch.float64: 8.0, torch.float32: 2.0, torch.bfloat16: 2.0, torch.float16: 2.0}
EPS_TF32 = 2.0**-10
LONG_DOUBLE_IS_WIDER = np.finfo(np.longdouble).eps < np.finfo(np.float64).eps


# ----------------------------------------------------------------------------------------------------------------------
# The formulas, written out. They hold for torch tensors and numpy arrays alike.
#
# r(x, kind) is called on every intermediate that an implementation must round: "sum" is kept in the accumulate type,
# "operand" is multiplied again and may be kept in the tensors' own dtype, "result" is written in it, "factor" enters a
# product, which in TF32 rounds it.
# ----------------------------------------------------------------------------------------------------------------------


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


# ----------------------------------------------------------------------------------------------------------------------
# Layouts
# ----------------------------------------------------------------------------------------------------------------------


def lay_out(x, layout, rng):
    """`x`, equal in every element (but "expanded" repeats one slice), in another place and order of memory."""
    if layout == "channel_first" and x.dim() >= 2:
        return x.transpose(-2, -1).contiguous().transpose(-2, -1)
    if layout == "permuted":
        order = rng.sample(range(x.dim()), x.dim())
        return x.permute(order).contiguous().permute([order.index(i) for i in range(x.dim())])
    if layout == "sliced":
        return _sliced(x, rng)
    if layout == "expanded" and x.dim():
        # Mostly a leading dimension: repeated positions or channels leave less to compute.
        dim = rng.randrange(x.dim()) if x.dim() <= 2 or rng.random() < 0.2 else rng.randrange(x.dim() - 2)
        return x.narrow(dim, 0, 1).clone().expand(x.shape) if x.shape[dim] else x.clone()
    return x.contiguous()


def _sliced(x, rng):
    """`x` as a slice of a larger tensor of any dimension order; what lies around it is NaN, so reading it shows."""
    steps = [2 if rng.random() < 0.15 else 1 for _ in x.shape]
    before = [rng.randrange(4) for _ in x.shape]
    after = [rng.randrange(1, 4) for _ in x.shape]
    sizes = [b + n * s + a for n, s, b, a in zip(x.shape, steps, before, after, strict=True)]
    order = list(range(x.dim())) if rng.random() < 0.5 else rng.sample(range(x.dim()), x.dim())
    larger = torch.full([sizes[i] for i in order], math.nan, dtype=x.dtype)
    larger = larger.permute([order.index(i) for i in range(x.dim())])
    view = larger[tuple(slice(b, b + n * s, s) for n, s, b in zip(x.shape, steps, before, strict=True))]
    assert view.shape == x.shape
    return view.copy_(x)


def make_gradient(shape, form, dtype, generator, rng):
    """A gradient of the output as autograd may hand it over."""
    wide = torch.randn(shape, generator=generator, dtype=torch.float64)
    if form == "summed":  # what y.sum() sends back: one number, stride 0 everywhere
        # float16 sums of 700 queries and 600 channels of mean 3 must stay below 65504
        factor = 0.02 if dtype == torch.float16 else 1.0
        return torch.tensor(factor * rng.choice([1.0, -0.37]), dtype=dtype).expand(shape)
    if form == "cat_slice":  # what torch.cat sends back: a slice of a larger gradient
        if not shape:
            return wide.to(dtype)
        dim, before = rng.randrange(len(shape)), rng.randrange(1, 4)
        pad = [list(shape), list(shape)]
        pad[0][dim], pad[1][dim] = before, 2
        poison = [torch.full(size, math.nan, dtype=dtype) for size in pad]
        return torch.cat([poison[0], wide.to(dtype), poison[1]], dim).narrow(dim, before, shape[dim])
    if form == "transposed":
        return lay_out(wide.to(dtype), "channel_first", rng)
    if form == "huge":
        return (wide * HUGE[dtype]).to(dtype)
    if form == "zero":
        return torch.zeros(shape, dtype=dtype)
    return wide.to(dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Cases
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: everything that decides it. `needs` are the inputs whose gradients are asked for."""

    seed: int
    op: str
    dtype: torch.dtype
    shapes: dict
    layouts: dict
    mean: float  # of every input, in its deviations
    signs: str  # of the means: "same" or "mixed" over channels
    options: dict
    grad: str
    needs: tuple

    def make(self):
        """Inputs by name, and the gradient of the output."""
        generator = torch.Generator().manual_seed(self.seed)
        rng = random.Random(self.seed + 1)
        # float16 ends at 65504: inputs with a mean get a smaller deviation, so that raw products stay below it.
        deviation = 0.1 if self.dtype == torch.float16 and self.mean else 1.0
        inputs = {}
        for name, shape in self.shapes.items():
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            sign = torch.ones(shape[-1:], dtype=torch.float64)
            if self.signs == "mixed" and name != "mask_logits":
                sign = torch.randint(0, 2, shape[-1:], generator=generator).double() * 2 - 1
            inputs[name] = lay_out((deviation * (x + self.mean * sign)).to(self.dtype), self.layouts[name], rng)
        return inputs, make_gradient(self.output_shape, self.grad, self.dtype, generator, rng)

    @property
    def output_shape(self):
        s = self.shapes
        if self.op in ATTENTION:
            return (*s["query"][:-1], s["value"][-1])
        if self.op == "unary_attention":
            return (*s["value"][:-2], s["value"][-1])
        if self.op == "pairwise_softmax":
            return (*s["query"][:-1], s["key"][-2])
        return next(iter(s.values()))

    def __str__(self):
        fields = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self))
        return f"Case({fields})"


def _size(rng, most):
    """1 .. most: often tiny, often around a tile, sometimes large; odd as often as even."""
    kind = rng.random()
    if kind < 0.15:
        return rng.randint(1, min(4, most))
    if kind < 0.6:
        return rng.randint(1, min(80, most))
    return rng.randint(1, most)


#: Multiply-adds of one product of the maps. float16 products are slow in torch, and long double has no BLAS at all.
BUDGET = {torch.float64: 4e6, torch.float32: 3e8, torch.bfloat16: 3e8, torch.float16: 6e7}
OPS_DRAWN = (
    *("disentangled_attention",) * 12,
    *("pairwise_attention",) * 4,
    *("unary_attention", "mean_subtract", "pairwise_softmax", "unary_softmax"),
)


def random_case(seed, op=None, dtype=None, large=0.03):
    """The case of a seed. A share `large` of them may have every size at its most: N = 700, widths of 600."""
    rng = random.Random(seed)
    drawn_op, drawn_dtype = rng.choice(OPS_DRAWN), rng.choice(DTYPES)
    if seed % 25 == 7:
        drawn_op = "whiten"
    op, dtype = op or drawn_op, dtype or drawn_dtype
    budget = BUDGET[dtype] * (8 if rng.random() < large else 1)
    lead = [rng.choice((1, 2, 3, 5)) for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3)))]
    sizes = {"nq": _size(rng, 700), "nk": _size(rng, 700), "dqk": _size(rng, 600), "dv": _size(rng, 600)}
    if rng.random() < 0.25:
        sizes["nk"] = sizes["nq"]

    def work():
        return math.prod(lead) * sizes["nq"] * sizes["nk"] * max(sizes["dqk"], sizes["dv"])

    while work() > budget:  # leading dimensions first: they repeat what one batch element shows
        if math.prod(lead) > 2:
            lead[lead.index(max(lead))] -= 1
        else:
            name = rng.choice([n for n, size in sizes.items() if size > 8])
            sizes[name] = sizes[name] * 2 // 3
    nq, nk, dqk, dv = sizes.values()
    shapes = {
        "query": (*lead, nq, dqk),
        "key": (*lead, nk, dqk),
        "value": (*lead, nk, dv),
        "mask_logits": (*lead, nk),
        "x": (*lead, nq, dqk),
    }
    names = [n for n in ARGUMENTS[op] if n != "mask_logits" or op != "disentangled_attention" or rng.random() < 0.75]
    shapes = {name: shapes[name] for name in names}
    options = {
        "scale": rng.choice((None, None, None, 1.25, -1.25, -0.3, 0.05, 0.0, rng.uniform(-1, 1))),
        "whiten": "channel" if rng.random() < 0.75 else None,
        "dim": -2 if rng.random() < 0.6 else rng.randrange(-len(lead) - 2, len(lead) + 2),
        "name": tuple(WHITEN_AXES)[seed % len(WHITEN_AXES)],
    }
    if nq == 1 and options["name"] in DEVIATION:  # one position has no variance
        options["name"] = "spatial"
    case = Case(
        seed=seed,
        op=op,
        dtype=dtype,
        shapes=shapes,
        layouts={name: rng.choice(LAYOUTS) for name in names},
        mean=rng.choice((0.0, 10.0, 30.0)),
        signs=rng.choice(("same", "mixed")),
        options={name: options[name] for name in OPTIONS[op]},
        grad=rng.choice(GRADIENTS),
        needs=tuple(name for name in names if rng.random() < 0.85) or tuple(names),
    )
    return case


def make_case(op="disentangled_attention", lead=(2,), nq=61, nk=83, dqk=40, dv=24, mask=True, layout=None, **fields):
    """A plain case: contiguous, mean 0, all gradients; `layout` is of every input, `fields` are those of Case."""
    shapes = {
        "query": (*lead, nq, dqk),
        "key": (*lead, nk, dqk),
        "value": (*lead, nk, dv),
        "mask_logits": (*lead, nk),
        "x": (*lead, nq, dqk),
    }
    names = [n for n in ARGUMENTS[op] if mask or n != "mask_logits" or op != "disentangled_attention"]
    plain = {
        "seed": 3,
        "dtype": torch.float32,
        "shapes": {name: shapes[name] for name in names},
        "layouts": dict.fromkeys(names, layout or "contiguous"),
        "mean": 0.0,
        "signs": "mixed",
        "options": {},
        "grad": "contiguous",
        "needs": tuple(names),
    }
    return Case(op=op, **{**plain, **fields})


def poisoned_case(seed):
    """A small case and what to write where in it: (case, name of an input or "grad", index, NaN or an infinity)."""
    rng = random.Random(seed)
    op = rng.choice(list(ARGUMENTS))
    sizes = {name: rng.choice((1, 2, 3, 5, 17, 40)) for name in ("nq", "nk", "dqk", "dv")}
    case = make_case(
        op,
        lead=rng.choice(((), (2,), (2, 2))),
        **sizes,
        mask=rng.random() < 0.7,
        seed=seed,
        dtype=rng.choice(DTYPES),
        options={"whiten": rng.choice(("channel", None))} if "whiten" in OPTIONS[op] else {},
    )
    where = rng.choice((*case.shapes, "grad"))
    shape = case.output_shape if where == "grad" else case.shapes[where]
    return case, where, tuple(rng.randrange(n) for n in shape), rng.choice((math.nan, math.inf, -math.inf))


def check_poisoned(seed):
    """Fail unless the positions of non-finite results, output and gradients, are the reference's."""
    case, where, index, value = poisoned_case(seed)
    inputs, grad = case.make()
    (grad if where == "grad" else inputs[where])[index] = value
    ours, theirs = (
        run(getattr(ops, case.op), inputs, grad, case.options, case.needs) for ops in (dnl_ext, dnl_ext.reference)
    )
    wrong = []
    for name in ("output", *case.needs):
        if where == "mask_logits" and name in ("query", "key"):
            continue  # docs/numerics.md: Delta is read off the output, which the unary term has then spoilt
        a, b = (output if name == "output" else grads[name] for output, grads in (ours, theirs))
        if not torch.equal(a.isfinite(), b.isfinite()):
            wrong.append(f"{name}: {int((~a.isfinite()).sum())} of {a.numel()}, expected {int((~b.isfinite()).sum())}")
    assert not wrong, f"{case} with {where}[{index}] = {value}: not finite are " + "; ".join(wrong)


# ----------------------------------------------------------------------------------------------------------------------
# The check
# ----------------------------------------------------------------------------------------------------------------------


def run(function, inputs, grad, options, needs):
    """Output and gradients by name. Inputs that are not in `needs` do not require grad."""
    leaves = {name: x.detach().requires_grad_(name in needs) for name, x in inputs.items()}
    output = function(*leaves.values(), **options)
    gradients = torch.autograd.grad(output, [leaves[name] for name in needs], grad)
    return output.detach(), dict(zip(needs, gradients, strict=True))


def truth_of(case, inputs, grad):
    """Output and gradients in the wider type."""
    wide = {name: widened(x) for name, x in inputs.items()}
    if case.dtype == torch.float64:
        return STEPS[case.op](**wide, grad=widened(grad), **case.options)
    return run(getattr(dnl_ext.reference, case.op), wide, widened(grad), case.options, case.needs)


def widened(x):
    """A float64 tensor; a long double array for float64."""
    return x.numpy().astype(np.longdouble) if x.dtype == torch.float64 else x.double()


def norm(x):
    """||x||, without overflow or underflow of the squares; infinity where `x` is not finite."""
    x = np.asarray(x)
    largest = np.max(np.abs(x), initial=0.0)
    if not np.isfinite(largest):
        return math.inf
    return float(largest * np.sqrt(np.sum((x / largest) ** 2))) if largest else 0.0


def distance(x, truth):
    """||x - truth||."""
    return norm(np.asarray(x if isinstance(x, np.ndarray) else x.double()) - np.asarray(truth))


def noise(dtype, seed, tf32=False):
    """A rounding for STEPS: uniform within ULPS units in the last place of the type an intermediate is kept in."""
    generator = torch.Generator().manual_seed(seed)
    narrow = torch.finfo(dtype).eps
    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    # What a 16-bit forward keeps of its output: the output and what rounding took from it, both in 16 bits.
    saved = narrow * narrow / 4 if dtype.itemsize == 2 else wide
    eps = {"sum": wide, "operand": narrow, "result": narrow, "saved": saved, "factor": EPS_TF32 if tf32 else 0}

    def r(x, kind):
        if not eps[kind]:
            return x
        uniform = torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return x * (1 + ULPS[dtype] * eps[kind] * (uniform if isinstance(x, torch.Tensor) else uniform.numpy()))

    return r


def modelled_errors(case, inputs, grad, truth, draws=3):
    """By name, the largest error of `draws` models of a careful implementation; see the module's docstring."""
    wide = {name: widened(x) for name, x in inputs.items()}
    # Results smaller than the dtype's grid are off by half a step of it, whatever computed them.
    step = torch.finfo(case.dtype).smallest_normal * torch.finfo(case.dtype).eps
    errors = {}
    for draw in range(draws):
        r = noise(case.dtype, draw, uses_tf32(case))
        output, gradients = STEPS[case.op](**wide, grad=widened(grad), **case.options, r=r)
        for name, x in {"output": output, **gradients}.items():
            if name in truth:
                grid = step * math.sqrt(math.prod(x.shape)) / 2
                errors[name] = max(errors.get(name, 0.0), distance(x, truth[name]) + grid)
    return errors


@dataclasses.dataclass(frozen=True)
class Error:
    """Norms of errors of one result: ours, the reference's, and the model's (NaN where it was not needed)."""

    name: str
    size: float
    ours: float
    reference: float
    model: float

    @property
    def allowed(self):
        return BAR["output" if self.name == "output" else "gradient"] * self.reference

    @property
    def passes(self):
        # Not `<=` alone: a reference that overflows allows nothing to be concluded.
        return math.isfinite(self.reference) and (self.ours <= self.allowed or self.ours <= self.model)

    def __str__(self):
        ratio = self.ours / self.reference if self.reference else math.inf
        return (
            f"{self.name}: error {self.ours:.3g}, reference {self.reference:.3g} (ratio {ratio:.2f}), "
            f"model {self.model:.3g}, norm of the result {self.size:.3g}"
        )


def to_tf32(x):
    """`x` (float32) rounded to TF32, 10 bits of fraction, ties away from zero; NaN and infinities stay."""
    rounded = ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x)


class Tf32Products(TorchDispatchMode):
    """What plain PyTorch computes on a GPU where TF32 is allowed: products of float32 round their operands to TF32."""

    PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in self.PRODUCTS:
            args = [to_tf32(x) if x.dtype == torch.float32 else x for x in args]
        return function(*args, **(kwargs or {}))


def uses_tf32(case):
    """Whether products of the case may use TF32, as torch has it at present."""
    return case.dtype == torch.float32 and dnl_ext._C.tf32_allowed()


def measure(case, function=None):
    """Errors of `function` (by default the fused operator) on a case, one for each result.

    In float32 the reference multiplies in TF32 where torch allows that on a GPU.
    """
    inputs, grad = case.make()
    reference = getattr(dnl_ext.reference, case.op)
    function = function or getattr(dnl_ext, case.op)
    plain = contextlib.nullcontext()
    results = []
    for f, products in ((function, plain), (reference, Tf32Products() if uses_tf32(case) else plain)):
        with products:
            output, gradients = run(f, inputs, grad, case.options, case.needs)
        results.append({"output": output, **gradients})
    ours, theirs = results
    output, gradients = truth_of(case, inputs, grad)
    truth = {"output": output, **{name: gradients[name] for name in case.needs}}
    for name, x in ours.items():
        expected = inputs.get(name)
        assert x.dtype == case.dtype, f"{name}: dtype {x.dtype}"
        assert x.shape == (case.output_shape if expected is None else expected.shape), f"{name}: shape {x.shape}"
    errors = {
        name: Error(
            name, norm(truth[name]), distance(ours[name], truth[name]), distance(theirs[name], truth[name]), math.nan
        )
        for name in truth
    }
    if not all(error.passes for error in errors.values()):
        models = modelled_errors(case, inputs, grad, truth)
        errors = {name: dataclasses.replace(error, model=models[name]) for name, error in errors.items()}
    return list(errors.values())


def check(case, function=None):
    """Fail, naming the case and its seed, if any error of `function` on it is above the bar."""
    errors = measure(case, function)
    failed = [str(error) for error in errors if not error.passes]
    assert not failed, f"{case}\n  " + "\n  ".join(failed)
    return errors
