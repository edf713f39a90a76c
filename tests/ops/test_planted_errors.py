"""The check of tests/accuracy.py can fail: implementations with one fault each, made of the formulas themselves.

Each is run in the case's dtype, with one change.
"""

import math

import accuracy
import cases
import formulas
import pytest
import torch

import dnl_ext
from dnl_ext import reference


def make_case(**fields):
    """A plain attention case, large enough that no error in it is a matter of luck."""
    return cases.make_case(**{"options": {"scale": 0.4, "whiten": "channel"}, **fields})


def from_steps(steps):
    """An implementation with autograd made of a function that returns the output and all gradients."""

    class Steps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, names, options, *inputs):
            ctx.names, ctx.options = names, options
            ctx.save_for_backward(*inputs)
            with torch.no_grad():
                grad = torch.zeros(*inputs[0].shape[:-1], inputs[2].shape[-1], dtype=inputs[0].dtype)
                return steps(**dict(zip(names, inputs, strict=True)), grad=grad, **options)[0].to(inputs[0].dtype)

        @staticmethod
        def backward(ctx, grad):
            inputs = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
            gradients = steps(**inputs, grad=grad, **ctx.options)[1]
            return None, None, *(gradients[name].to(grad.dtype) for name in ctx.names)

    def implementation(*inputs, **options):
        return Steps.apply(cases.ARGUMENTS["disentangled_attention"][: len(inputs)], options, *inputs)

    return implementation


def widened_steps(**inputs):
    """The formulas in float32 sums on 16-bit tensors, as a careful implementation has them."""
    return formulas.disentangled_attention_steps(
        **{name: x.float() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    )


def tf32(x, kind=None):
    """Rounded to the 10 bits of mantissa that a TF32 product keeps."""
    as_integers = x.contiguous().view(torch.int32)
    return ((as_integers + 0x1000) & ~0x1FFF).view(torch.float32)


def tf32_products(**inputs):
    return formulas.disentangled_attention_steps(**inputs, r=lambda x, kind: x if kind == "result" else tf32(x))


def bias_form(query, key, value, mask_logits, *, grad, scale, whiten):
    """Raw q and k with the query mean as a bias per key, and raw k where dS multiplies it."""
    _, gradients = formulas.disentangled_attention_steps(
        query, key, value, mask_logits, grad=grad, scale=scale, whiten=whiten
    )
    mean = query.mean(-2, keepdim=True)
    p = torch.softmax(scale * (query @ key.mT) - scale * (mean @ key.mT), -1)
    ds = p * (grad @ value.mT - (p * (grad @ value.mT)).sum(-1, keepdim=True))
    dq = ds @ key
    gradients["query"] = scale * (dq - dq.mean(-2, keepdim=True))
    gradients["key"] = scale * (ds.mT @ query - ds.sum(-2).unsqueeze(-1) * mean)
    return p @ value + (torch.softmax(mask_logits, -1).unsqueeze(-2) @ value), gradients


def changed(change):
    """The formulas, with `change(output, gradients, inputs, grad)` applied to their results."""

    def steps(**inputs):
        inputs = {name: x.float() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
        output, gradients = formulas.disentangled_attention_steps(**inputs)
        grad = inputs.pop("grad")
        return change(output, gradients, inputs, grad)

    return steps


def dq_keeps_its_mean(output, gradients, inputs, grad):
    unwhitened = {**inputs, "query": inputs["query"] - inputs["query"].mean(-2, keepdim=True), "whiten": None}
    _, raw = formulas.disentangled_attention_steps(**unwhitened, grad=grad)
    return output, {**gradients, "query": raw["query"]}


def unary_left_out_of_dv(output, gradients, inputs, grad):
    _, alone = formulas.disentangled_attention_steps(**{**inputs, "mask_logits": None}, grad=grad)
    return output, {**gradients, "value": alone["value"]}


def dm_without_its_offset(output, gradients, inputs, grad):
    u = torch.softmax(inputs["mask_logits"], -1)
    dot = (inputs["value"] @ grad.sum(-2).unsqueeze(-1)).squeeze(-1)
    return output, {**gradients, "mask_logits": u * dot}


def last_key_left_out(output, gradients, inputs, grad):
    fewer = {name: inputs[name][..., :-1, :] for name in ("key", "value")}
    return formulas.disentangled_attention_steps(
        **{**inputs, **fewer, "mask_logits": inputs["mask_logits"][..., :-1]}, grad=grad
    )[0], gradients


def one_row_twice(output, gradients, inputs, grad):
    output = output.clone()
    output[..., 7, :] = output[..., 8, :]
    return output, gradients


def output_of_five_bits(output, gradients, inputs, grad):
    """What an 8-bit intermediate would leave."""
    mantissa, exponent = torch.frexp(output.float())
    return torch.ldexp((mantissa * 32).round() / 32, exponent), gradients


def dk_left_unscaled(output, gradients, inputs, grad):
    return output, {**gradients, "key": gradients["key"] / inputs["scale"]}


def lse_rounded_into_the_exponent(output, gradients, inputs, grad):
    """P recomputed as 2^(S c - lse c), lse c rounded: where logits are large, every row is off by |lse c| units."""
    _, _, s = formulas._logits(inputs["query"], inputs["key"], inputs["scale"], inputs["whiten"], formulas.exact)
    c = math.log2(math.e)
    p = torch.exp2((s.double() * c - (torch.logsumexp(s, -1, keepdim=True) * c).double()).float())
    u = torch.softmax(inputs["mask_logits"], -1)
    return output, {**gradients, "value": p.mT @ grad + u.unsqueeze(-1) * grad.sum(-2, keepdim=True)}


class TestCheckCanFail:
    @pytest.mark.parametrize("mean", [0.0, 10.0, 30.0])
    @pytest.mark.parametrize("dtype", cases.DTYPES)
    @pytest.mark.parametrize("whiten", ["channel", None])
    def test_the_reference_itself_passes(self, dtype, mean, whiten):
        accuracy.check(
            make_case(dtype=dtype, mean=mean, options={"scale": 0.1, "whiten": whiten}),
            reference.disentangled_attention,
        )

    @pytest.mark.parametrize("mean", [0.0, 10.0, 30.0])
    @pytest.mark.parametrize("dtype", cases.DTYPES)
    def test_the_formulas_pass(self, dtype, mean):
        steps = widened_steps if dtype in (torch.bfloat16, torch.float16) else formulas.disentangled_attention_steps
        accuracy.check(make_case(dtype=dtype, mean=mean), from_steps(steps))

    @pytest.mark.parametrize("mean", [0.0, 10.0, 30.0])
    def test_another_order_of_summation_passes(self, mean):
        order = torch.randperm(83, generator=torch.Generator().manual_seed(1))
        channels = torch.randperm(40, generator=torch.Generator().manual_seed(2))

        def reordered(query, key, value, mask_logits, **options):
            return reference.disentangled_attention(
                query[..., channels], key[..., order, :][..., channels], value[..., order, :], mask_logits[..., order],
                **options,
            )  # fmt: skip

        accuracy.check(make_case(mean=mean), reordered)

    FAULTS = (
        # name, implementation, what must be found in, case
        ("tf32 products", tf32_products, {"output", "query", "key"}, {}),
        ("bias form with raw keys", bias_form, {"output", "query"}, {"mean": 30.0, "signs": "same"}),
        ("dq keeps its mean", changed(dq_keeps_its_mean), {"query"}, {}),
        ("unary left out of dv", changed(unary_left_out_of_dv), {"value"}, {}),
        ("dm without its offset", changed(dm_without_its_offset), {"mask_logits"}, {}),
        ("last key left out", changed(last_key_left_out), {"output"}, {}),
        ("one row twice", changed(one_row_twice), {"output"}, {}),
        ("dk left unscaled", changed(dk_left_unscaled), {"key"}, {}),
        (
            "lse rounded into the exponent",
            changed(lse_rounded_into_the_exponent),
            {"value"},
            {"mean": 30.0, "signs": "same", "options": {"scale": 1.25, "whiten": None}},
        ),
        (
            "output of five bits",
            changed(output_of_five_bits),
            {"output"},
            {"dtype": torch.bfloat16, "options": {"scale": 0.02, "whiten": "channel"}},
        ),
        ("bfloat16 dq keeps its mean", changed(dq_keeps_its_mean), {"query"}, {"dtype": torch.bfloat16}),
    )

    @pytest.mark.parametrize(("name", "steps", "where", "fields"), FAULTS, ids=[fault[0] for fault in FAULTS])
    def test_a_planted_fault_is_found(self, name, steps, where, fields):
        errors = accuracy.measure(make_case(**fields), from_steps(steps))
        assert where <= {error.name for error in errors if not error.passes}, "\n".join(map(str, errors))

    def test_the_failure_names_the_case_and_its_seed(self):
        case = make_case(seed=1234)
        with pytest.raises(AssertionError, match=r"(?s)Case\(seed=1234, .*output: error"):
            accuracy.check(case, lambda *inputs, **options: 2 * reference.disentangled_attention(*inputs, **options))

    def test_a_wrong_dtype_or_shape_is_found(self):
        with pytest.raises(AssertionError, match="output: dtype"):
            accuracy.check(make_case(dtype=torch.bfloat16), lambda *x, **o: widen_output(*x, **o))
        with pytest.raises((AssertionError, RuntimeError)):
            accuracy.check(make_case(), lambda *x, **o: dnl_ext.disentangled_attention(*x, **o)[..., :-1])

    def test_nan_is_found(self):
        def poisoned(*inputs, **options):
            output = reference.disentangled_attention(*inputs, **options)
            return torch.where(torch.arange(output.numel()).view_as(output) == 5, math.nan, output)

        with pytest.raises(AssertionError, match="output: error inf"):
            accuracy.check(make_case(), poisoned)

    def test_the_model_is_of_the_size_of_the_references_error(self):
        """It replaces the bar only where the reference is lucky, so it must not be far above it elsewhere."""
        for dtype in cases.DTYPES:
            case = make_case(dtype=dtype)
            inputs, grad = case.make()
            output, gradients = accuracy.truth_of(case, inputs, grad)
            models = accuracy.modelled_errors(case, inputs, grad, {"output": output, **gradients})
            most = 20 if dtype == torch.float64 else 5
            for error in accuracy.measure(case, reference.disentangled_attention):
                assert 0.05 < models[error.name] / error.reference < most, (dtype, error, models)


def widen_output(*inputs, **options):
    return reference.disentangled_attention(*inputs, **options).float()
