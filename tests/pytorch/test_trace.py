"""torch.jit.trace: functions and blocks, saved and loaded, equal on sizes other than the traced one, gradients too."""

import io
import warnings

import pytest
import torch
from blocks import BLOCKS, dimensions, make_input, scramble
from cases import ARGUMENTS
from inputs import function, make

import dnl_ext
from dnl_ext.modules import GlobalContext2d, NonLocal2d, RelationModule, SimplifiedNonLocal2d

every_op = pytest.mark.parametrize("op", ARGUMENTS)

SIZES = (
    {"lead": (2,), "nq": 4, "nk": 5, "dqk": 3, "dv": 2},
    {"lead": (3,), "nq": 11, "nk": 7, "dqk": 3, "dv": 2},
    {"lead": (1,), "nq": 1, "nk": 1, "dqk": 3, "dv": 2},
)
SPATIAL = {1: ((11,), (17,), (3,)), 2: ((5, 6), (9, 4), (2, 2)), 3: ((2, 4, 3), (1, 2, 5), (3, 2, 2))}
BLOCKS_2D = {
    **{name: (lambda name=name: BLOCKS[2](8, variant=name)) for name in ("nl", "pairwise", "unary", "dnl_shared_key")},
    **{name: (lambda name=name: BLOCKS[2](8, whiten=name)) for name in ("spatial", "ln", "fln", "in", "bn")},
    "mmseg": lambda: BLOCKS[2].mmseg(8, reduction=2),
    "official": lambda: BLOCKS[2].official(8),
    "gaussian": lambda: NonLocal2d(8, mode="gaussian"),
    "dot product": lambda: NonLocal2d(8, mode="dot_product"),
    "concatenation": lambda: NonLocal2d(8, mode="concatenation"),
    "sub-sampled": lambda: NonLocal2d(8, sub_sample=True),
    "context": lambda: GlobalContext2d(8, ratio=0.5),
    "simplified": lambda: SimplifiedNonLocal2d(8),
}


def trace(f, inputs):
    """Traced, saved and loaded. A warning of the tracer, that something may not be as traced, is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch prefers torch.export
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(f, inputs)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        return torch.jit.load(file)


def assert_equal_with_gradients(traced, f, inputs):
    ours, theirs = ([x.detach().clone().requires_grad_() for x in inputs] for _ in range(2))
    y, expected = traced(*ours), f(*theirs)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(y.square().sum(), ours),
        torch.autograd.grad(expected.square().sum(), theirs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def without_defaults(op):
    """The function with a scale: by default it is that of the traced query's width, of which the tracer warns."""
    if op in ("disentangled_attention", "pairwise_attention", "pairwise_softmax"):
        return lambda *x: function(op)(*x, scale=0.4)
    return lambda *x: function(op)(*x)


class TestFunctions:
    @every_op
    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_other_sizes(self, op, requires_grad):
        f = without_defaults(op)
        traced = trace(f, tuple(x.requires_grad_(requires_grad) for x in make(op)))
        for size in SIZES:
            assert_equal_with_gradients(traced, f, make(op, **size))

    @pytest.mark.parametrize("whiten", [None, "spatial", "ln", "fln"])
    def test_whitenings(self, whiten):
        def f(*x):
            return dnl_ext.disentangled_attention(*x, scale=0.4, whiten=whiten)

        traced = trace(f, tuple(make("disentangled_attention")))
        for size in SIZES:
            assert_equal_with_gradients(traced, f, make("disentangled_attention", **size))

    def test_a_scale_that_depends_on_the_width_is_that_of_the_traced_query(self):
        inputs = tuple(make("disentangled_attention"))
        with pytest.warns(torch.jit.TracerWarning, match="float"):
            traced = torch.jit.trace(dnl_ext.disentangled_attention, inputs)
        assert torch.equal(traced(*inputs), dnl_ext.disentangled_attention(*inputs))

    def test_16_bit_gradients(self):
        """A trace is the same for inference and keeps no residual: Delta is read off the rounded output."""
        f = without_defaults("disentangled_attention")
        traced = trace(f, tuple(make("disentangled_attention", dtype=torch.bfloat16)))
        inputs = make("disentangled_attention", nq=21, nk=33, dtype=torch.bfloat16)
        ours, theirs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
        y, expected = traced(*ours), f(*theirs)
        assert torch.equal(y, expected)
        y.sum().backward()
        expected.sum().backward()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=0.05, atol=0.05)


class TestBlocks:
    def compare(self, block, dims):
        block = scramble(block.double()).eval()
        traced = trace(block, make_input(dims))
        for batch, spatial in zip((2, 3, 1), SPATIAL[dims], strict=True):
            assert_equal_with_gradients(traced, block, [make_input(dims, batch=batch, spatial=spatial)])

    @dimensions
    def test_other_sizes(self, dims):
        self.compare(BLOCKS[dims](8), dims)

    @pytest.mark.parametrize("name", BLOCKS_2D)
    def test_other_sizes_of_variants(self, name):
        self.compare(BLOCKS_2D[name](), 2)

    def test_multihead_attention(self):
        module = scramble(dnl_ext.DisentangledMultiheadAttention(8, 2).double())
        query, key = torch.randn(5, 2, 8, dtype=torch.float64), torch.randn(7, 2, 8, dtype=torch.float64)

        class Attend(torch.nn.Module):  # a lambda would make constants of the weights
            def __init__(self):
                super().__init__()
                self.attention = module

            def forward(self, query, key):
                return self.attention(query, key, key, need_weights=False)[0]

        traced = trace(Attend(), (query, key))
        for batch, length in ((2, 5), (3, 9), (1, 1)):
            q, k = (torch.randn(n, batch, 8, dtype=torch.float64) for n in (length, length + 2))
            torch.testing.assert_close(traced(q, k), module(q, k, k, need_weights=False)[0], rtol=1e-12, atol=1e-12)

    def test_relations(self):
        module = scramble(RelationModule(16, num_relations=2, key_channels=8, geometry_channels=16).double())
        corner = torch.rand(9, 2, dtype=torch.float64)
        boxes = torch.cat([corner, corner + torch.rand(9, 2, dtype=torch.float64)], -1) * 100
        features = torch.randn(9, 16, dtype=torch.float64)
        traced = trace(module, (features[:4], boxes[:4]))
        for objects in (4, 9, 1):
            x, y = features[:objects], boxes[:objects]
            torch.testing.assert_close(traced(x, y), module(x, y), rtol=1e-12, atol=1e-12)
