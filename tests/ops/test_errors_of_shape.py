"""Wrong shapes raise, on both routes, on the meta device and under vmap; see test_errors.py."""

import pytest
import torch
from calls import DV, EVERY_CALL, NQ, B, attention_inputs, expect, with_fault

import dnl_ext


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
