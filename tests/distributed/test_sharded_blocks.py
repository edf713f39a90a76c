"""Blocks on slabs of a feature map: the same output, and gradients that add up to those of one process."""

import copy
from functools import partial

import processes
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from dnl_ext import DisentangledNonLocal1d, DisentangledNonLocal2d, DisentangledNonLocal3d, GlobalContext2d, NonLocal2d
from dnl_ext.distributed import shard_positions

CHANNELS, TIMEOUT = 6, 400

#: (class, arguments), with what the block starts as made different from the identity.
BLOCKS = [
    (DisentangledNonLocal2d, {}),
    (DisentangledNonLocal2d, {"norm": None, "whiten": None}),
    (DisentangledNonLocal2d, {"norm": None, "whiten": "spatial", "mode": "gaussian"}),
    (DisentangledNonLocal2d, {"variant": "pairwise", "style": "mmseg"}),
    (DisentangledNonLocal2d, {"variant": "unary", "norm": None}),
    (DisentangledNonLocal2d, {"variant": "dnl_shared_key", "norm": None}),
    (DisentangledNonLocal2d, {"learn_gamma": True, "norm": None}),
    (DisentangledNonLocal1d, {"norm": None}),
    (DisentangledNonLocal3d, {"norm": None, "variant": "nl"}),
]
ROWS = {2: [(5, 4), (9, 0)], 3: [(3, 4, 2), (0, 8, 1)]}


def make(kind, arguments):
    """A block in evaluation mode with random parameters and statistics, an input and a gradient, whole."""
    torch.manual_seed(0)
    block = kind(CHANNELS, 4, **arguments).double().eval()
    for x in (*block.parameters(), *block.buffers()):
        if x.is_floating_point():
            x.data = torch.rand_like(x) + 0.2
    x = torch.randn(2, CHANNELS, 9, *(2, 3)[: block.dims - 1], dtype=torch.float64)
    return block, x, torch.randn_like(x)


def results(block, x, dy):
    """Output, gradient of the input, and gradients of the parameters."""
    x = x.clone().requires_grad_()
    y = block(x)
    y.backward(dy)
    return y.detach(), x.grad, {name: p.grad for name, p in block.named_parameters()}


def on_slabs(rank, world_size, by_argument):
    mesh, out = init_device_mesh("cpu", (world_size,)), []
    for rows in ROWS[world_size]:
        for kind, arguments in BLOCKS:
            block, x, dy = make(kind, {**arguments, "mesh": mesh} if by_argument else arguments)
            if not by_argument:
                block = shard_positions(nn.Sequential(nn.Identity(), block))[1]
            out.append(results(copy.deepcopy(block), *(a.split(rows, 2)[rank] for a in (x, dy))))
    return out


def assert_equal(x, expected, what, size=None):
    """To 1e-12 of the norm of what is expected, or of `size`."""
    error = float((x - expected).norm()) / (float(expected.norm()) if size is None else size)
    assert error < 1e-12, f"{what} is off by {error:.2g}"


@pytest.mark.parametrize(("world_size", "by_argument"), [(2, True), (3, False)])
def test_equal_to_one_process(world_size, by_argument):
    ranks = processes.run(on_slabs, world_size, by_argument, timeout=TIMEOUT)
    cases = [case for _ in ROWS[world_size] for case in BLOCKS]
    for parts, (kind, arguments) in zip(zip(*ranks, strict=True), cases, strict=True):
        y, dx, gradients = results(*make(kind, arguments))
        assert_equal(torch.cat([part[0] for part in parts], 2), y, "output")
        assert_equal(torch.cat([part[1] for part in parts], 2), dx, "input")
        # Biases of whitened queries and keys have gradients of zero: what is left of them is measured by the others.
        largest = max(float(gradient.norm()) for gradient in gradients.values())
        for name, expected in gradients.items():
            assert_equal(sum(part[2][name] for part in parts), expected, name, largest)


def compiled_and_not(rank, world_size):
    """Output and gradients of slabs, by a compiled block and by the block itself."""
    pairs = []
    for arguments in ({"norm": None}, {"norm": None, "variant": "dnl_shared_key"}, {"norm": None, "variant": "unary"}):
        block, x, dy = make(DisentangledNonLocal2d, arguments)
        shard_positions(block)
        slabs = [a.split(ROWS[world_size][0], 2)[rank] for a in (x, dy)]
        both = torch.compile(copy.deepcopy(block), backend="aot_eager"), block
        pairs.append([[*results(function, *slabs)[:2], *(p.grad for p in function.parameters())] for function in both])
        torch.compiler.reset()
    return pairs


def test_compiled():
    """What travels is not in the graphs, and all around it is."""
    for pairs in processes.run(compiled_and_not, 2, timeout=TIMEOUT):
        for compiled, expected in pairs:
            torch.testing.assert_close(compiled, expected, rtol=1e-12, atol=1e-12)


def refusals(rank, world_size):
    """Messages of what `shard_positions`, and a forward in training, raise."""
    wrong = [
        nn.Linear(2, 2),
        DisentangledNonLocal2d(4, mode="dot_product"),
        DisentangledNonLocal2d(4, sub_sample="after"),
        DisentangledNonLocal2d(4, whiten="ln"),
        DisentangledNonLocal2d(4, whiten="bn"),
        DisentangledNonLocal2d(4, backend="reference"),
        nn.Sequential(DisentangledNonLocal2d(4, norm=lambda channels: nn.GroupNorm(2, channels))),
        nn.Sequential(DisentangledNonLocal2d(4, norm=None), GlobalContext2d(4)),
    ]
    mesh = init_device_mesh("cpu", (world_size,))
    calls = [
        *(partial(shard_positions, module) for module in wrong),
        partial(DisentangledNonLocal2d.mmseg, 4, sub_sample=True, mesh=mesh),
        partial(DisentangledNonLocal2d.official, 4, mesh="cpu"),
        partial(NonLocal2d, 4, mesh=init_device_mesh("cpu", (1, world_size))),
    ]
    messages = []
    for call in calls:
        try:
            call()
        except (TypeError, ValueError, NotImplementedError) as error:
            messages.append(f"{type(error).__name__} {error}")
    try:
        shard_positions(NonLocal2d(4, norm_cfg={"type": "BN"})).train()(torch.zeros(1, 4, 2, 2))
    except RuntimeError as error:
        messages.append(f"{type(error).__name__} {error}")
    return messages


def test_what_does_not_shard_is_refused():
    expected = [
        "ValueError module: expected a dnl_ext non-local block",
        "NotImplementedError expected mode=",
        "NotImplementedError expected sub_sample=None, got 'after'",
        "NotImplementedError whiten: expected 'channel', 'spatial' or None",
        "NotImplementedError expected a whitening without running statistics, got 'bn'",
        "NotImplementedError expected backend='fused'",
        "NotImplementedError module '0': expected no norm, a BatchNorm or SyncBatchNorm, got GroupNorm",
        "NotImplementedError 1: GlobalContext2d would pool this rank's positions alone",
        "NotImplementedError expected sub_sample=None, got 'after'",
        "TypeError mesh: expected a ProcessGroup, a DeviceMesh or None, got str",
        "ValueError mesh: expected a DeviceMesh of one dimension",
        "RuntimeError norm: expected evaluation mode or a SyncBatchNorm",
    ]
    (messages,) = processes.run(refusals, 1, timeout=TIMEOUT)
    assert len(messages) == len(expected)
    for message, want in zip(messages, expected, strict=True):
        assert message.startswith(want)
