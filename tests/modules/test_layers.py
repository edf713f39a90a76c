"""Every layer of every block is called, and never read: hooks, parametrizations and replacements of it work."""

import copy
import functools
import warnings

import pytest
import torch
from blocks import BLOCKS, make_input, scramble
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from dnl_ext.modules import (
    DisentangledMultiheadAttention,
    DisentangledNonLocal2d,
    GlobalContext2d,
    GlobalContext3d,
    NonLocal1d,
    NonLocal2d,
    NonLocal3d,
    RelationModule,
    SimplifiedNonLocal1d,
    SimplifiedNonLocal2d,
)

MODES = ("embedded_gaussian", "gaussian", "dot_product", "concatenation")
VARIANTS = ("nl", "pairwise", "unary", "dnl_shared_key", "dnl")
group_norm = functools.partial(nn.GroupNorm, 2)


class Weights(DisentangledMultiheadAttention):
    """With the weights, which go another way."""

    def forward(self, x):
        return super().forward(x, x, x)[0]


class NoWeights(DisentangledMultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


def blocks():
    """Every block in every style, and each option that has a layer of its own or takes another way to one."""
    plain, mmseg, official = DisentangledNonLocal2d, DisentangledNonLocal2d.mmseg, DisentangledNonLocal2d.official
    for name in VARIANTS:
        yield f"plain {name}", functools.partial(plain, 8, variant=name)
        yield f"mmseg {name}", functools.partial(mmseg, 8, variant=name)
    for mode in MODES:
        yield f"plain {mode}", functools.partial(plain, 8, mode=mode)
        yield f"mmseg {mode}", functools.partial(mmseg, 8, mode=mode, sub_sample=True)
        yield f"mmcv {mode}", functools.partial(NonLocal2d, 8, mode=mode, norm_cfg={"type": "BN"})
        yield f"mmcv pooled {mode}", functools.partial(NonLocal2d, 8, mode=mode, sub_sample=True)
        yield f"video {mode}", functools.partial(NonLocal3d, 8, mode=mode, sub_sample="before")
    yield "mmcv 1d", functools.partial(NonLocal1d, 8, sub_sample=True)
    for dims in (1, 3):
        yield f"plain {dims}d", functools.partial(BLOCKS[dims], 8, sub_sample="after")
    for whiten in ("bn", "bn_affine", "ln"):
        yield f"plain {whiten}", functools.partial(plain, 8, whiten=whiten)
        yield f"official {whiten}", functools.partial(official, 8, whiten_type="ln_nostd" if whiten == "ln" else whiten)
    yield "plain pooled before", functools.partial(plain, 8, sub_sample="before", learn_gamma=True, norm=group_norm)
    yield "plain without norm", functools.partial(plain, 8, norm=None)
    yield "mmseg group norm", functools.partial(mmseg, 8, norm=group_norm)
    yield "mmseg without norm", functools.partial(mmseg, 8, norm=None, variant="unary")
    yield "official", functools.partial(official, 8)
    yield "official all", functools.partial(official, 8, downsample=True, use_out=True, out_bn=True)
    yield "official shared", functools.partial(official, 8, with_gc=False, with_unary=True)
    yield "official unary", functools.partial(official, 8, with_nl=False, use_out=True, out_bn=True)
    both = ("channel_add", "channel_mul")
    yield "context", functools.partial(GlobalContext2d, 8, ratio=2, fusion_types=both)
    yield "context avg", functools.partial(GlobalContext3d, 8, ratio=2, pooling_type="avg", fusion_types=both)
    yield "simplified", functools.partial(SimplifiedNonLocal2d, 8)
    yield "simplified 1d", functools.partial(SimplifiedNonLocal1d, 8)
    for kind in (Weights, NoWeights):
        yield f"multihead {kind.__name__}", functools.partial(kind, 8, 2, batch_first=True)
    yield "multihead unpacked", functools.partial(NoWeights, 8, 2, kdim=8, batch_first=True, unary=False, whiten=None)
    yield "relation", functools.partial(RelationModule, 8, 2, key_channels=4, geometry_channels=8)


MAKE = dict(blocks())


def build(name):
    return scramble(MAKE[name]().double())


def inputs_of(block):
    if isinstance(block, RelationModule):
        boxes = torch.rand(5, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).requires_grad_()
        return (make_input(1, 8, 1)[0].mT[:5], boxes)
    if isinstance(block, DisentangledMultiheadAttention):
        return (make_input(1, 8).mT,)
    return (make_input(block.dims, 8),)


def layers_of(block):
    """All modules in a block by name, a shared one once."""
    return {name: layer for name, layer in block.named_modules() if name}


#: A block, and a layer of it.
LAYERS = [(block, layer) for block in MAKE for layer in layers_of(MAKE[block]())]
#: Those with a matrix of weights.
WEIGHTED = [
    (block, layer)
    for block, layer in LAYERS
    if isinstance(MAKE[block]().get_submodule(layer), (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
]


@pytest.mark.parametrize("name", MAKE)
def test_reset_leaves_nothing_as_it_was(name):
    """As where a model is built on the meta device and gets its memory later."""
    fresh = MAKE[name]()
    with torch.device("meta"):
        block = MAKE[name]()
    block.to_empty(device="cpu")
    for x in block.state_dict().values():
        x.fill_(77)
    block.reset_parameters()
    for key, x in block.state_dict().items():
        expected = fresh.state_dict()[key]
        assert (x != 77).all(), key
        if (expected == expected.flatten()[0]).all() and expected.numel() > 1:
            assert torch.equal(x, expected), key


def test_number_of_layers():
    """What the tests below go over: blocks, their layers, those with a matrix of weights."""
    assert (len(MAKE), len(LAYERS), len(WEIGHTED)) == (55, 392, 219)


@pytest.mark.parametrize("name", MAKE)
def test_hooks(name):
    """Each layer's hooks see each of its calls: one a forward, and of a pool one for each of value, key and mask."""
    block = build(name)
    calls = []
    for layer_name, layer in layers_of(block).items():
        layer.register_forward_pre_hook(lambda *_, key=layer_name: calls.append(f"before {key}"))
        layer.register_forward_hook(lambda *_, key=layer_name: calls.append(f"after {key}"))
        layer.register_full_backward_hook(lambda *_, key=layer_name: calls.append(f"backward {key}"))
    block(*inputs_of(block)).sum().backward()
    for layer_name, layer in layers_of(block).items():
        counts = [calls.count(f"{when} {layer_name}") for when in ("before", "after", "backward")]
        pool = isinstance(layer, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d))
        assert counts[0] == counts[1] == counts[2] and (counts[0] >= 1 if pool else counts[0] == 1), layer_name


class Opaque(nn.Module):
    """A layer that has nothing but a forward, as a quantized layer or an adapter may have."""

    def __init__(self, layer):
        super().__init__()
        self.hidden = (layer,)  # not a module of this one, nor are its parameters

    def forward(self, x):
        return self.hidden[0](x)


@pytest.mark.parametrize("name, layer", LAYERS)
def test_replaced(name, layer):
    """A layer in place of another, in plain sight and opaque: the same outputs and gradients."""
    block = build(name)
    other = scramble(copy.deepcopy(block.get_submodule(layer)), seed=9)
    results = []
    for replacement in (other, Opaque(copy.deepcopy(other))):
        changed = copy.deepcopy(block)
        changed.set_submodule(layer, replacement)
        inputs = [x.detach().requires_grad_() for x in inputs_of(block)]
        y = changed(*inputs)
        hidden = replacement if replacement is other else replacement.hidden[0]
        grads = torch.autograd.grad(y.square().sum(), [*inputs, *hidden.parameters()])
        results.append([y, *grads, *hidden.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    if list(other.parameters()):
        assert not torch.allclose(results[0][0], block(*inputs_of(block)))


METHODS = {
    "spectral_norm, old": nn.utils.spectral_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm, old": nn.utils.weight_norm,
    "weight_norm": parametrizations.weight_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.25),
}


def parametrized_layers():
    """Each layer with each method; without --slow with one, each with its turn."""
    for i, (block, layer) in enumerate(WEIGHTED):
        for j, method in enumerate(METHODS):
            yield pytest.param(block, layer, method, marks=pytest.mark.slow if (i + j) % len(METHODS) else ())


@pytest.mark.parametrize("name, layer, method", list(parametrized_layers()))
def test_parametrized(name, layer, method):
    """Three steps train the parameters behind the weight, and the block computes with the weight that they make."""
    torch.manual_seed(0)  # power iterations start at random
    block = build(name)
    plain = copy.deepcopy(block)
    changed = block.get_submodule(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old weight_norm is deprecated
        METHODS[method](changed)
    behind = {key: parameter for key, parameter in changed.named_parameters() if "bias" not in key}
    before = {key: parameter.detach().clone() for key, parameter in behind.items()}
    optimizer = torch.optim.SGD(behind.values(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        block(*inputs_of(block)).square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(parameter, before[key]) for key, parameter in behind.items())

    plain.eval(), block.eval()
    y = block(*inputs_of(block))
    plain.load_state_dict({key: value for key, value in block.state_dict().items() if key in plain.state_dict()}, False)
    plain.get_submodule(layer).weight.data.copy_(changed.weight)
    torch.testing.assert_close(y, plain(*inputs_of(plain)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kdim, name", [(8, "in_proj_weight"), (6, "k_proj_weight")])
def test_parametrized_projections_of_multihead_attention(kdim, name):
    """They are parameters of the block; a parametrization that counts is evaluated once a call."""

    class Double(nn.Module):
        calls = 0

        def forward(self, weight):
            self.calls += 1
            return 2 * weight

    module = scramble(DisentangledMultiheadAttention(8, 2, kdim=kdim, batch_first=True).double())
    expected = copy.deepcopy(module)
    getattr(expected, name).data.mul_(2)
    double = Double()
    parametrize.register_parametrization(module, name, double)
    query, key, value = (torch.randn(2, 5, width, dtype=torch.float64) for width in (8, kdim, 8))
    double.calls = 0
    y = module(query, key, value, need_weights=False)[0]
    assert double.calls == 1
    torch.testing.assert_close(y, expected(query, key, value, need_weights=False)[0], rtol=1e-12, atol=1e-12)
