"""What a call is held against: an error no larger than plain PyTorch's own. ``check(random_case(17))`` says it all.

Errors are Frobenius norms against the same computation in a wider type (float64; long double for float64), relative to
the norm of the true result.

The bar is BAR times the error that `dnl_ext.reference` makes in the case's own dtype. Where the reference lands exactly
(one key, a softmax that is one-hot, a constant row) no multiple of its error can be asked for. There the error may
instead be that of a *model* of a careful implementation: the formulas of csrc/ops in the wider type, with every
intermediate off by up to ULPS units in the last place of the type it must be kept in, equal ones by the same amount.

Either error of a small case is one draw of a few roundings, and their ratio is large now and then by luck. A case that
misses is therefore drawn REDRAWS times more, same shapes and options, other numbers: then the root mean squares count.
Where logits are so large that rows are one-hot, an error is a row that took another key, seldom and large: of such a
case it takes HOT_REDRAWS to compare.
"""

import contextlib
import dataclasses
import math

import numpy as np
import torch
from cases import poisoned_case
from formulas import STEPS
from torch.utils._python_dispatch import TorchDispatchMode

import dnl_ext

BAR = {"output": 2.0, "gradient": 3.0}
#: float64 has no wider type to add in: a running sum of n terms is off by about sqrt(n) / 2 units, 10 for n = 400.
ULPS = {torch.float64: 8.0, torch.float32: 2.0, torch.bfloat16: 2.0, torch.float16: 2.0}
EPS_TF32 = 2.0**-10
REDRAWS, HOT_REDRAWS = 8, 64
LONG_DOUBLE_IS_WIDER = np.finfo(np.longdouble).eps < np.finfo(np.float64).eps


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
    """A rounding for STEPS: within ULPS units in the last place of the type an intermediate is kept in.

    As a real one it is a function of the number: where all rows are equal, so are their errors, and they add up.
    """
    narrow = torch.finfo(dtype).eps
    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    # What a 16-bit forward keeps of its output: the output and what rounding took from it, both in 16 bits.
    saved = narrow * narrow / 4 if dtype.itemsize == 2 else wide
    eps = {"sum": wide, "operand": narrow, "result": narrow, "saved": saved, "factor": EPS_TF32 if tf32 else 0}

    def uniform(x):
        """-1 to 1 from 40 leading bits of x, since equal rows of a product may differ in the last few."""
        bits = (np.ascontiguousarray(x, np.float64).view(np.uint64) + np.uint64(1 << 11)) >> np.uint64(12)
        for shift in (30, 27, 31):  # mixed as splitmix64 does (Steele et al. 2014)
            bits = (bits + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)) * np.uint64(0xBF58476D1CE4E5B9)
            bits ^= bits >> np.uint64(shift)
        return (bits >> np.uint64(11)) * 2.0**-52 - 1

    def r(x, kind):
        if not eps[kind]:
            return x
        error = ULPS[dtype] * eps[kind] * uniform(x)
        return x * (1 + (torch.from_numpy(error) if isinstance(x, torch.Tensor) else error))

    return r


def modelled_errors(case, inputs, grad, truth, draws=3):
    """By name, the largest error of `draws` models of a careful implementation; see the module's docstring."""
    wide = {name: widened(x) for name, x in inputs.items()}
    # Results smaller than the dtype's grid are off by half a step of it, whatever computed them.
    step = torch.finfo(case.dtype).smallest_normal * torch.finfo(case.dtype).eps
    errors = {}
    for draw in range(draws):
        output, gradients = STEPS[case.op](
            **wide, grad=widened(grad), **case.options, r=noise(case.dtype, draw, uses_tf32(case))
        )
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


def measure(case, function=None, model=False):
    """Errors of `function` (by default the fused operator) on a case, one for each result.

    In float32 the reference multiplies in TF32 where torch allows that on a GPU. `model`: find the model's errors too
    where nobody needs them.
    """
    inputs, grad = case.make()
    reference = getattr(dnl_ext.reference, case.op)
    function = function or getattr(dnl_ext, case.op)
    plain = contextlib.nullcontext()
    # torch's own bfloat16 products of slices can take in what lies beside them in memory, which is NaN here.
    alone = {name: x.contiguous() for name, x in inputs.items()}
    tf32 = Tf32Products() if uses_tf32(case) else plain
    results = []
    for f, x, dy, products in ((function, inputs, grad, plain), (reference, alone, grad.contiguous(), tf32)):
        with products:
            output, gradients = run(f, x, dy, case.options, case.needs)
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
    if model or not all(error.passes for error in errors.values()):
        models = modelled_errors(case, inputs, grad, truth)
        errors = {name: dataclasses.replace(error, model=models[name]) for name, error in errors.items()}
    return list(errors.values())


def pooled(case, function=None):
    """Root mean squares of the errors on a case and on others that differ in their numbers alone."""
    draws = [
        measure(dataclasses.replace(case, seed=case.seed + draw * 1_000_003), function, True)
        for draw in range((HOT_REDRAWS if case.hot else REDRAWS) + 1)
    ]
    return [
        Error(
            errors[0].name,
            *(
                norm([getattr(error, field) for error in errors]) / math.sqrt(len(errors))
                for field in ("size", "ours", "reference", "model")
            ),
        )
        for errors in zip(*draws, strict=True)
    ]


def failures(case, function=None):
    """The errors of `function` on a case that are above the bar, and stay there when the case is drawn again."""
    errors = measure(case, function)
    if all(error.passes for error in errors):
        return []
    return [error for error in pooled(case, function) if not error.passes]


def check(case, function=None):
    """Fail, naming the case and its seed, if any error of `function` on it is above the bar."""
    failed = [str(error) for error in failures(case, function)]
    assert not failed, f"{case}\n  " + "\n  ".join(failed)


def check_poisoned(seed):
    """Fail unless the positions of non-finite results, output and gradients, are the reference's.

    That of 16-bit inputs computes in float32: torch's bfloat16 products on AMX multiply infinity by a tile's zeros.
    """
    case, where, index, value = poisoned_case(seed)
    inputs, grad = case.make()
    (grad if where == "grad" else inputs[where])[index] = value
    ours = run(getattr(dnl_ext, case.op), inputs, grad, case.options, case.needs)
    wide = torch.promote_types(case.dtype, torch.float32)
    wider = {name: x.to(wide) for name, x in inputs.items()}
    theirs = run(getattr(dnl_ext.reference, case.op), wider, grad.to(wide), case.options, case.needs)
    wrong = []
    for name in ("output", *case.needs):
        if where == "mask_logits" and name in ("query", "key"):
            continue  # docs/numerics.md: Delta is read off the output, which the unary term has then spoilt
        a, b = (output if name == "output" else grads[name] for output, grads in (ours, theirs))
        if not torch.equal(a.isfinite(), b.isfinite()):
            wrong.append(f"{name}: {int((~a.isfinite()).sum())} of {a.numel()}, expected {int((~b.isfinite()).sum())}")
    assert not wrong, f"{case} with {where}[{index}] = {value}: not finite are " + "; ".join(wrong)
