"""Batch norm over the batch of all processes, for any device.

`torch.nn.SyncBatchNorm` is that on GPUs; on a CPU it refuses its input, and DistributedDataParallel refuses the layer.
Here it is in tensor operations, with one exchange of 2 C + 1 numbers in the forward and one of 2 C in the backward. It
keeps the normalised input, as large as the input, where torch's kernels keep the input itself.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class SyncBatchNorm(_BatchNorm):
    """Batch norm over the batch of all processes, on any device and for any number of dimensions.

    Arguments, attributes and state dict are those of ``torch.nn.BatchNorm2d``. In training every process must call it,
    with one value of each channel at least.

    Attributes:
        process_group: the processes; None is all.

    Raises:
        ValueError: the input has fewer than 2 dimensions.

    Example:
        >>> import torch
        >>> from dnl_ext.segmentation.training import SyncBatchNorm
        >>> norm = SyncBatchNorm(8).eval()  # outside of training it needs no other process
        >>> norm(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])

    Source: Ioffe and Szegedy, "Batch Normalization", 2015.
    """

    process_group = None

    def _check_input_dim(self, x: torch.Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"input: expected at least 2 dimensions (B, C), got shape {tuple(x.shape)}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input ``x`` (B, C, ...) to the same shape; in training, statistics are over the batches of all processes."""
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        wide = x.float() if x.dtype.itemsize < 4 else x
        axes = [0, *range(2, x.dim())]
        mean, variance, count = _moments(wide, axes, self.process_group)
        if self.running_mean is not None:
            self._track(mean, variance * (count / max(count - 1, 1)))
        shape = [1, -1] + [1] * (x.dim() - 2)
        inverse_deviation = (variance + self.eps).rsqrt().view(shape)
        y = _Normalise.apply(wide, mean.view(shape), inverse_deviation, axes, count, self.process_group)
        if self.affine:
            y = torch.addcmul(self.bias.view(shape), y, self.weight.view(shape))
        return y.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Running statistics, from the mean (C,) and the unbiased variance (C,) of a batch."""
        assert self.num_batches_tracked is not None and self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked.add_(1)
        step = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), step)
        self.running_var.lerp_(variance.to(self.running_var.dtype), step)


@torch.no_grad()
def _moments(
    x: torch.Tensor, axes: list[int], group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Mean (C,), variance (C,) and number of values per channel over all processes.

    Those of a process first, then theirs merged: sums of raw squares would cancel where the mean is large.
    """
    variance, mean = torch.var_mean(x, axes, correction=0)
    count = x.numel() // x.shape[1]
    own = torch.cat([mean, variance, mean.new_tensor([count])])
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    means, variances, counts = torch.stack(every).split([len(mean), len(mean), 1], dim=1)
    share = counts / counts.sum()
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0), int(counts.sum())


class _Normalise(torch.autograd.Function):
    """y = (x - mean) * deviation^-1, where mean and deviation are functions of the x of all processes.

    Backward (Ioffe and Szegedy 2015, section 3): dx = deviation^-1 * (dy - mean(dy) - y * mean(dy * y)).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        mean: torch.Tensor,
        inverse_deviation: torch.Tensor,
        axes: Sequence[int],
        count: int,
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        """x (B, C, *spatial); mean, inverse_deviation (1, C, 1, ...)."""
        y = (x - mean) * inverse_deviation
        ctx.save_for_backward(y, inverse_deviation)
        ctx.axes, ctx.count, ctx.group = axes, count, group
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, inverse_deviation = ctx.saved_tensors
        means = torch.stack([grad.sum(ctx.axes, keepdim=True), (grad * y).sum(ctx.axes, keepdim=True)]) / ctx.count
        dist.all_reduce(means, group=ctx.group)
        return inverse_deviation * (grad - means[0] - y * means[1]), None, None, None, None, None


def sync_norms(network: nn.Module, device: torch.device) -> nn.Module:
    """Make every batch norm of a network one over all processes, with the same parameters and state dict.

    Args:
        network: any module; it is changed.
        device: where it runs: on a GPU the norms become torch's, elsewhere this file's.

    Returns:
        The network, which is another module only where it is a batch norm itself.

    Example:
        >>> import torch
        >>> from dnl_ext.segmentation.training import sync_norms
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> type(sync_norms(network, torch.device("cpu"))[1]).__name__
        'SyncBatchNorm'
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = SyncBatchNorm  # which has the attributes of any batch norm
    return network
