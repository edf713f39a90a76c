"""Random and plain calls of every operator, in any layout. A case is drawn from its seed alone: it repeats anywhere."""

import dataclasses
import math
import random

import torch
from formulas import DEVIATION, WHITEN_AXES

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
    factors: dict = dataclasses.field(default_factory=dict)  # of inputs, by name
    hot: bool = False  # logits of any size: rows may be one-hot

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
            x = deviation * self.factors.get(name, 1.0) * (x + self.mean * sign)
            inputs[name] = lay_out(x.to(self.dtype), self.layouts[name], rng)
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


#: float16 and its factors have no room between logits that matter and their overflow.
LARGEST_LOGIT = {torch.float64: 1e300, torch.float32: 1e36, torch.bfloat16: 1e36, torch.float16: 3e4}


def heated(case):
    """`case` with logits of any power of ten up to LARGEST_LOGIT, from its inputs or from its scale."""
    rng = random.Random(~case.seed)
    largest, factors, options = LARGEST_LOGIT[case.dtype], {}, dict(case.options)
    if "query" in case.shapes:
        magnitude = abs(options["scale"]) if options.get("scale") else 1.0
        bound = (case.mean + 4) ** 2 * case.shapes["query"][-1] * max(1.0, magnitude)
        factor = 10 ** rng.uniform(0, max(0.0, math.log10(largest / bound)))
        if rng.random() < 0.7:
            factors = dict.fromkeys(("query", "key"), math.sqrt(factor))
        else:  # gradients of query and key are as large as the scale
            options["scale"] = rng.choice((1, -1)) * min(factor, math.sqrt(largest))
    if "mask_logits" in case.shapes:
        factors["mask_logits"] = 10 ** rng.uniform(0, math.log10(largest / (case.mean + 6)))
    grad = "contiguous" if case.grad == "huge" else case.grad
    # docs/numerics.md: of equal queries raw products of bfloat16 keep a rounding, which a steep scale makes a row of.
    layouts = {n: "contiguous" if case.dtype == torch.bfloat16 and n == "query" else x for n, x in case.layouts.items()}
    return dataclasses.replace(case, factors=factors, options=options, grad=grad, layouts=layouts, hot=True)


def random_case(seed, op=None, dtype=None, large=0.03, hot=0.2):
    """The case of a seed. A share `large` of them may have every size at its most: N = 700, widths of 600.

    A share `hot` has logits of any size that its type can hold.
    """
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
    return heated(case) if random.Random(-1 - seed).random() < hot else case


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
