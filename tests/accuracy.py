"""What a call is held against: an error no larger than plain PyTorch's own. ``check(random_case(17))`` says it all.

Errors are Frobenius norms against the same computation in a wider type (float64; long double for float64), relative to
the norm of the true result.

The bar is BAR times the error that `dnl_ext.reference` makes in the case's own dtype. Where the reference lands exactly
by luck (one key, a softmax that is one-hot, a constant row) no multiple of its error can be asked for. There, and only
there, the error may instead be that of a *model* of a careful implementation: the formulas of csrc/ops in
the wider type, with every intermediate off by a random ULPS units in the last place of the type it must be kept in.
"""

import dataclasses
import math

import numpy as np
import torch
from cases import poisoned_case
from formulas import STEPS

import dnl_ext

BAR = {"output": 2.0, "gradient": 3.0}
#: float64 has no wider type to add in: a running sum of n terms is off by about sqrt(n) / 2 units, 10 for n = 400.
ULPS = {torch.float64: 8.0, torch.float32: 2.0, torch.bfloat16: 2.0, torch.float16: 2.0}
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


def noise(dtype, seed):
    """A rounding for STEPS: uniform within ULPS units in the last place of the type an intermediate is kept in."""
    generator = torch.Generator().manual_seed(seed)
    narrow = torch.finfo(dtype).eps
    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    # What a 16-bit forward keeps of its output: the output and what rounding took from it, both in 16 bits.
    saved = narrow * narrow / 4 if dtype.itemsize == 2 else wide
    eps = {"sum": wide, "operand": narrow, "result": narrow, "saved": saved}

    def r(x, kind):
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
        output, gradients = STEPS[case.op](**wide, grad=widened(grad), **case.options, r=noise(case.dtype, draw))
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


def measure(case, function=None):
    """Errors of `function` (by default the fused operator) on a case, one for each result."""
    inputs, grad = case.make()
    reference = getattr(dnl_ext.reference, case.op)
    function = function or getattr(dnl_ext, case.op)
    results = []
    for f in (function, reference):
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
