"""torch.compile: one graph, no graph break, no recompilation for a new N, forward and backward.

Inductor, the default backend, on every function and on a block; the other blocks by aot_eager, which traces and
differentiates as inductor does but compiles nothing, and by inductor with --slow. Functions call the same operators
compiled or not and are equal to the last bit; what inductor fuses around them is held to the bar of accuracy.py.
"""

import contextlib
import copy
import functools
import itertools

import pytest
import torch
from accuracy import BAR, distance
from blocks import BLOCKS, dimensions, make_input, run, scramble
from cases import ARGUMENTS, ATTENTION
from inputs import function, make
from toolchain import TORCH, needs_compiler, needs_gpu
from torch import nn
from torch._dynamo.exc import RecompileError
from torch._dynamo.utils import counters
from torch._inductor.exc import InductorError
from torch.autograd import forward_ad

import dnl_ext
from dnl_ext.modules import GlobalContext2d, NonLocal2d, SimplifiedNonLocal2d

every_op = pytest.mark.parametrize("op", ARGUMENTS)

#: No two sizes alike: torch takes sizes that are equal in the first call for one and the same in all later ones.
SIZES = (
    {"lead": (2,), "nq": 7, "nk": 11, "dqk": 5, "dv": 3},
    {"lead": (4,), "nq": 13, "nk": 6, "dqk": 5, "dv": 3},
    {"lead": (3,), "nq": 5, "nk": 17, "dqk": 5, "dv": 3},
)
SPATIAL = {1: ((11,), (17,), (9,)), 2: ((5, 6), (9, 4), (7, 11)), 3: ((4, 5, 6), (7, 3, 4), (5, 6, 3))}
BATCHES = (2, 3, 13)

VARIANTS = {
    "nl": lambda: BLOCKS[2](8, variant="nl"),
    "pairwise": lambda: BLOCKS[2](8, variant="pairwise"),
    "unary": lambda: BLOCKS[2](8, variant="unary"),
    "shared key": lambda: BLOCKS[2](8, variant="dnl_shared_key"),
    "official": lambda: BLOCKS[2].official(8),
    "sub-sampled": lambda: BLOCKS[2](8, sub_sample="after"),
    "batch norm": lambda: BLOCKS[2](8, whiten="bn"),
    "layer norm": lambda: BLOCKS[2](8, whiten="ln"),
    "gaussian": lambda: NonLocal2d(8, mode="gaussian"),
    "dot product": lambda: NonLocal2d(8, mode="dot_product"),
    "concatenation": lambda: NonLocal2d(8, mode="concatenation"),
    "context": lambda: GlobalContext2d(8, ratio=0.5),
    "simplified": lambda: SimplifiedNonLocal2d(8),
}


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@contextlib.contextmanager
def one_graph():
    """Fails on a recompilation and on a graph break, and unless everything inside is one graph."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


def assert_equal_with_gradients(compiled, f, inputs):
    """Output, its strides and the gradients of all inputs, to the last bit."""
    ours, theirs = ([x.detach().clone().requires_grad_() for x in inputs] for _ in range(2))
    y, expected = compiled(*ours), f(*theirs)
    assert torch.equal(y, expected) and y.stride() == expected.stride()
    grads = torch.autograd.grad(y.square().sum(), ours)
    for a, b in zip(grads, torch.autograd.grad(expected.square().sum(), theirs), strict=True):
        assert torch.equal(a, b)


def options_of(op):
    """Calls of an operator that trace differently."""
    if op in ATTENTION:
        return [{"scale": 0.3, "whiten": None}, {"whiten": "ln"}]
    return [{"name": "in"}] if op == "whiten" else [{}]


class TestFunctions:
    def compare(self, op, backend, dynamic, sizes, **kind):
        for options in options_of(op):
            torch.compiler.reset()
            counters.clear()

            def f(*x, options=options):
                return function(op)(*x, **options)

            compiled = torch.compile(f, fullgraph=True, backend=backend, dynamic=dynamic)
            with one_graph():
                for size in sizes:
                    assert_equal_with_gradients(compiled, f, make(op, **size, **kind))

    @needs_compiler
    @every_op
    @pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
    def test_by_inductor(self, op, dynamic):
        if op == "pairwise_softmax":
            pytest.skip("inductor fuses around it: see test_by_inductor_within_the_bar")
        self.compare(op, "inductor", dynamic, SIZES if dynamic else SIZES[:1], dtype=torch.float32)

    @needs_compiler
    @pytest.mark.parametrize("op", ["pairwise_softmax", "disentangled_attention"])
    @pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
    def test_by_inductor_within_the_bar(self, op, dtype):
        compiled = torch.compile(function(op), fullgraph=True, dynamic=True)
        with one_graph():
            for size in SIZES:
                inputs = make(op, **size, dtype=dtype)
                truth = [x.double() for x in inputs]
                ours, theirs, wide = (
                    output_and_gradients(f, x)
                    for f, x in (
                        (compiled, inputs),
                        (function(op, dnl_ext.reference), inputs),
                        (function(op, dnl_ext.reference), truth),
                    )
                )
                assert_within_the_bar(ours, theirs, wide)

    @every_op
    @pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.slow)])
    def test_channel_first_by_aot_eager(self, op, dtype):
        self.compare(op, "aot_eager", True, SIZES, dtype=dtype, layout="channel_first")

    @pytest.mark.parametrize("op", ["disentangled_attention", "unary_attention", "whiten"])
    def test_a_second_size_makes_the_shapes_dynamic(self, op):
        """By default torch compiles the first size as it is, and at the second one, once, for all to come."""
        compiled = torch.compile(function(op), fullgraph=True, backend="aot_eager")
        for size in SIZES:
            assert_equal_with_gradients(compiled, function(op), make(op, **size))
        assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]

    def test_without_mask_logits(self):
        def f(q, k, v):
            return dnl_ext.disentangled_attention(q, k, v, None, scale=0.3)

        compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
        with one_graph():
            for size in SIZES:
                assert_equal_with_gradients(compiled, f, make("pairwise_attention", **size))

    def test_without_gradients(self):
        compiled = torch.compile(dnl_ext.disentangled_attention, fullgraph=True, backend="aot_eager")
        inputs = make("disentangled_attention")
        with torch.no_grad():
            assert torch.equal(compiled(*inputs), dnl_ext.disentangled_attention(*inputs))

    def test_a_wrong_shape_is_still_an_error(self):
        q, k, v, m = make("disentangled_attention")
        compiled = torch.compile(dnl_ext.disentangled_attention, fullgraph=True, backend="aot_eager")
        with pytest.raises(Exception, match="key: expected shape"):
            compiled(q, k[..., :-1], v, m)

    def test_a_transform_of_torch_func_inside(self):
        """Before torch 2.15 it is an error: its gradient would lack the attention (docs/pytorch.md)."""
        inputs = make("disentangled_attention")

        def gradient(*x):
            return torch.func.grad(lambda *x: dnl_ext.disentangled_attention(*x).square().sum())(*x)

        expected = gradient(*inputs)
        assert expected.abs().max() > 0
        compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
        if TORCH < (2, 15):
            with pytest.raises(Exception, match="setup_context"):
                compiled(*inputs)
        else:
            torch.testing.assert_close(compiled(*inputs), expected)

    @pytest.mark.parametrize("op", ["disentangled_attention", "unary_attention"])
    @pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
    def test_forward_mode_leaves_the_graph(self, op, inside):
        """In one the operators would have no tangents, and nobody would hear of it."""
        inputs = make(op)

        def tangent(f):
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(f(*(forward_ad.make_dual(x, x.cos()) for x in inputs))).tangent

        def run(f, **options):
            compiled = functools.partial(torch.compile, backend="aot_eager", **options)
            return compiled(lambda: tangent(f))() if inside else tangent(compiled(f))

        torch.testing.assert_close(run(function(op)), tangent(function(op)))
        torch.compiler.reset()
        with pytest.raises(Exception, match="dnl_ext: forward mode"):
            run(function(op), fullgraph=True)


def output_and_gradients(f, inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = f(*leaves)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def assert_within_the_bar(ours, theirs, truth):
    """Errors of output and gradients against `truth`, at most BAR times those of plain PyTorch, `theirs`."""
    for i, (a, b, exact) in enumerate(zip(ours, theirs, truth, strict=True)):
        error, reference = distance(a, exact), distance(b, exact)
        assert error <= BAR["gradient" if i else "output"] * reference, f"result {i}: {error} against {reference}"


def inputs_of(dims, dtype=torch.float64):
    for batch, spatial in zip(BATCHES, SPATIAL[dims], strict=True):
        yield make_input(dims, batch=batch, spatial=spatial, dtype=dtype)


def everything_of(module, x):
    """Output, gradient of the input, gradients of all parameters as one vector."""
    y, dx, grads = run(module, x)
    return [y, dx, torch.cat([grad.flatten() for grad in grads.values()])]


def check_block(block, dims, sizes, dynamic=False, compile_plain=False):
    """Training steps of a compiled copy in float32, held to the bar; plain PyTorch is the block's own reference."""
    plain = copy.deepcopy(scramble(block))
    plain.backend = "reference"
    wide = copy.deepcopy(plain).double()
    compile_module = functools.partial(torch.compile, fullgraph=True, dynamic=dynamic)
    modules = compile_module(block), compile_module(plain) if compile_plain else plain
    for x in itertools.islice(inputs_of(dims), sizes):
        narrow = x.detach().float()
        results = (everything_of(module, narrow) for module in modules)
        assert_within_the_bar(*results, everything_of(wide, narrow.double()))


class TestBlocks:
    def compare(self, block, dims):
        """Training steps in float64, running statistics included."""
        block = scramble(block.double())
        ours = copy.deepcopy(block)
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
        with one_graph():
            for x in inputs_of(dims):
                for actual, expected in zip(everything_of(compiled, x), everything_of(block, x), strict=True):
                    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        for name, buffer in block.named_buffers():
            torch.testing.assert_close(ours.get_buffer(name), buffer)

    @dimensions
    def test_dynamic_sizes(self, dims):
        self.compare(BLOCKS[dims](8), dims)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", VARIANTS)
    def test_dynamic_sizes_of_variants(self, name):
        self.compare(VARIANTS[name](), 2)

    @needs_compiler
    def test_a_training_step_by_inductor(self):
        check_block(BLOCKS[2].mmseg(8, reduction=2), 2, sizes=1)

    @needs_compiler
    @pytest.mark.slow
    @pytest.mark.parametrize("name", VARIANTS)
    def test_a_training_step_of_variants_by_inductor(self, name):
        # The unary term's map is the same at all positions: there inductor's batch norm, whatever attention comes
        # before it, is eight times less accurate than eager's.
        check_block(VARIANTS[name](), 2, sizes=1, compile_plain=name == "unary")

    @needs_compiler
    @pytest.mark.parametrize(
        "dims", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
    )
    def test_inference_by_inductor_with_dynamic_sizes(self, dims):
        block = scramble(BLOCKS[dims](8)).eval()
        compiled = torch.compile(copy.deepcopy(block), fullgraph=True, dynamic=True)
        with one_graph(), torch.no_grad():
            for x in inputs_of(dims, torch.float32):
                torch.testing.assert_close(compiled(x), block(x), rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.slow
class TestLimitsOfTorch:
    """What docs/pytorch.md says of torch before 2.15. When one of these passes there, that text is wrong."""

    def test_results_of_training_with_dynamic_sizes_are_right(self):
        check_block(BLOCKS[2](8), 2, sizes=3, dynamic=True)

    @pytest.mark.parametrize("block", [BLOCKS[2](8), nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))])
    @pytest.mark.xfail(
        TORCH < (2, 15),
        strict=True,
        raises=RecompileError,
        reason="pytorch #191885: strides of saved activations become constants",
    )
    def test_training_with_dynamic_sizes_compiles_once(self, block):
        compiled = torch.compile(block, fullgraph=True, dynamic=True)
        with one_graph():
            for x in inputs_of(2, torch.float32):
                run(compiled, x)

    @pytest.mark.parametrize("name", ["dot product", "concatenation"])
    @pytest.mark.xfail(
        TORCH < (2, 15),
        strict=True,
        raises=InductorError,
        reason="pytorch #185510: inductor compares symbolic strides as if they were numbers",
    )
    def test_modes_without_a_softmax_train_with_dynamic_sizes(self, name):
        check_block(VARIANTS[name](), 2, sizes=1, dynamic=True)


@needs_gpu
class TestReduceOverhead:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_on_a_side_stream(self, dtype):
        """CUDA graphs are captured, then replayed: operators launch on the current stream and allocate from torch."""
        inputs = [x.cuda() for x in make("disentangled_attention", nq=33, nk=47, dqk=40, dv=24, dtype=dtype)]
        compiled = torch.compile(dnl_ext.disentangled_attention, fullgraph=True, mode="reduce-overhead")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for step in range(4):  # warm-up, capture, replays
                torch.compiler.cudagraph_mark_step_begin()
                ours, theirs = ([(x + step).requires_grad_() for x in inputs] for _ in range(2))
                y, expected = compiled(*ours), dnl_ext.disentangled_attention(*theirs)
                grads = torch.autograd.grad(y.square().sum(), ours)
                expected_grads = torch.autograd.grad(expected.square().sum(), theirs)
                for a, b in zip((y, *grads), (expected, *expected_grads), strict=True):
                    assert torch.equal(a, b)
        torch.cuda.current_stream().wait_stream(stream)
        assert not counters["inductor"]["cudagraph_skips"]
