"""The variants of a disentangled block and its pairwise modes, each against a transcription in plain PyTorch."""

import copy
import io

import pytest
import torch
from blocks import (
    BLOCKS,
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
from transcriptions import BATCH_NORM, CONV, POOL, MmsegBlock, OfficialBlock, _Maps

from dnl_ext.modules._block import MODES, VARIANTS

variants = pytest.mark.parametrize("variant", VARIANTS)
memory_formats = pytest.mark.parametrize("channels_last", [False, True])


class VariantBlock(_Maps):
    """The talk's table, written out: which terms there are, and where the unary one takes its logits."""

    def __init__(self, channels, width, value_width, variant, dims, sub_sample=None, temperature=0.3):
        super().__init__()
        conv = CONV[dims]
        self.variant, self.dims = variant, dims
        if variant != "unary":
            self.conv_query, self.conv_key = conv(channels, width, 1), conv(channels, width, 1)
        self.conv_value = conv(channels, value_width, 1)
        if variant in ("unary", "dnl"):
            self.conv_mask = conv(channels, 1, 1)
        self.conv_out = conv(value_width, channels, 1, bias=False)
        self.norm = BATCH_NORM[dims](channels)
        self.before = POOL[dims]() if sub_sample == "before" else lambda x: x
        self.after = POOL[dims]() if sub_sample == "after" else lambda x: x
        self.divisor = width**0.5 * temperature

    def forward(self, x):
        source = self.before(x)
        value = self.after(self.conv_value(source))
        mask = self.after(self.conv_mask(source)) if self.variant in ("unary", "dnl") else None
        if self.variant == "unary":
            y = self.unary_term(mask, value, self.dims).expand(*value.shape[:2], *x.shape[2:])
        else:
            query, key = self.conv_query(x), self.after(self.conv_key(source))
            mask = "shared_key" if self.variant == "dnl_shared_key" else mask
            whiten = None if self.variant == "nl" else "channel"
            y, unary = self.terms(query, key, value, mask, self.divisor, whiten)
            y = y if unary is None else y + unary
        return x + self.norm(self.conv_out(y))


def pair(variant, dims, backend="fused", sub_sample=None):
    """Transcription and block with the same weights."""
    original = scramble(VariantBlock(6, 3, 5, variant, dims, sub_sample).double())
    ours = BLOCKS[dims](6, 3, 5, variant=variant, temperature=0.3, sub_sample=sub_sample, backend=backend).double()
    ours.load_state_dict(original.state_dict(), strict=True)
    return original, ours


class TestVariants:
    @memory_formats
    @pytest.mark.parametrize("sub_sample", [None, "before", "after"])
    @variants
    @dimensions
    @backends
    def test_equals_transcription(self, backend, dims, variant, sub_sample, channels_last):
        original, ours = pair(variant, dims, backend, sub_sample)
        memory_format = CHANNELS_LAST.get(dims) if channels_last else None
        assert_same(ours, original, make_input(dims, 6, memory_format=memory_format))

    @variants
    @pytest.mark.parametrize("dims", [2, 3])
    def test_memory_format_is_kept(self, dims, variant):
        _, ours = pair(variant, dims)
        x = make_input(dims, 6)
        assert ours(x).is_contiguous()
        y = ours(x.detach().to(memory_format=CHANNELS_LAST[dims]))
        assert y.is_contiguous(memory_format=CHANNELS_LAST[dims]) and not y.is_contiguous()

    @variants
    @dimensions
    @backends
    def test_empty_batch(self, backend, dims, variant):
        _, ours = pair(variant, dims, backend)
        x = make_input(dims, 6, 0)
        y = ours(x)
        assert y.shape == x.shape
        y.sum().backward()
        assert x.grad.shape == x.shape and all(p.grad is not None for p in ours.parameters())

    @variants
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, variant, dtype):
        original, ours = pair(variant, 2)
        x = make_input(2, 6)
        expected = original.eval()(x)
        y, dx, grads = run(copy.deepcopy(ours).eval().to(dtype), x.to(dtype))
        assert y.dtype == dtype and dx.isfinite().all() and all(g.isfinite().all() for g in grads.values())
        torch.testing.assert_close(y.double(), expected, rtol=0.1, atol=0.1)

    @variants
    def test_parameters(self, variant):
        keys = set(BLOCKS[2](8, variant=variant, norm=None).state_dict())
        assert ("conv_query.weight" in keys) == ("conv_key.weight" in keys) == (variant != "unary")
        assert ("conv_mask.weight" in keys) == (variant in ("unary", "dnl"))

    @variants
    def test_identity_at_init_that_learns(self, variant):
        x, block = make_input(2, dtype=torch.float32), BLOCKS[2](8, variant=variant)
        y = block(x)
        assert torch.equal(y, x)
        y.square().sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in block.parameters())

    @variants
    def test_compiles_copies_and_is_saved(self, variant):
        _, ours = pair(variant, 2)
        x = make_input(2, 6)
        copied = compiled(ours)
        (y, dx, grads), (y_compiled, dx_compiled, grads_compiled) = run(ours, x), run(copied, x)
        torch.testing.assert_close(y_compiled, y, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(dx_compiled, dx, rtol=1e-10, atol=1e-10)
        for grad, other in zip(grads.values(), grads_compiled.values(), strict=True):
            torch.testing.assert_close(other, grad, rtol=1e-10, atol=1e-10)
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False).eval()(x), copy.deepcopy(ours).eval()(x))
        assert f"variant={variant!r}" in repr(ours)

    def test_shared_keys_see_the_bias_of_the_query(self):
        """Whitening hides it from the pairwise term; the unary logits of shared keys are the mean query's."""
        x = make_input(2, 6)
        grads = {name: run(pair(name, 2)[1], x)[2] for name in ("pairwise", "dnl_shared_key")}
        assert grads["pairwise"]["conv_query.bias"].abs().max() < 1e-12
        assert grads["dnl_shared_key"]["conv_query.bias"].abs().max() > 1e-4

    def test_temperature_of_the_standard_block_is_one(self):
        assert BLOCKS[2](8, variant="nl").temperature == 1.0
        assert {BLOCKS[2](8, variant=v).temperature for v in VARIANTS if v != "nl"} == {0.05}

    @pytest.mark.parametrize("old, variant", [({"unary": False}, "pairwise"), ({"unary": True}, "dnl"), ({}, "dnl")])
    def test_unary_is_another_word(self, old, variant):
        assert BLOCKS[2](8, **old).variant == variant

    @pytest.mark.parametrize(
        "name, options",
        [
            ("variant", {"variant": "both"}),
            ("variant", {"variant": None}),
            ("unary", {"variant": "nl", "unary": True}),
            ("unary", {"variant": "unary", "unary": False}),
            ("whiten", {"variant": "nl", "whiten": "ln"}),
            ("whiten", {"variant": "unary", "whiten": "in"}),
            ("learn_gamma", {"variant": "unary", "learn_gamma": True}),
            ("mode", {"mode": "softmax"}),
        ],
    )
    def test_wrong_options(self, name, options):
        with pytest.raises(ValueError, match=f"^{name}: expected "):
            BLOCKS[2](8, **options)


class TestOfficialVariants:
    @pytest.mark.parametrize("downsample, use_out, out_bn", [(False, False, False), (True, True, True)])
    @pytest.mark.parametrize(
        "terms",
        [
            {"with_gc": False, "with_unary": True},
            {"with_gc": True, "with_nl": False},
            {"with_gc": False},
        ],
        ids=str,
    )
    @dimensions
    @backends
    def test_equals_original(self, backend, dims, terms, downsample, use_out, out_bn):
        original = OfficialBlock(8, 4, downsample, use_out, out_bn, dims=dims, **terms).double()
        ours = BLOCKS[dims].official(8, 4, 0.05, downsample, use_out, out_bn, backend=backend, **terms)
        scramble(original)
        assert_loads_both_ways(ours.double(), original)
        assert_same(ours, original, make_input(dims))

    @pytest.mark.parametrize(
        "name, options",
        [
            ("with_unary", {"with_unary": True}),
            ("with_nl", {"with_gc": False, "with_nl": False}),
            ("with_gc", {"with_gc": 1}),
        ],
    )
    def test_wrong_options(self, name, options):
        with pytest.raises(ValueError, match=f"^{name}: expected "):
            BLOCKS[2].official(8, **options)


class TestModes:
    @memory_formats
    @pytest.mark.parametrize("sub_sample", [False, True])
    @pytest.mark.parametrize("mode", MODES)
    @dimensions
    @backends
    def test_mmseg(self, backend, dims, mode, sub_sample, channels_last):
        original = scramble(MmsegBlock(6, 3, sub_sample=sub_sample, dims=dims, mode=mode).double())
        ours = BLOCKS[dims].mmseg(6, 3, sub_sample=sub_sample, mode=mode, backend=backend).double()
        assert_loads_both_ways(ours, original)
        memory_format = CHANNELS_LAST.get(dims) if channels_last else None
        assert_same(ours, original, make_input(dims, 6, memory_format=memory_format))

    @pytest.mark.parametrize("mode", MODES)
    def test_learned_gamma(self, mode):
        fused = scramble(BLOCKS[2](6, 2, mode=mode, learn_gamma=True).double())
        reference = BLOCKS[2](6, 2, mode=mode, learn_gamma=True, backend="reference").double()
        reference.load_state_dict(fused.state_dict())
        assert_same(fused, reference, make_input(2, 6))

    @pytest.mark.parametrize("mode", MODES)
    def test_autocast(self, mode):
        block = scramble(BLOCKS[2].mmseg(8, mode=mode))
        x = make_input(2, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = block(x)
        y.square().sum().backward()
        assert y.dtype == torch.float32
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in block.parameters())
