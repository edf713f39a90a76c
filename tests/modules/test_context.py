"""GlobalContext1d / 2d / 3d and SimplifiedNonLocal1d / 2d / 3d against GCNet's blocks written out."""

import copy
import io

import pytest
import torch
from blocks import (
    CHANNELS_LAST,
    assert_loads_both_ways,
    assert_same,
    backends,
    compiled,
    dimensions,
    make_input,
    run,
    scramble,
)
from torch import nn
from transcriptions import CONV, _softmax

import dnl_ext

CONTEXT = {d: getattr(dnl_ext, f"GlobalContext{d}d") for d in (1, 2, 3)}
SIMPLIFIED = {d: getattr(dnl_ext, f"SimplifiedNonLocal{d}d") for d in (1, 2, 3)}
fusions = pytest.mark.parametrize("fusion_types", [("channel_add",), ("channel_mul",), ("channel_mul", "channel_add")])
memory_formats = pytest.mark.parametrize("channels_last", [False, True])


class ContextBlock(nn.Module):
    """mmcv's ContextBlock."""

    def __init__(self, channels, ratio, pooling_type, fusion_types, dims):
        super().__init__()
        conv, planes, ones = CONV[dims], int(channels * ratio), [1] * dims
        if pooling_type == "att":
            self.conv_mask = conv(channels, 1, 1)
        for name in ("channel_add", "channel_mul"):
            if name in fusion_types:
                layers = conv(channels, planes, 1), nn.LayerNorm([planes, *ones]), nn.ReLU(), conv(planes, channels, 1)
                setattr(self, f"{name}_conv", nn.Sequential(*layers))

    def forward(self, x):
        flat = x.flatten(2)
        weights = torch.full_like(flat[:, 0], 1 / flat.shape[2])
        if hasattr(self, "conv_mask"):
            weights = _softmax(self.conv_mask(x).flatten(1))
        context = torch.einsum("bn,bcn->bc", weights, flat).reshape(*x.shape[:2], *[1] * (x.dim() - 2))
        y = x
        if hasattr(self, "channel_mul_conv"):
            y = y * torch.sigmoid(self.channel_mul_conv(context))
        if hasattr(self, "channel_add_conv"):
            y = y + self.channel_add_conv(context)
        return y


class SimplifiedBlock(nn.Module):
    """The values of every position, pooled."""

    def __init__(self, channels, dims):
        super().__init__()
        self.conv_value = CONV[dims](channels, channels, 1, bias=False)
        self.conv_mask = CONV[dims](channels, 1, 1)

    def forward(self, x):
        weights = _softmax(self.conv_mask(x).flatten(1))
        y = torch.einsum("bn,bcn->bc", weights, self.conv_value(x).flatten(2))
        return x + y.reshape(*y.shape, *[1] * (x.dim() - 2))


def layout(dims, channels_last):
    return CHANNELS_LAST.get(dims) if channels_last else None


class TestGlobalContext:
    @memory_formats
    @fusions
    @pytest.mark.parametrize("pooling_type", ["att", "avg"])
    @dimensions
    @backends
    def test_equals_original(self, backend, dims, pooling_type, fusion_types, channels_last):
        original = ContextBlock(8, 0.5, pooling_type, fusion_types, dims).double()
        ours = CONTEXT[dims](8, 0.5, pooling_type, fusion_types, backend=backend).double()
        scramble(original)
        assert_loads_both_ways(ours, original)
        assert_same(ours, original, make_input(dims, memory_format=layout(dims, channels_last)))

    def test_key_names(self):
        transform = [f"{i}.{kind}" for i in (0, 1, 3) for kind in ("weight", "bias")]
        assert list(CONTEXT[2](8).state_dict()) == [
            "conv_mask.weight", "conv_mask.bias", *(f"channel_add_conv.{name}" for name in transform),
        ]  # fmt: skip
        keys = set(CONTEXT[2](8, pooling_type="avg", fusion_types=["channel_mul"]).state_dict())
        assert keys == {f"channel_mul_conv.{name}" for name in transform}

    def test_start(self):
        x = make_input(2, dtype=torch.float32)
        assert torch.equal(CONTEXT[2](8)(x), x)
        torch.testing.assert_close(CONTEXT[2](8, fusion_types=("channel_mul",))(x), x / 2)

    @pytest.mark.parametrize(
        "name, options",
        [
            ("in_channels", {"in_channels": 0}),
            ("ratio", {"ratio": 0}),
            ("ratio", {"ratio": "1/4"}),
            ("pooling_type", {"pooling_type": "max"}),
            ("fusion_types", {"fusion_types": "channel_add"}),
            ("fusion_types", {"fusion_types": ()}),
            ("fusion_types", {"fusion_types": ["add"]}),
            ("backend", {"backend": None}),
        ],
    )
    def test_wrong_options(self, name, options):
        with pytest.raises(ValueError, match=f"^{name}: expected "):
            CONTEXT[2](**{"in_channels": 8, **options})


class TestSimplified:
    @memory_formats
    @dimensions
    @backends
    def test_equals_original(self, backend, dims, channels_last):
        original = scramble(SimplifiedBlock(8, dims).double())
        ours = SIMPLIFIED[dims](8, backend=backend).double()
        assert_loads_both_ways(ours, original)
        assert_same(ours, original, make_input(dims, memory_format=layout(dims, channels_last)))

    def test_is_the_unary_term_of_the_official_block(self):
        block = scramble(dnl_ext.DisentangledNonLocal2d.official(8, with_nl=False).double())
        ours = SIMPLIFIED[2](8).double()
        ours.load_state_dict(block.state_dict(), strict=True)
        torch.testing.assert_close(ours(make_input(2)), block(make_input(2)), rtol=1e-12, atol=1e-12)


class TestBoth:
    def make(self, kind, dims=2, **options):
        return scramble((CONTEXT if kind == "context" else SIMPLIFIED)[dims](8, **options))

    both = pytest.mark.parametrize("kind", ["context", "simplified"])

    @both
    @dimensions
    def test_empty_batch(self, kind, dims):
        x, block = make_input(dims, batch=0, dtype=torch.float32), self.make(kind, dims)
        block(x).sum().backward()
        assert x.grad.shape == x.shape and all(not p.grad.any() for p in block.parameters())

    @both
    @pytest.mark.parametrize("dims", [2, 3])
    def test_memory_format_is_kept(self, kind, dims):
        x, block = make_input(dims, dtype=torch.float32), self.make(kind, dims)
        assert block(x).is_contiguous()
        y = block(x.detach().to(memory_format=CHANNELS_LAST[dims]))
        assert y.is_contiguous(memory_format=CHANNELS_LAST[dims]) and not y.is_contiguous()

    @both
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, kind, dtype):
        block = self.make(kind).double()
        y, dx, grads = run(copy.deepcopy(block).to(dtype), make_input(2).to(dtype))
        assert all(g.isfinite().all() for g in (dx, *grads.values()))
        torch.testing.assert_close(y.double(), block(make_input(2)), rtol=0.05, atol=0.05)

    @both
    def test_autocast(self, kind):
        block, x = self.make(kind), make_input(2, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = block(x)
        y.square().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in block.parameters())
        torch.testing.assert_close(y, block(x), rtol=0.05, atol=0.05)

    @both
    def test_compiles_copies_and_is_saved(self, kind):
        block, x = self.make(kind).double(), make_input(2)
        copied = compiled(block)
        for a, b in zip(run(block, x)[:2], run(copied, x)[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        file = io.BytesIO()
        torch.save(block, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), block(x))
        assert "backend='fused'" in repr(block)

    @both
    def test_wrong_inputs(self, kind):
        with pytest.raises(ValueError, match="expected 8 channels"):
            self.make(kind)(torch.zeros(2, 4, 3, 3))
        with pytest.raises(ValueError, match="expected 4 dimensions"):
            self.make(kind)(torch.zeros(2, 8, 3))
        with pytest.raises(TypeError, match="input: expected"):
            self.make(kind)(None)
