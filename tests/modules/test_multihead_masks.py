"""Queries whose keys are all masked, and padding in nn.TransformerEncoder: as nn.MultiheadAttention, gradients too."""

import copy
import math

import pytest
import torch
from blocks import scramble
from test_multihead import assert_equal, backends, outputs
from torch import nn

from dnl_ext import DisentangledMultiheadAttention
from dnl_ext.integrations import convert

E, HEADS, B, L = 8, 2, 3, 5


def additive(mask):
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -math.inf)


def masks():
    """Arguments of nn.MultiheadAttention by name, all but the last with a query that has no key."""
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[0], padding[1, -2:] = True, True
    pairs = torch.zeros(L, L, dtype=torch.bool)
    pairs[2], pairs[0, 1] = True, True
    per_head = torch.zeros(B * HEADS, L, L, dtype=torch.bool)
    per_head[1, 2], per_head[4, :, 1] = True, True
    # Key 0 is padding in sample 2, and the first query of a causal mask has no other.
    causal, first = torch.ones(L, L, dtype=torch.bool).triu(1), torch.zeros(B, L, dtype=torch.bool)
    first[2, 0] = True
    return {
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": additive(padding)},
        "pairs": {"attn_mask": pairs},
        "float pairs": {"attn_mask": additive(pairs)},
        "per head": {"attn_mask": per_head},
        "float per head": {"attn_mask": additive(per_head)},
        "both": {"key_padding_mask": padding, "attn_mask": pairs},
        "float both": {"key_padding_mask": additive(padding), "attn_mask": additive(pairs)},
        "causal": {"key_padding_mask": first, "attn_mask": causal, "is_causal": True},
        "none empty": {"attn_mask": causal, "is_causal": True},
    }


MASKS = masks()
every_mask = pytest.mark.parametrize("kind", MASKS)


def pair(batch_first=True, training=True, **options):
    theirs = scramble(nn.MultiheadAttention(E, HEADS, batch_first=batch_first, **options).double()).train(training)
    return convert(copy.deepcopy(theirs), multihead=True).model, theirs


def tokens(batch_first=True):
    x = torch.randn(B, L, E, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x if batch_first else x.transpose(0, 1).contiguous()


class TestQueriesWithoutKeys:
    @every_mask
    @pytest.mark.parametrize("need_weights", [False, True])
    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"bias": False}])
    def test_equal_torch(self, options, training, need_weights, kind):
        """Values and gradients, and NaN at the same places: nowhere but with the weights."""
        ours, theirs = pair(training=training, **options)
        x = tokens(options.get("batch_first", True))
        for average in (False, True):
            call = {**MASKS[kind], "need_weights": need_weights, "average_attn_weights": average}
            result = outputs(ours, [x, x, x], **call)
            assert_equal(result, outputs(theirs, [x, x, x], **call))
            assert result[0].isnan().any() == (need_weights and kind != "none empty")
            if not need_weights:
                assert all(grad.isfinite().all() for grad in result[2])

    @pytest.mark.parametrize("need_weights", [False, True])
    def test_unbatched(self, need_weights):
        ours, theirs = pair()
        x = tokens()[0]
        for mask in ({"key_padding_mask": torch.ones(L, dtype=torch.bool)}, MASKS["pairs"], MASKS["float pairs"]):
            call = {**mask, "need_weights": need_weights}
            assert_equal(outputs(ours, [x, x, x], **call), outputs(theirs, [x, x, x], **call))

    def test_gradient_of_a_learned_mask(self):
        grads = []
        for module in pair():
            mask = MASKS["float pairs"]["attn_mask"].clone().requires_grad_()
            x = tokens()
            module(x, x, x, attn_mask=mask, need_weights=False)[0].square().sum().backward()
            grads.append(mask.grad)
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)
        assert not grads[0][2].any() and grads[0][1].any()

    def test_a_loss_that_leaves_the_sample_out(self):
        ours, theirs = pair()
        for module in (ours, theirs):
            module(tokens(), tokens(), tokens(), **MASKS["padding"], need_weights=False)[0][1:].sum().backward()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)

    @backends
    @pytest.mark.parametrize("whiten", ["channel", None])
    def test_with_the_unary_term(self, whiten, backend):
        """A sample without keys has neither term; the others are what they are without it."""
        options = {"batch_first": True, "whiten": whiten, "backend": backend}
        module = scramble(DisentangledMultiheadAttention(E, HEADS, **options).double())
        y, _, grads = outputs(module, [tokens()] * 3, **MASKS["padding"], need_weights=False)
        assert torch.equal(y[0], module.out_proj.bias.detach().expand(L, E))
        assert all(grad.isfinite().all() for grad in grads)
        padding = MASKS["padding"]["key_padding_mask"][1:]
        alone, _ = module(*[tokens()[1:]] * 3, key_padding_mask=padding, need_weights=False)
        torch.testing.assert_close(y[1:], alone, rtol=1e-12, atol=1e-12)
        with_weights, _ = module(*[tokens()] * 3, **MASKS["padding"])
        assert with_weights[0].isnan().all()
        torch.testing.assert_close(with_weights[1:], alone, rtol=1e-12, atol=1e-12)

    @every_mask
    def test_inference(self, kind):
        """torch's fast path gives NaN to these queries, and without it zeros: here they are zeros always."""
        ours, theirs = pair(training=False)
        x = tokens()
        with torch.no_grad():
            y, _ = ours(x, x, x, **MASKS[kind], need_weights=False)
            fast, _ = theirs(x, x, x, **MASKS[kind], need_weights=False)
            enabled = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                expected, _ = theirs(x, x, x, **MASKS[kind], need_weights=False)
            finally:
                torch.backends.mha.set_fastpath_enabled(enabled)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(torch.where(fast.isnan(), y, fast), y, rtol=1e-10, atol=1e-10)


def encoders(depth, training, heads=HEADS, **options):
    """An encoder (of one layer: the layer alone), and the same one converted."""
    layer = nn.TransformerEncoderLayer(E, heads, 16, dropout=0.0, batch_first=True, **options).double()
    theirs = scramble(layer if depth is None else nn.TransformerEncoder(layer, depth, enable_nested_tensor=heads == 2))
    ours = copy.deepcopy(theirs.train(training))
    assert len(convert(ours, multihead=True).converted) == (depth or 1)
    return ours, theirs


def encoder_masks(kind, depth):
    names = {"attn_mask": "src_mask" if depth is None else "mask", "key_padding_mask": "src_key_padding_mask"}
    return {names.get(name, name): value for name, value in MASKS[kind].items()}


class TestInATransformerEncoder:
    @every_mask
    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("depth", [None, 2])
    def test_equals_torch(self, depth, training, kind):
        results = []
        for module in encoders(depth, training):
            x = tokens().requires_grad_()
            y = module(x, **encoder_masks(kind, depth))
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            results.append([y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy)])
        for ours, theirs in zip(*results, strict=True):
            assert ours.isfinite().all()
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)

    @every_mask
    @pytest.mark.parametrize("depth", [None, 2])
    @pytest.mark.parametrize("heads", [1, 2])
    def test_inference(self, heads, depth, kind):
        """With padding alone the encoder hands over nested tensors, and a sample may be of length 0."""
        if heads == 1 and "per head" in kind:
            pytest.skip("its masks are for two heads")
        ours, theirs = encoders(depth, training=False, heads=heads)
        with torch.no_grad():
            y, expected = (module(tokens(), **encoder_masks(kind, depth)) for module in (ours, theirs))
        assert y.isfinite().all()
        fast_path = heads == 2 and kind != "none empty" and (depth is None or "attn_mask" in MASKS[kind])
        assert expected.isnan().any() == fast_path  # as above
        torch.testing.assert_close(torch.where(expected.isnan(), y, expected), y, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=["strided", "jagged"])
    def test_nested(self, layout):
        """Sequences one by one, whatever the whitening; the result can be added to the input."""
        module = scramble(DisentangledMultiheadAttention(E, HEADS, batch_first=True, whiten="ln").double())
        sequences = [tokens()[i, :n].requires_grad_() for i, n in enumerate((3, 0, 5))]
        nested = torch.nested.as_nested_tensor(sequences, layout=layout)
        y, weights = module(nested, nested, nested, need_weights=False)
        assert weights is None and y.is_nested and (y + nested).layout == layout
        for x, result in zip(sequences, y.unbind(), strict=True):
            if len(x):
                torch.testing.assert_close(result, module(x, x, x, need_weights=False)[0], rtol=1e-12, atol=1e-12)
            else:
                assert result.shape == (0, E)
        torch.autograd.grad(y.to_padded_tensor(0.0).sum(), sequences)

    @pytest.mark.parametrize("fault", ["query", "key_padding_mask", "attn_mask", "need_weights"])
    def test_wrong_calls(self, fault):
        module = DisentangledMultiheadAttention(E, HEADS, batch_first=fault != "query")
        nested = torch.nested.nested_tensor([torch.zeros(2, E), torch.zeros(3, E)])
        call = {"need_weights": fault == "need_weights"}
        if "mask" in fault:
            call[fault] = torch.zeros(2, 3)
        with pytest.raises(ValueError, match=f"^{fault}: expected "):
            module(nested, nested, nested, **call)


def test_masks_are_what_they_are_called():
    for kind, call in MASKS.items():
        rows = torch.zeros(B, HEADS, L, L)
        for name, mask in call.items():
            if name == "is_causal":
                continue
            mask = mask if mask.dtype == torch.float64 else additive(mask)
            if name == "key_padding_mask":
                rows = rows + mask[:, None, None]
            else:
                rows = rows + (mask if mask.dim() == 2 else mask.unflatten(0, (B, HEADS)))
        assert (rows == -math.inf).all(-1).any() == (kind != "none empty")
