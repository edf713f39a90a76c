"""RelationModule against the equations of Relation Networks, pair by pair."""

import copy
import io
import math

import pytest
import torch
from blocks import compiled, scramble

from dnl_ext import RelationModule
from dnl_ext.modules.relation import relative_geometry

CHANNELS, RELATIONS, KEYS, GEOMETRY = 12, 3, 5, 16


def make(batch=(2,), count=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(*batch, count, CHANNELS, generator=generator, dtype=torch.float64)
    corners = torch.rand(*batch, count, 2, generator=generator, dtype=torch.float64) * 400
    sizes = torch.rand(*batch, count, 2, generator=generator, dtype=torch.float64) * 90 + 10
    boxes = torch.cat([corners, corners + sizes], -1)
    return features.to(dtype).requires_grad_(), boxes.to(dtype).requires_grad_()


def module(**options):
    options = {"num_relations": RELATIONS, "key_channels": KEYS, "geometry_channels": GEOMETRY, **options}
    return scramble(RelationModule(CHANNELS, **options).double())


def embedding(box_m, box_n):
    """E_G of one ordered pair: 4 numbers, each as 2 sines and 2 cosines."""
    (xm, ym, wm, hm), (xn, yn, wn, hn) = (
        ((b[0] + b[2]) / 2, (b[1] + b[3]) / 2, b[2] - b[0], b[3] - b[1]) for b in (box_m, box_n)
    )
    numbers = [
        torch.log(((xm - xn).abs() / wm).clamp(min=1e-3)), torch.log(((ym - yn).abs() / hm).clamp(min=1e-3)),
        torch.log(wn / wm), torch.log(hn / hm),
    ]  # fmt: skip
    parts = []
    for number in numbers:
        angles = [100 * number / 1000 ** (8 * t / GEOMETRY) for t in range(GEOMETRY // 8)]
        parts += [torch.sin(angle) for angle in angles] + [torch.cos(angle) for angle in angles]
    return torch.stack(parts)


def written_out(block, features, boxes):
    """Equations 2 to 6 for one image."""
    count, pieces = len(features), []
    geometric = torch.stack(
        [torch.stack([block.geometry(embedding(boxes[m], boxes[n])) for n in range(count)]) for m in range(count)]
    ).relu()
    query, key, value = block.query(features), block.key(features), block.value(features)
    width = CHANNELS // RELATIONS
    for r in range(RELATIONS):
        q, k = (x[:, r * KEYS : (r + 1) * KEYS] for x in (query, key))
        # w = g exp(a) / sum of g exp(a): the paper's form, where the block adds log g to a softmax's logits.
        weights = geometric[..., r].clamp(min=block.eps) * torch.exp(q @ k.T / math.sqrt(KEYS))
        pieces.append(weights / weights.sum(1, keepdim=True) @ value[:, r * width : (r + 1) * width])
    return features + torch.cat(pieces, -1)


@pytest.mark.parametrize("batch", [(), (2,), (2, 1)])
def test_equals_the_equations(batch):
    block, (features, boxes) = module(), make(batch)
    flat_features, flat_boxes = features.reshape(-1, 6, CHANNELS), boxes.reshape(-1, 6, 4)
    pairs = zip(flat_features, flat_boxes, strict=True)
    expected = torch.stack([written_out(block, f, b) for f, b in pairs]).view(features.shape)
    ours = block(features, boxes)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    dy = torch.randn_like(ours)
    leaves = [features, boxes, *block.parameters()]
    for a, b in zip(torch.autograd.grad(ours, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)  # angles of 100 x log multiply a rounding by as much


def test_geometry_does_not_see_place_and_scale():
    _, boxes = make()
    moved = boxes * 3.5 + torch.tensor([70.0, -20.0, 70.0, -20.0])
    torch.testing.assert_close(relative_geometry(moved), relative_geometry(boxes), rtol=1e-9, atol=1e-9)
    degenerate = torch.zeros(2, 4)
    assert relative_geometry(degenerate).isfinite().all()


def test_order_of_objects_is_kept():
    block, (features, boxes) = module(), make()
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    torch.testing.assert_close(block(features[:, order], boxes[:, order]), block(features, boxes)[:, order])


@pytest.mark.parametrize("shape", [((0,), 6), ((2,), 0)])
def test_empty(shape):
    block, (features, boxes) = module(), make(*shape)
    block(features, boxes).sum().backward()
    assert features.grad.shape == features.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    block, (features, boxes) = module(), make()
    expected = block(features, boxes.to(dtype).double())
    y = copy.deepcopy(block).to(dtype)(features.to(dtype), boxes.to(dtype))
    y.sum().backward()
    torch.testing.assert_close(y.double(), expected, rtol=0.1, atol=0.1)


def test_compiles_copies_and_is_saved():
    block, (features, boxes) = module(), make()
    expected = block(features, boxes)
    copied = compiled(block)
    torch.testing.assert_close(copied(features, boxes), expected)
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(features, boxes), expected)
    assert "12, num_relations=3" in repr(block)


@pytest.mark.parametrize(
    "name, options",
    [
        ("in_channels", {"in_channels": 13}),
        ("num_relations", {"num_relations": 0}),
        ("key_channels", {"key_channels": 1.5}),
        ("geometry_channels", {"geometry_channels": 12}),
        ("eps", {"eps": 0}),
    ],
)
def test_wrong_options(name, options):
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        RelationModule(**{"in_channels": CHANNELS, "num_relations": RELATIONS, **options})


def test_wrong_calls():
    block, (features, boxes) = module(), make()
    with pytest.raises(ValueError, match=r"^features: expected shape \(\.\.\., N, 12\), got \(2, 6, 11\)"):
        block(features[..., 1:], boxes)
    with pytest.raises(ValueError, match=r"^boxes: expected shape \(2, 6, 4\), got \(2, 5, 4\)"):
        block(features, boxes[:, 1:])
    with pytest.raises(TypeError, match=r"^boxes: expected a torch\.Tensor"):
        block(features, None)


def test_products_that_float16_cannot_hold():
    block = module(num_relations=1, key_channels=4).half()
    features, boxes = make(dtype=torch.float16)
    y = block(300 * features, boxes)
    assert y.isfinite().all()
