"""torch.fx: every block and function traces; the traced module computes, trains, fits any size and checks its input."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.fx
from blocks import make_input, run, scramble
from cases import ARGUMENTS
from inputs import function, make
from test_layers import MAKE, build, inputs_of
from test_multihead_masks import MASKS, tokens
from torch import nn

import dnl_ext
from dnl_ext.modules import DisentangledMultiheadAttention, DisentangledNonLocal2d, GlobalContext2d, RelationModule


def other_inputs(block):
    """Of other sizes than those of `inputs_of`."""
    if isinstance(block, RelationModule):
        features, boxes = inputs_of(block)
        return features[:3], boxes[:3]
    if isinstance(block, DisentangledMultiheadAttention):
        return (make_input(1, 8, batch=3, spatial=(4,)).mT,)
    return (make_input(block.dims, 8, batch=3, spatial=(4, 7, 5)[: block.dims]),)


def results(module, inputs):
    """Output, and gradients of inputs and parameters by name: a graph holds layers in the order of their calls."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = module(*inputs)
    module.zero_grad()
    y.square().sum().backward()
    return {
        "y": y,
        **{str(i): x.grad for i, x in enumerate(inputs)},
        **{n: p.grad for n, p in module.named_parameters()},
    }


def assert_identical(ours, expected):
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("name", MAKE)
def test_blocks(name, backend):
    """Equal to the last bit, in training and evaluation, on the sizes of no trace: a trace has seen none."""
    block = build(name)
    if backend == "reference":
        if isinstance(block, RelationModule):
            pytest.skip("it has no backends")
        block.backend = backend
    for training in (True, False):
        block.train(training)
        traced = torch.fx.symbolic_trace(copy.deepcopy(block))
        traced.graph.eliminate_dead_code()
        traced.recompile()
        for inputs in (inputs_of(block), other_inputs(block)):
            assert_identical(results(traced, inputs), results(block, inputs))
        assert_identical(traced.state_dict(), block.state_dict())
    traced.to(torch.float32)
    assert all(p.dtype == torch.float32 for p in traced.parameters())
    restored = pickle.loads(pickle.dumps(traced))
    inputs = [x.float() for x in inputs_of(block)]
    assert torch.equal(restored(*inputs), traced(*inputs))


def test_the_graph_holds_functions_and_layers():
    """Attention is one call of the public function, each layer one call of its module, the check one in front."""
    graph = torch.fx.symbolic_trace(DisentangledNonLocal2d(8)).graph
    functions = [node.target for node in graph.nodes if node.op == "call_function"]
    assert functions.count(dnl_ext.disentangled_attention) == 1
    modules = [node.target for node in graph.nodes if node.op == "call_module"]
    assert sorted(modules) == ["conv_key", "conv_mask", "conv_out", "conv_query", "conv_value", "norm"]


@pytest.mark.parametrize("make_block", [lambda: DisentangledNonLocal2d(8), lambda: GlobalContext2d(8, ratio=0.5)])
def test_checks_stay_in_the_graph(make_block):
    traced = torch.fx.symbolic_trace(make_block())
    traced.graph.eliminate_dead_code()
    traced.recompile()
    with pytest.raises(ValueError, match="input: expected 8 channels"):
        traced(torch.zeros(1, 4, 3, 3))
    with pytest.raises(TypeError, match=r"input: expected a torch\.Tensor"):
        traced([1.0])


@pytest.mark.parametrize("name", ["dnl_ext", "reference"])
@pytest.mark.parametrize("op", ARGUMENTS)
def test_functions(op, name):
    """By their names in the package, one node each; where options are given too."""
    package = dnl_ext if name == "dnl_ext" else dnl_ext.reference
    options = {"scale": 0.3} if "scale" in inspect.signature(function(op)).parameters else {}

    def call(*x):
        return getattr(package, op)(*x, **options)

    inputs = make(op)
    root = {  # torch.fx takes no variable number of arguments
        1: lambda a: call(a),
        2: lambda a, b: call(a, b),
        3: lambda a, b, c: call(a, b, c),
        4: lambda a, b, c, d: call(a, b, c, d),
    }
    traced = torch.fx.symbolic_trace(root[len(inputs)])
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [getattr(package, op)]
    assert torch.equal(traced(*inputs), getattr(package, op)(*inputs, **options))


@pytest.mark.parametrize("kind", MASKS)
def test_multihead_attention_with_every_argument(kind):
    """Its arguments stay arguments: masks, weights and layouts are looked at when the graph runs."""
    module = scramble(DisentangledMultiheadAttention(8, 2, batch_first=True, unary=False).double())
    traced, x = torch.fx.symbolic_trace(module), tokens()
    for options in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        pairs = zip(*(f(x, x, x, **MASKS[kind], **options) for f in (traced, module)), strict=True)
        for ours, expected in pairs:
            assert (ours is None) == (expected is None)
            if ours is not None:
                torch.testing.assert_close(ours, expected, rtol=0.0, atol=0.0, equal_nan=True)
    assert torch.equal(traced(x[0], x[0], x[0])[0], module(x[0], x[0], x[0])[0])


def test_in_a_network():
    """Trained from the graph alone, step by step as the network itself."""

    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), DisentangledNonLocal2d.mmseg(8), nn.ReLU()).double()

    losses = []
    for module in (network(), torch.fx.symbolic_trace(network())):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            loss = module(make_input(2, 3)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:4] == losses[4:] and losses[3] < losses[0]


def test_traced_blocks_compile():
    block = scramble(DisentangledNonLocal2d(8).double())
    traced = torch.fx.symbolic_trace(copy.deepcopy(block))
    torch.compiler.reset()
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(run(compiled, make_input(2))[:2], run(block, make_input(2))[:2], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_script_says_what_is_supported(name):
    for module in (MAKE[name](), nn.Sequential(MAKE[name]())):
        with pytest.raises(NotImplementedError, match=r"torch\.jit\.script: .* torch\.compile and torch\.export are"):
            torch.jit.script(module)
