"""What is registered with torch for every raw operator: schema, fake results, derivative, batching. `opcheck` on each.

A program that holds the operators alone (exported, traced) rests on these: nothing of dnl_ext's Python is called then.
"""

import subprocess
import sys

import pytest
import torch
from inputs import LAYOUTS, lay_out, make
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import vmap

from dnl_ext.reference import WHITEN_NAMES

raw = torch.ops.dnl_ext
FORWARD = ("mean_subtract", "whiten_forward", "softmax", "unary_forward", "pairwise_forward")
BACKWARD = ("whiten_backward", "softmax_backward", "unary_backward", "pairwise_backward", "pairwise_double_backward")
NAMES = (*FORWARD, *BACKWARD, "pairwise_part_forward", "pairwise_part_backward")


def calls_of(name, dtype=torch.float64, layout="contiguous", lead=(2,)):
    """Valid arguments of a raw operator, one tuple for each kind of call."""
    q, k, v, m = make("disentangled_attention", dtype=dtype, layout=layout, lead=lead)
    kinds = [(whitening, apart) for whitening in WHITEN_NAMES[:-1] for apart in range(1 + len(lead))]
    pairwise = [(mask, whiten, save) for mask in (m, None) for whiten in ("channel", None) for save in (True, False)]
    if name == "mean_subtract":
        return [(q, dim) for dim in (-2, -1, 0)]
    if name == "softmax":
        return [(k,)]
    if name == "softmax_backward":
        return [(lay_out(torch.randn_like(k), layout), raw.softmax(k))]
    if name == "unary_forward":
        return [(m, v)]
    if name == "unary_backward":
        pooled, lse = raw.unary_forward(m, v)
        return [(torch.randn_like(pooled), m, v, pooled, lse, *needs) for needs in ((True, True), (False, True))]
    if name == "whiten_forward":
        return [(q, whitening, apart, 1e-5) for whitening, apart in kinds]
    if name == "whiten_backward":
        dy = lay_out(torch.randn_like(q), layout)
        return [(dy, *raw.whiten_forward(q, *kind, 1e-5), *kind, 1e-5) for kind in kinds]
    if name == "pairwise_forward":
        return [(q, k, v, mask, 0.5, whiten, save) for mask, whiten, save in pairwise]
    if name == "pairwise_part_forward":
        return [(q, k, v, 0.5, save) for save in (True, False)]
    if name == "pairwise_part_backward":
        output, stats, _ = raw.pairwise_part_forward(q, k, v, 0.5, False)
        delta = torch.randn_like(stats[..., 0])
        needs = ((True, True, True), (True, False, False))
        return [(torch.randn_like(output), q, k, v, stats, delta, 0.5, *need) for need in needs]
    if name == "pairwise_double_backward":
        dy = torch.randn_like(raw.pairwise_forward(q, k, v, m, 0.5, None, False)[0])
        kinds = ((m, "channel", True), (None, None, True), (m, None, False))
        return [
            (dy, q, k, v, mask, q, k, v, mask, 0.5, whiten, True, need, need, True, mask is not None)
            for mask, whiten, need in kinds
        ]
    calls = []
    for mask, whiten, save in pairwise:
        saved = raw.pairwise_forward(q, k, v, mask, 0.5, whiten, save)
        dy = lay_out(torch.randn_like(saved[0]), layout)
        calls.append((dy, q, k, v, mask, *saved, 0.5, whiten, True, not save, True, mask is not None))
    return calls


def as_tuple(result):
    return (result,) if isinstance(result, torch.Tensor) else result


class TestOpcheck:
    @pytest.mark.parametrize("name", NAMES)
    def test_every_kind_of_call(self, name):
        for arguments in calls_of(name):
            result = torch.library.opcheck(getattr(raw, name).default, arguments)
            assert set(result.values()) == {"SUCCESS"}

    @pytest.mark.parametrize("name", FORWARD)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_inputs_that_require_grad(self, name, dtype):
        """The registered derivative is traced too, with dynamic shapes, and its results compared."""
        for arguments in calls_of(name, dtype)[:3]:
            leaves = [x.detach().requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments]
            assert set(torch.library.opcheck(getattr(raw, name).default, leaves).values()) == {"SUCCESS"}

    def test_is_run_for_every_operator(self):
        schemas = (schema.name for schema in torch._C._jit_get_all_schemas())
        assert {name.removeprefix("dnl_ext::") for name in schemas if name.startswith("dnl_ext::")} == set(NAMES)


class TestFakeResults:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("layout", [*LAYOUTS, "permuted", "expanded"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_are_laid_out_as_real_ones(self, name, layout, dtype):
        def permute(x):
            if not isinstance(x, torch.Tensor) or x.dim() < 3:
                return x
            if layout == "permuted":
                return x.movedim(0, -1).contiguous().movedim(-1, 0)
            return x[:1].expand_as(x) if layout == "expanded" else x

        for call in calls_of(name, dtype, layout if layout in LAYOUTS else "contiguous", lead=(2, 3)):
            arguments = [permute(x) for x in call]
            actual = as_tuple(getattr(raw, name)(*arguments))
            mode = FakeTensorMode()
            with mode:
                fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
                fake = as_tuple(getattr(raw, name)(*fakes))
            for a, f in zip(actual, fake, strict=True):
                assert (a.shape, a.stride(), a.dtype, a.device) == (f.shape, f.stride(), f.dtype, f.device)


class TestDerivative:
    @pytest.mark.parametrize("name", FORWARD)
    def test_of_an_operator_called_by_itself(self, name):
        for arguments in calls_of(name):
            leaves = [x.detach().requires_grad_() for x in arguments if isinstance(x, torch.Tensor)]

            def call(*tensors, arguments=arguments):
                given = iter(tensors)
                full = (next(given) if isinstance(x, torch.Tensor) else x for x in arguments)
                return as_tuple(getattr(raw, name)(*full))[0]

            assert torch.autograd.gradcheck(call, leaves, fast_mode=True)

    @pytest.mark.parametrize("name", ["unary_forward", "pairwise_forward"])
    def test_what_is_saved_for_the_backward_has_none(self, name):
        (arguments, *_) = calls_of(name)
        arguments = [x.detach().requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments]
        output, *saved = getattr(raw, name)(*arguments)
        assert output.requires_grad and not any(x.requires_grad for x in saved)

    def test_of_third_order_raises(self):
        q, k, v, m = (x.requires_grad_() for x in make("disentangled_attention"))
        y = raw.pairwise_forward(q, k, v, m, 0.5, "channel", True)[0]
        (dq,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
        (second,) = torch.autograd.grad(dq.square().sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError, match="third derivatives"):
            second.sum().backward()


class TestBatching:
    @pytest.mark.parametrize("name", NAMES)
    def test_vmap_of_a_raw_operator_equals_a_loop(self, name):
        for arguments in calls_of(name, lead=(3,)):
            if name == "mean_subtract" and arguments[1] == 0:
                continue  # its dimension is the mapped one
            if name.startswith("whiten") and (arguments[-2] == 1 or arguments[-3].startswith("fln")):
                continue  # `apart` counts the dimensions that vmap hides; "fln" sees the whole batch
            in_dims = tuple(0 if isinstance(x, torch.Tensor) else None for x in arguments)
            batched = as_tuple(vmap(getattr(raw, name), in_dims)(*arguments))
            for actual, expected in zip(batched, as_tuple(getattr(raw, name)(*arguments)), strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_everything_is_registered_at_import():
    """In a fresh process that has done nothing but import: fake results, derivative and vmap of a raw operator."""
    code = """
import torch, dnl_ext
from torch._subclasses.fake_tensor import FakeTensorMode
x = torch.randn(3, 4, 2, requires_grad=True)
with FakeTensorMode() as mode:
    assert torch.ops.dnl_ext.unary_forward(torch.empty(3, 4), torch.empty(3, 4, 2))[0].shape == (3, 2)
torch.ops.dnl_ext.pairwise_forward(x, x, x, None, 0.5, "channel", False)[0].sum().backward()
assert x.grad.abs().sum() > 0
assert torch.func.vmap(torch.ops.dnl_ext.softmax)(x.detach()).shape == x.shape
"""
    subprocess.run([sys.executable, "-c", code], check=True)
