"""Blocks and a network trained by DistributedDataParallel and FSDP2: as one process trains them on the whole batch.

Every process computes its share of a batch. What differs from one process is the order of sums alone, so in float64
twenty steps agree to rounding, with every kind of norm but one: a batch norm that knows the share of its process alone,
which is another network, and which these tests tell apart.
"""

import copy
import functools

import processes
import pytest
import torch
import torch.distributed as dist
from blocks import scramble
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dnl_ext import DisentangledNonLocal1d, DisentangledNonLocal2d
from dnl_ext.segmentation.network import SegmentationNetwork
from dnl_ext.segmentation.training.sync_norm import SyncBatchNorm, sync_norms

STEPS, BATCH = 20, 4
TOLERANCE = 1e-9

#: Name: a network and the shape of one image of its batch.
NETWORKS = {
    "1d": (lambda: DisentangledNonLocal1d(8, temperature=0.5, norm=None), (8, 19)),
    "2d": (lambda: DisentangledNonLocal2d(8, temperature=0.5, norm=functools.partial(nn.GroupNorm, 2)), (8, 5, 7)),
    "2d, batch norm": (lambda: DisentangledNonLocal2d.mmseg(8, temperature=0.5), (8, 5, 7)),
    # gamma has one element: FSDP gives it to the first process and an empty shard to the others.
    "2d, gamma": (lambda: DisentangledNonLocal2d.official(8, temperature=0.5), (8, 5, 7)),
    "network": (lambda: SegmentationNetwork(3, width=4, block_gain=0.5), (3, 32, 40)),
}


def wrap(network, wrapper, device):
    """The network as one of several processes trains it."""
    if wrapper == "ddp":
        return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    if isinstance(network, SegmentationNetwork):
        fully_shard(network.encoder, mesh=mesh)
        fully_shard(network.block.conv_out, mesh=mesh)  # a layer of the block, gathered by its hooks
        fully_shard(network.block, mesh=mesh)
    return fully_shard(network, mesh=mesh)


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def build(name):
    """The network with its first weights."""
    torch.manual_seed(0)
    network = NETWORKS[name][0]().double()
    return network if name == "network" else scramble(network)


def train(rank, world_size, name, wrapper=None, synced=True):
    """Losses of STEPS steps over the batches of all processes, and the state dict."""
    on_gpu = world_size > 1 and dist.get_backend() == "nccl"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    network, shape = build(name).to(device), NETWORKS[name][1]
    if world_size > 1:
        network = wrap(sync_norms(network, device) if synced else network, wrapper, device)
    optimizer = torch.optim.SGD(network.parameters(), 0.02, momentum=0.9)
    losses, generator = [], torch.Generator().manual_seed(1)
    share = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    for _ in range(STEPS):
        x = torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64)
        target = torch.randn(BATCH, 1, *shape[1:], generator=generator, dtype=torch.float64)
        y = network(x[share].to(device))
        loss = (y - target[share].to(device)).square().sum() / (BATCH * y[0].numel())
        optimizer.zero_grad()
        (loss * world_size).backward()  # both wrappers average over the processes
        optimizer.step()
        loss = loss.detach()
        if world_size > 1:
            dist.all_reduce(loss)
        losses.append(float(loss))
    state = {key.removeprefix("module."): full(value).cpu() for key, value in network.state_dict().items()}
    return losses, state


def train_both(rank, world_size, name):
    """By DistributedDataParallel and by FSDP2."""
    return [train(rank, world_size, name, wrapper) for wrapper in ("ddp", "fsdp")]


@functools.cache
def alone(name):
    return train(0, 1, name)


def assert_agree(result, expected, tolerance=TOLERANCE):
    (losses, state), (expected_losses, expected_state) = result, expected
    assert losses == pytest.approx(expected_losses, rel=tolerance, abs=0)
    assert state.keys() == expected_state.keys()
    for key, value in expected_state.items():
        note = functools.partial("{}: {}".format, key)
        torch.testing.assert_close(state[key], value, rtol=tolerance, atol=tolerance, msg=note)


def largest_difference(result, expected):
    return max(abs(a - b) / b for a, b in zip(result[0], expected[0], strict=True))


class TestTraining:
    @pytest.mark.parametrize("name", NETWORKS)
    def test_two_processes_as_one(self, name):
        for ddp, fsdp in processes.run(train_both, 2, name):
            assert_agree(ddp, alone(name))
            assert_agree(fsdp, alone(name))

    @pytest.mark.parametrize(
        "name", [pytest.param(name, marks=[] if name == "2d, batch norm" else pytest.mark.slow) for name in NETWORKS]
    )
    def test_four_processes_as_one(self, name):
        for ddp, fsdp in processes.run(train_both, 4, name):
            assert_agree(ddp, alone(name))
            assert_agree(fsdp, alone(name))

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    @pytest.mark.parametrize("name", NETWORKS)
    def test_two_gpus_as_one_process(self, name):
        for ddp, fsdp in processes.run(train_both, 2, name, backend="nccl"):
            assert_agree(ddp, alone(name))
            assert_agree(fsdp, alone(name))

    @pytest.mark.parametrize("name", NETWORKS)
    def test_the_attention_is_trained(self, name):
        """A comparison of networks that stand still would compare nothing."""
        _, state = alone(name)
        moved = {
            key: float((state[key] - weight).abs().max())
            for key, weight in build(name).state_dict().items()
            if key.endswith("weight") and ("query" in key or "theta" in key or "mask" in key)
        }
        assert len(moved) == 2 and min(moved.values()) > 1e5 * TOLERANCE

    def test_batch_norm_of_a_share_is_another_network(self):
        name = "2d, batch norm"
        result = processes.run(train, 2, name, "ddp", False)[0]
        assert largest_difference(result, alone(name)) > 1e-3


def normalise(rank, world_size, norm, x, cuts, grad):
    """Output, gradient of the input, the parameters' gradients and running statistics of a process's rows of x."""
    norm = sync_norms(norm, torch.device("cpu"))
    assert type(norm) is SyncBatchNorm
    rows = slice(cuts[rank], cuts[rank + 1])
    x = x[rows].requires_grad_()
    y = norm(x)
    y.backward(grad[rows])
    gradients = [parameter.grad for parameter in norm.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)
    return y.detach(), x.grad, gradients, list(norm.buffers()), norm.eval()(x).detach()


class TestSyncBatchNorm:
    @pytest.mark.parametrize(
        ("norm", "shape", "mean"),
        [
            (nn.BatchNorm2d(3), (3, 4, 5), 0),
            (nn.BatchNorm2d(3), (3, 4, 5), 1e6),
            (nn.BatchNorm1d(3, momentum=None), (3,), 0),
            (nn.BatchNorm1d(3, affine=False, eps=0.1), (3, 7), 0),
            (nn.BatchNorm3d(3, track_running_stats=False), (3, 2, 3, 2), 0),
        ],
    )
    def test_as_a_norm_of_all(self, norm, shape, mean):
        x = mean + torch.randn(6, *shape, dtype=torch.float64)
        grad = torch.randn_like(x)
        norm = scramble(copy.deepcopy(norm).double())
        results = processes.run(normalise, 3, norm, x, [0, 3, 4, 6], grad)  # shares need not be equal
        x.requires_grad_()
        y = norm(x)
        y.backward(grad)
        close = functools.partial(torch.testing.assert_close, rtol=1e-8, atol=1e-8)
        close(torch.cat([result[0] for result in results]), y.detach())
        close(torch.cat([result[1] for result in results]), x.grad)
        for result in results:
            close(result[2], [parameter.grad for parameter in norm.parameters()])
            close(result[3], list(norm.buffers()))
        if norm.track_running_stats:
            close(torch.cat([result[4] for result in results]), norm.eval()(x).detach())

    def test_state_dict_and_refusal(self):
        norm = sync_norms(nn.Sequential(nn.BatchNorm2d(3)), torch.device("cpu"))
        assert list(norm.state_dict()) == list(nn.Sequential(nn.BatchNorm2d(3)).state_dict())
        with pytest.raises(ValueError, match=r"^input: expected at least 2 dimensions \(B, C\), got shape \(3,\)"):
            norm(torch.zeros(3))

    def test_sixteen_bits(self):
        x = torch.randn(4, 3, 6, 6).bfloat16()
        norm = nn.BatchNorm2d(3)
        results = processes.run(normalise, 2, norm, x, [0, 2, 4], torch.ones_like(x))
        y = torch.cat([result[0] for result in results])
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, norm(x.float()).bfloat16().detach(), rtol=2**-8, atol=1e-6)
