"""Attention between detected objects, with weights from their boxes. See :class:`RelationModule`."""

import math

import torch
import torch.fx
from torch import nn

from ._common import Block, check_above_zero, check_width

#: Widths, heights and relative distances are at least this before their logarithm is taken.
SMALLEST = 1e-3
#: Wavelengths of the geometric embedding reach from 2 pi / 100 to 1000 times that.
WAVE_LENGTH, POSITION_SCALE = 1000.0, 100.0


def relative_geometry(boxes: torch.Tensor) -> torch.Tensor:
    """What relates box m to box n, invariant under translation and scale: tensor (..., N, N, 4).

    (log(|x_m - x_n| / w_m), log(|y_m - y_n| / h_m), log(w_n / w_m), log(h_n / h_m)), from boxes (..., N, 4) given as
    (x1, y1, x2, y2); x and y are centres. Lengths are clamped from below at 0.001.
    """
    low, high = boxes[..., :2], boxes[..., 2:]
    size, centre = (high - low).clamp(min=SMALLEST), (low + high) / 2
    here, there = size.unsqueeze(-2), size.unsqueeze(-3)
    distance = (centre.unsqueeze(-2) - centre.unsqueeze(-3)).abs() / here
    return torch.cat([distance.clamp(min=SMALLEST).log(), (there / here).log()], -1)


@torch.fx.wrap
def sinusoidal(x: torch.Tensor, channels: int) -> torch.Tensor:
    """Sines and cosines of each of the last dimension's 4 numbers at channels / 8 wavelengths: (..., channels)."""
    steps = torch.arange(channels // 8, device=x.device, dtype=x.dtype) * (8.0 / channels)
    angles = (POSITION_SCALE * x).unsqueeze(-1) / WAVE_LENGTH**steps
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)


@torch.fx.wrap
def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """x in its dtype or float32, whichever is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.fx.wrap
def check_objects(features: torch.Tensor, boxes: torch.Tensor, in_channels: int) -> torch.Tensor:
    """The features (..., N, in_channels), checked with the boxes; used and traced as `check_input` is."""
    if torch.jit.is_tracing():
        return features
    for name, x in (("features", features), ("boxes", boxes)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if features.dim() < 2 or features.shape[-1] != in_channels:
        raise ValueError(f"features: expected shape (..., N, {in_channels}), got {tuple(features.shape)}")
    if boxes.shape != (*features.shape[:-1], 4):
        raise ValueError(f"boxes: expected shape {(*features.shape[:-1], 4)}, got {tuple(boxes.shape)}")
    return features


class RelationModule(Block):
    """Relations between the objects of an image: every object gets a weighted sum of all objects' features.

    The weights of a relation come from the features of two objects and from where their boxes lie. With
    f_m the features of object m, and one term for each relation r::

        out_m = f_m + concat over r of sum_n w^r_mn W_v^r f_n
        w^r_mn = softmax_n(log(max(g^r_mn, eps)) + <W_q^r f_m, W_k^r f_n> / sqrt(key_channels))
        g^r_mn = relu(W_g^r e_mn), e_mn an embedding of :func:`relative_geometry` of the two boxes

    This is plain PyTorch that holds ``num_relations`` maps of N x N and one embedding of N x N x geometry_channels:
    there are hundreds of objects in an image, and the geometric weight is different for every pair.

    Args:
        in_channels: channels of the features, a multiple of num_relations.
        num_relations: relation heads; each gives in_channels / num_relations channels.
        key_channels: width of query and key of each relation.
        geometry_channels: width of the geometric embedding, a multiple of 8.
        eps: smallest geometric weight, above 0.

    Raises:
        ValueError: a width that does not fit.

    Example:
        >>> import torch
        >>> from dnl_ext import RelationModule
        >>> features = torch.randn(2, 30, 64)  # 30 objects in each of 2 images
        >>> corner, size = torch.rand(2, 30, 2) * 200, torch.rand(2, 30, 2) * 50
        >>> boxes = torch.cat([corner, corner + size], -1)  # (x1, y1, x2, y2)
        >>> RelationModule(64, num_relations=8)(features, boxes).shape
        torch.Size([2, 30, 64])

    Source: Hu et al., "Relation Networks for Object Detection", CVPR 2018, equations 2 to 6.
    """

    def __init__(
        self,
        in_channels: int,
        num_relations: int = 16,
        key_channels: int = 64,
        geometry_channels: int = 64,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.in_channels: int = check_width("in_channels", in_channels)
        self.num_relations: int = check_width("num_relations", num_relations)
        self.key_channels: int = check_width("key_channels", key_channels)
        self.geometry_channels: int = check_width("geometry_channels", geometry_channels)
        if in_channels % num_relations:
            raise ValueError(f"in_channels: expected a multiple of num_relations ({num_relations}), got {in_channels}")
        if geometry_channels % 8:
            raise ValueError(f"geometry_channels: expected a multiple of 8, got {geometry_channels}")
        self.eps: float = check_above_zero("eps", eps)
        self.query: nn.Linear = nn.Linear(in_channels, num_relations * key_channels)
        self.key: nn.Linear = nn.Linear(in_channels, num_relations * key_channels)
        self.value: nn.Linear = nn.Linear(in_channels, in_channels)
        self.geometry: nn.Linear = nn.Linear(geometry_channels, num_relations)

    def forward(self, features: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Relate the objects of each image.

        Args:
            features: tensor (..., N, in_channels).
            boxes: tensor (..., N, 4), (x1, y1, x2, y2) in pixels.

        Returns:
            Tensor of the shape of ``features``.

        Raises:
            TypeError: not a tensor.
            ValueError: shapes that do not fit.
        """
        features = check_objects(features, boxes, self.in_channels)

        def heads(layer):  # (..., relations, N, width)
            return layer(features).unflatten(-1, (self.num_relations, -1)).transpose(-3, -2)

        # A bfloat16 angle of 100 x log has no digit left behind the point.
        embedding = sinusoidal(relative_geometry(at_least_float32(boxes)), self.geometry_channels)
        weight = self.geometry(embedding.to(features.dtype)).relu().movedim(-1, -3)
        query, key, value = heads(self.query), heads(self.key), heads(self.value)
        scaled = at_least_float32(query) / math.sqrt(self.key_channels)  # before products, which float16 cannot hold
        logits = scaled @ at_least_float32(key).transpose(-2, -1)
        logits = logits + weight.to(logits.dtype).clamp(min=self.eps).log()
        relations = torch.softmax(logits, -1).to(value.dtype) @ value
        return features + relations.transpose(-3, -2).flatten(-2)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, num_relations={self.num_relations}, key_channels={self.key_channels}, "
            f"geometry_channels={self.geometry_channels}, eps={self.eps}"
        )
