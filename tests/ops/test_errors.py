"""Every wrong call raises, on both routes: the public functions and torch.ops.dnl_ext.*.

A call is a function and its arguments by name, all valid. A fault replaces one argument; the table says which error
must come. What reaches our checks names the argument, what was wanted and what came. What torch itself refuses
(a backend without a kernel, a value of no tensor type) is held to its type alone.
"""

import math
import warnings

import numpy as np
import pytest
import torch
from cases import ARGUMENTS

import dnl_ext
from dnl_ext import reference

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


class TestCallsThemselves:
    """Without a fault, every call of the table succeeds; a table of invalid calls would prove nothing."""

    @pytest.mark.parametrize(("route", "name"), EVERY_CALL)
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_succeed(self, route, name, device):
        call(route, name, CALLS[route](device)[name])


class TestNonTensors:
    @tensors
    def test_none_is_a_type_error(self, route, name, argument):
        if argument == "mask_logits" and name in ("disentangled_attention", "pairwise_forward", "pairwise_backward"):
            pytest.skip("None leaves the unary term out")
        arguments = with_fault(route, name, argument, lambda x: None)
        error = expect(TypeError, route, name, arguments)
        assert str(error).startswith(f"{argument}: expected a torch.Tensor, got None")

    @tensors
    @pytest.mark.parametrize("fault", [list, lambda x: x.numpy(), lambda x: 3, lambda x: 0.5, lambda x: "query"])
    def test_anything_else_is_refused(self, route, name, argument, fault):
        arguments = with_fault(route, name, argument, fault)
        if route == "public":  # torch's own schema check speaks on the other route
            expect(TypeError, route, name, arguments, match=rf"^{argument}: expected a torch\.Tensor, got ")
        else:
            expect((TypeError, RuntimeError), route, name, arguments, match=argument)


class TestDtypes:
    @tensors
    @pytest.mark.parametrize(
        "dtype",
        [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16],
    )
    def test_other_than_float_is_a_value_error(self, route, name, argument, dtype):
        arguments = with_fault(route, name, argument, lambda x: torch.zeros(x.shape, dtype=dtype))
        expect(ValueError, route, name, arguments, match=says(argument))

    @tensors
    @pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.complex32])
    def test_complex_is_not_implemented(self, route, name, argument, dtype):
        arguments = with_fault(route, name, argument, lambda x: torch.zeros(x.shape, dtype=dtype))
        expect(NotImplementedError, route, name, arguments, match=says(argument))

    @several
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_mixed_dtypes_are_a_value_error(self, route, name, argument, dtype, device):
        arguments = with_fault(route, name, argument, lambda x: x.to(dtype), device)
        # The first tensor sets the dtype, so a fault in it is found in the next one.
        expect(ValueError, route, name, arguments, match=r"^\w+: expected .*, got ")

    @tensors
    @pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
    def test_other_than_float_is_refused_on_meta_too(self, route, name, argument, dtype):
        arguments = with_fault(
            route, name, argument, lambda x: torch.zeros(x.shape, dtype=dtype, device="meta"), device="meta"
        )
        expect((ValueError, NotImplementedError), route, name, arguments)


@pytest.mark.filterwarnings("ignore")
class TestLayouts:
    KINDS = (
        ("sparse_coo", lambda x: x.to_sparse()),
        ("sparse_csr", lambda x: x.reshape(x.shape[0], -1).to_sparse_csr()),
        ("mkldnn", lambda x: x.contiguous().to_mkldnn()),
        ("quantized", lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)),
        ("nested", lambda x: torch.nested.nested_tensor(list(x))),
        ("jagged", lambda x: torch.nested.nested_tensor([torch.randn(3, 2), torch.randn(2, 2)], layout=torch.jagged)),
    )

    @tensors
    @pytest.mark.parametrize(("kind", "fault"), KINDS, ids=[kind for kind, _ in KINDS])
    def test_are_not_implemented(self, route, name, argument, kind, fault):
        arguments = with_fault(route, name, argument, fault)
        match = rf"^{argument}: expected a dense strided tensor, got a " if route == "public" else None
        expect(NotImplementedError, route, name, arguments, match=match)


class TestDevices:
    @several
    @pytest.mark.parametrize(("device", "other"), [("cpu", "meta"), ("meta", "cpu")])
    def test_mixed_are_a_value_error(self, route, name, argument, device, other):
        arguments = with_fault(route, name, argument, lambda x: torch.empty_like(x, device=other), device)
        error = expect(
            ValueError, route, name, arguments, match=r"^\w+: expected the device of \w+ \(|on the device of"
        )
        assert "cpu" in str(error) and "meta" in str(error)

    @pytest.mark.parametrize("route", ["public", "raw"])
    def test_one_tensor_on_the_meta_device_stays_there(self, route):
        (x, *_) = CALLS[route]("meta")["mean_subtract"].values()
        y = call(route, "mean_subtract", CALLS[route]("meta")["mean_subtract"])
        assert y.device.type == "meta" and y.shape == x.shape


def drop(x):  # one dimension fewer
    return x[0]


def add(x):  # one dimension more
    return x[None]


def shorter(x):  # the last dimension
    return x[..., :-1]


def longer(x):
    return torch.cat([x, x], -1)


def fewer(x):  # the dimension before the last
    return x[..., :-1, :]


def one_batch(x):  # what broadcasting would accept
    return x[:1]


def scalar(x):
    return x.new_zeros(())


def no_rows(x):
    return x[..., :0, :]


def no_columns(x):
    return x[..., :0]


EVERYWHERE = (scalar, drop, add, one_batch)
# Faults of shape by call and argument; what is not listed is a valid call (another Nq, another Dv).
SHAPES = {
    ("public", "disentangled_attention"): {
        "query": (*EVERYWHERE, shorter, longer, no_columns),
        "key": (*EVERYWHERE, shorter, longer, fewer, no_rows, no_columns),
        "value": (*EVERYWHERE, fewer, no_rows),
        "mask_logits": (*EVERYWHERE, shorter, longer, no_columns, lambda x: x.unsqueeze(-1), lambda x: x.unsqueeze(-2)),
    },
    ("public", "pairwise_softmax"): {
        "query": (*EVERYWHERE, shorter, longer, no_columns),
        "key": (*EVERYWHERE, shorter, longer, no_rows, no_columns),
    },
    ("public", "unary_attention"): {
        "mask_logits": (*EVERYWHERE, shorter, longer, no_columns, lambda x: x.unsqueeze(-1)),
        "value": (*EVERYWHERE, fewer, no_rows),
    },
    ("public", "unary_softmax"): {"mask_logits": (scalar, no_columns)},
    ("public", "mean_subtract"): {"x": (scalar,)},
    ("public", "whiten"): {"x": (scalar, lambda x: x[0, 0])},
    ("raw", "whiten_backward"): {
        "grad_output": (*EVERYWHERE, fewer, shorter, longer, no_rows, no_columns),
        "output": (*EVERYWHERE, fewer, shorter, longer, no_rows, no_columns),
        "rstd": (scalar, add, one_batch, longer, no_columns),
    },
    ("raw", "softmax_backward"): {
        "grad_output": (*EVERYWHERE, shorter, longer, no_columns),
        "output": (*EVERYWHERE, shorter, longer, no_columns),
    },
    ("raw", "unary_backward"): {
        "grad_pooled": (*EVERYWHERE, shorter, longer),
        "mask_logits": (*EVERYWHERE, shorter, longer, no_columns),
        "value": (*EVERYWHERE, fewer, shorter, no_rows),
        "pooled": (*EVERYWHERE, shorter, longer),
        "lse": (scalar, add, one_batch, longer, no_columns),
    },
    ("raw", "pairwise_backward"): {
        "grad_output": (*EVERYWHERE, fewer, shorter, longer, no_rows, no_columns),
        "query": (*EVERYWHERE, fewer, shorter, longer, no_columns),
        "key": (*EVERYWHERE, fewer, shorter, longer, no_rows, no_columns),
        "value": (*EVERYWHERE, fewer, shorter, longer, no_rows),
        "mask_logits": (*EVERYWHERE, shorter, longer, no_columns),
        "output": (*EVERYWHERE, fewer, shorter, longer, no_rows, no_columns),
        "softmax_stats": (*EVERYWHERE, shorter, longer, no_columns),
        "residual": (scalar, drop, lambda x: x.new_zeros(B, NQ, DV + 1), lambda x: x.new_zeros(B, NQ, 1)),
        "pooled": (*EVERYWHERE, shorter, longer, no_columns),
        "mask_lse": (scalar, add, one_batch, longer, no_columns),
    },
}
SHAPES["public", "pairwise_attention"] = {
    name: faults for name, faults in SHAPES["public", "disentangled_attention"].items() if name != "mask_logits"
}
SHAPES["raw", "pairwise_forward"] = SHAPES["public", "disentangled_attention"]
SHAPES["raw", "unary_forward"] = SHAPES["public", "unary_attention"]
SHAPES["raw", "whiten_forward"] = SHAPES["public", "whiten"]
SHAPES["raw", "softmax"] = {"x": (scalar, no_columns)}
SHAPES["raw", "mean_subtract"] = {"x": (scalar,)}
WRONG_SHAPES = [
    pytest.param(route, name, argument, fault, id=f"{route}-{name}-{argument}-{i}-{fault.__name__.strip('<>')}")
    for (route, name), faults in SHAPES.items()
    for argument in faults
    for i, fault in enumerate(faults[argument])
]


class TestShapes:
    def test_every_call_is_in_the_table(self):
        assert set(SHAPES) == set(EVERY_CALL)

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    @pytest.mark.parametrize(("route", "name", "argument", "fault"), WRONG_SHAPES)
    def test_a_wrong_one_is_a_value_error(self, route, name, argument, fault, device):
        """On the meta device too: there a call is only its checks, and tracing goes that way."""
        arguments = with_fault(route, name, argument, fault, device)
        expect(ValueError, route, name, arguments, match=r"^\w+: expected .*, got ")

    def test_the_message_names_argument_wanted_and_got(self):
        x = attention_inputs()
        with pytest.raises(ValueError, match=r"^key: expected shape \(2, 7, 3\), got \(2, 7, 2\)$"):
            dnl_ext.pairwise_attention(x["query"], x["key"][..., :2], x["value"])
        with pytest.raises(ValueError, match=r"^value: expected shape \(2, 7, 4\), got \(2, 6, 4\)$"):
            dnl_ext.pairwise_attention(x["query"], x["key"], x["value"][:, :6])
        with pytest.raises(ValueError, match=r"^mask_logits: expected shape \(2, 7\), got \(2, 7, 1\)$"):
            dnl_ext.disentangled_attention(x["query"], x["key"], x["value"], x["mask_logits"].unsqueeze(-1))

    def test_dimension_out_of_range(self):
        x = torch.zeros(2, 3)
        for dim in (2, -3, 100, -(2**40)):
            with pytest.raises(ValueError, match=rf"^dim: expected a value from -2 to 1, got {dim}$"):
                dnl_ext.mean_subtract(x, dim)
            with pytest.raises(ValueError, match=r"^dim: expected"):
                dnl_ext.mean_subtract(x.to("meta"), dim)
        with pytest.raises(ValueError, match=r"^x: expected"):
            dnl_ext.mean_subtract(torch.tensor(1.0), 0)


SCALED = [(route, name) for route, name in EVERY_CALL if "pairwise" in name or "disentangled" in name]
scaled = pytest.mark.parametrize(("route", "name"), SCALED)


class TestOptions:
    @scaled
    @pytest.mark.parametrize("whiten", ["nln", "Channel", "", "none", "channels", "bn-like", "ln-like"])
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_unknown_whiten_is_a_value_error(self, route, name, whiten, device):
        arguments = {**CALLS[route](device)[name], "whiten": whiten}
        expect(ValueError, route, name, arguments, match=rf"^whiten: expected one of .*, got '{whiten}'$")

    @scaled
    @pytest.mark.parametrize("whiten", [True, False, 1, ("channel",), torch.tensor(1.0)])
    def test_whiten_of_another_type_is_refused(self, route, name, whiten):
        arguments = {**CALLS[route]()[name], "whiten": whiten}
        wanted = (TypeError, ValueError) if route == "public" else (TypeError, ValueError, RuntimeError)
        expect(wanted, route, name, arguments, match="whiten")

    @pytest.mark.parametrize(("route", "name"), SCALED)
    @pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_scale_that_is_no_number_is_a_value_error(self, route, name, scale, device):
        arguments = {**CALLS[route](device)[name], "scale": scale}
        expect(ValueError, route, name, arguments, match=r"^scale: expected a finite number, got -?(nan|inf)")

    @pytest.mark.parametrize("name", ["disentangled_attention", "pairwise_attention", "pairwise_softmax"])
    @pytest.mark.parametrize("scale", ["0.5", True, [0.5], torch.tensor(0.5), 1j])
    def test_scale_of_another_type_is_a_type_error(self, name, scale):
        expect(TypeError, "public", name, {**public_calls()[name], "scale": scale}, match=r"^scale: expected")

    @pytest.mark.parametrize("name", ["disentangled_attention", "pairwise_attention", "pairwise_softmax"])
    @pytest.mark.parametrize("scale", [1, np.float64(0.5)])
    def test_scale_may_be_any_real_number(self, name, scale):
        actual = call("public", name, {**public_calls()[name], "scale": scale})
        assert torch.equal(actual, call("public", name, {**public_calls()[name], "scale": float(scale)}))

    @pytest.mark.parametrize("dim", ["0", None, 0.5, (0, 1)])
    def test_dim_of_another_type_is_refused(self, dim):
        with pytest.raises((TypeError, ValueError), match=r"^dim: expected"):
            dnl_ext.mean_subtract(torch.zeros(2, 3), dim)

    def test_options_are_keywords_only(self):
        x = attention_inputs()
        with pytest.raises(TypeError):
            dnl_ext.disentangled_attention(*x.values(), 0.5)
        with pytest.raises(TypeError):
            dnl_ext.pairwise_attention(x["query"], x["key"], x["value"], 0.5)
        with pytest.raises(TypeError):
            dnl_ext.pairwise_softmax(x["query"], x["key"], 0.5)

    def test_the_reference_refuses_unknown_whiten_too(self):
        x = attention_inputs()
        with pytest.raises(ValueError, match="whiten"):
            reference.disentangled_attention(*x.values(), whiten="nln")


class TestUnderVmap:
    """Under vmap an operator's checks see the batched tensor; its own dimensions are one fewer."""

    CALLS = (
        ("mean of a vector over dim -2", dnl_ext.mean_subtract, ((6,),)),
        ("softmax of a number", dnl_ext.unary_softmax, ((),)),
        ("attention of vectors", dnl_ext.pairwise_attention, ((6,), (6,), (6,))),
        ("map of vectors", dnl_ext.pairwise_softmax, ((6,), (6,))),
        ("pooling of a vector", dnl_ext.unary_attention, ((), (6,))),
        ("mean over dim -3 of a matrix", lambda x: dnl_ext.mean_subtract(x, -3), ((5, 6),)),
        ("mean over dim 2 of a matrix", lambda x: dnl_ext.mean_subtract(x, 2), ((5, 6),)),
        ("keys of another width", dnl_ext.pairwise_attention, ((5, 6), (7, 5), (7, 4))),
        ("mask logits that broadcast", dnl_ext.unary_attention, ((1,), (7, 4))),
    )

    @pytest.mark.parametrize(("name", "function", "shapes"), CALLS, ids=[name for name, _, _ in CALLS])
    def test_a_wrong_shape_is_a_value_error(self, name, function, shapes):
        inputs = [torch.zeros(4, *shape) for shape in shapes]
        with pytest.raises(ValueError, match=r"^\w+: expected"):
            function(*(x[0] for x in inputs))
        with pytest.raises(ValueError, match=r"^\w+: expected"):
            torch.func.vmap(function)(*inputs)
