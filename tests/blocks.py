"""What the tests of modules share: inputs, the comparison of two modules, state dicts both ways."""

import copy
import functools
import itertools

import pytest
import torch

from dnl_ext.modules import DisentangledNonLocal1d, DisentangledNonLocal2d, DisentangledNonLocal3d

BLOCKS = {1: DisentangledNonLocal1d, 2: DisentangledNonLocal2d, 3: DisentangledNonLocal3d}
SPATIAL = {1: (11,), 2: (5, 6), 3: (2, 4, 3)}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}

backends = pytest.mark.parametrize("backend", ["reference", "fused"])
dimensions = pytest.mark.parametrize("dims", [1, 2, 3])


def scramble(module, seed=0):
    """Fill every parameter and running statistic, so that no term is zero and the softmax is not flat."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_floating_point():
            values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 0.5
            tensor.data.copy_(values.abs() + 0.5 if "running_var" in name else values)
    return module


def make_input(dims, channels=8, batch=2, memory_format=None, dtype=torch.float64, seed=1, spatial=None):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, channels, *(spatial or SPATIAL[dims]))
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if memory_format is not None:
        x = x.to(memory_format=memory_format)
    return x.requires_grad_()


def run(module, x):
    """Output, gradient of the input and of every parameter by name, for a fixed gradient of the output."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    y = module(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y.dtype)
    y.backward(grad)
    return y.detach(), x.grad, {name: p.grad for name, p in module.named_parameters()}


def assert_same(ours, theirs, x, tolerance=1e-10):
    """Output, input gradient, parameter gradients and running statistics of two modules are equal."""
    (y, dx, grads), (y_expected, dx_expected, grads_expected) = run(ours, x), run(theirs, x)
    close = functools.partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    close(y, y_expected)
    close(dx, dx_expected)
    assert list(grads) == list(grads_expected)
    for name, grad in grads_expected.items():
        close(grads[name], grad, msg=lambda text, name=name: f"gradient of {name}: {text}")
    for name, buffer in theirs.named_buffers():
        close(ours.get_buffer(name), buffer)


def assert_loads_both_ways(ours, original):
    """The state dicts have the same keys in the same order and load strictly into each other."""
    assert list(ours.state_dict()) == list(original.state_dict())
    ours.load_state_dict(original.state_dict(), strict=True)
    changed = scramble(copy.deepcopy(ours), seed=7)
    other = copy.deepcopy(original)
    other.load_state_dict(changed.state_dict(), strict=True)
    for name, tensor in changed.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


def assert_not_flat(original):
    """The maps of the last call differ from uniform attention by at least a factor of 3 somewhere in the mean row."""
    rows = original.pairwise_map
    assert rows.max(-1).values.mean() > 3 / rows.shape[-1]
    if hasattr(original, "unary_map"):
        assert original.unary_map.max() > 1.5 / rows.shape[-1]


def compiled(module):
    """A compiled copy. All blocks share one forward, of which torch keeps no more than 8 compilations."""
    torch.compiler.reset()
    return torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
