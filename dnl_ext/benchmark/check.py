"""The gate: nothing is timed before its values, and in training its gradients, are right.

Truth is float64. So that it is cheap at any N, only ROWS query rows are looked at: in the forward those rows of the
output, in the backward a grad_output that is zero in all other rows, which makes every gradient (of all keys and,
through the mean, of all queries) depend on those rows alone. The method still runs the whole problem. The measure is
the error of plain PyTorch in the same dtype on the same rows; a method is held to a multiple of it.
"""

from collections.abc import Mapping
from typing import Any

import torch

from .case import Case, Inputs

ROWS = 128
#: Allowed multiple of plain PyTorch's error, for the output and for gradients: dnl_ext's own promise.
OWN_BAR = {"output": 2.0, "grad": 3.0}
#: For peers, which round differently (a bf16 map, a bf16 accumulator): wrong is meant to be caught, not coarse.
PEER_BAR = {"output": 10.0, "grad": 10.0}
#: Errors below this many units of the dtype's rounding count as this many: plain PyTorch is sometimes luckily exact,
#: and in float64, where it is itself taken for the truth, always.
FLOOR = {torch.float64: 64.0}
USUAL_FLOOR = 2.0


class Truth:
    """The right answer of one case on ROWS query rows, and plain PyTorch's error there.

    Attributes:
        rows: (rows) indices of the query rows.
        grad_output: (batch, heads, rows, Dv) float64, what the other rows' zeros leave; None without gradients.
        values: name -> float64 tensor: "output" (.., rows, Dv), "grad_query" (.., Nq, Dqk), "grad_key", "grad_value",
            "grad_mask_logits".
        bars: name -> error of plain PyTorch, relative Frobenius norm, at least so many roundings.
    """

    def __init__(self, case: Case, inputs: Inputs, rows: int = ROWS, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        count = min(rows, case.queries)
        self.rows: torch.Tensor = (
            torch.randperm(case.queries, generator=generator)[:count].sort().values.to(case.device)
        )
        self.grad_output: torch.Tensor | None = None
        if case.training:
            shape = (case.batch, case.heads, count, case.channels)
            exact = torch.randn(shape, generator=generator).to(case.torch_dtype)  # exact in both dtypes
            self.grad_output = exact.to(case.device, torch.float64)
        self.values: dict[str, torch.Tensor] = _plain(case, inputs, self.rows, self.grad_output, torch.float64)
        plain = _plain(case, inputs, self.rows, self.grad_output, case.torch_dtype)
        floor = FLOOR.get(case.torch_dtype, USUAL_FLOOR) * torch.finfo(case.torch_dtype).eps
        self.bars: dict[str, float] = {name: max(error(plain[name], x), floor) for name, x in self.values.items()}

    def errors(self, results: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Relative Frobenius error per name of `results` (full output, full gradients)."""
        shown = {name: x[..., self.rows, :] if name == "output" else x for name, x in results.items()}
        return {name: error(shown[name], truth) for name, truth in self.values.items()}

    def verdict(
        self, results: Mapping[str, torch.Tensor], own: bool
    ) -> tuple[dict[str, float], dict[str, float], str | None]:
        """(errors, ratios to plain PyTorch's error, reason it is wrong or None)."""
        errors = self.errors(results)
        ratios = {name: errors[name] / self.bars[name] for name in errors}
        bar = OWN_BAR if own else PEER_BAR
        for name, ratio in ratios.items():
            allowed = bar["output" if name == "output" else "grad"]
            if not ratio <= allowed:  # NaN is wrong too
                reason = f"{name} is off by {errors[name]:.1e}, {ratio:.1f} times plain PyTorch's error"
                return errors, ratios, f"{reason} (allowed: {allowed:g})"
        return errors, ratios, None


def error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """||x - truth|| / ||truth|| in float64."""
    norm = torch.linalg.vector_norm(truth).item()
    return torch.linalg.vector_norm(x.detach().double() - truth).item() / max(norm, 1e-300)


def _plain(
    case: Case, inputs: Inputs, rows: torch.Tensor, grad_output: torch.Tensor | None, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Attention of `rows` in plain PyTorch and `dtype`, and its gradients. The definition, on some rows."""
    tensors: list[Any] = [
        None if x is None else x.detach().to(dtype, copy=True).requires_grad_(case.training) for x in inputs
    ]
    query, key, value, mask = tensors
    with torch.set_grad_enabled(case.training):
        if case.whiten:
            query, key = (x - x.mean(-2, keepdim=True) for x in (query, key))
        logits = (query[..., rows, :] * case.scale) @ key.transpose(-1, -2)
        output = torch.softmax(logits, -1) @ value
        if mask is not None:
            output = output + torch.softmax(mask, -1).unsqueeze(-2) @ value
    results = {"output": output.detach()}
    if grad_output is not None:
        wanted = [x for x in tensors if x is not None]
        grads = torch.autograd.grad(output, wanted, grad_output.to(dtype))
        results |= dict(zip(gradient_names(inputs), grads, strict=True))
    return results


def gradient_names(inputs: Inputs) -> list[str]:
    names = ("grad_query", "grad_key", "grad_value", "grad_mask_logits")
    return [name for name, x in zip(names, inputs, strict=True) if x is not None]
