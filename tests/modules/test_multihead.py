"""DisentangledMultiheadAttention: nn.MultiheadAttention where its own terms are off, written out where they are on."""

import copy
import io
import itertools
import math

import pytest
import torch
from blocks import compiled, scramble
from torch import nn
from transcriptions import _softmax, whitened

from dnl_ext import DisentangledMultiheadAttention
from dnl_ext.reference import WHITEN_NAMES

E, HEADS, B, L, S = 12, 3, 2, 5, 7
backends = pytest.mark.parametrize("backend", ["fused", "reference"])


def inputs(kdim=E, vdim=E, batch_first=True, batched=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for length, width in ((L, E), (S, kdim), (S, vdim)):
        x = torch.randn(B, length, width, generator=generator, dtype=torch.float64).to(dtype)
        x = x[0] if not batched else x if batch_first else x.transpose(0, 1).contiguous()
        tensors.append(x.requires_grad_())
    return tensors


def outputs(module, tensors, **options):
    """Output, weights, gradients of inputs and parameters."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    y, weights = module(*tensors, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    parameters = [p for p in module.parameters()]
    grads = torch.autograd.grad(y, [*tensors, *parameters], dy)
    return y.detach(), weights, grads


def assert_equal(ours, theirs):
    close = {"rtol": 1e-10, "atol": 1e-10, "equal_nan": True}
    torch.testing.assert_close(ours[0], theirs[0], **close)
    assert (ours[1] is None) == (theirs[1] is None)
    if ours[1] is not None:
        torch.testing.assert_close(ours[1], theirs[1], **close)
    for a, b in zip(ours[2], theirs[2], strict=True):
        torch.testing.assert_close(a, b, **close)


def pair(backend="fused", **options):
    theirs = scramble(nn.MultiheadAttention(E, HEADS, **options).double())
    ours = DisentangledMultiheadAttention(E, HEADS, unary=False, whiten=None, backend=backend, **options).double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


class TestAsMultiheadAttention:
    @pytest.mark.parametrize("need_weights", [False, True])
    @pytest.mark.parametrize("batched, batch_first", [(True, True), (True, False), (False, False), (False, True)])
    @pytest.mark.parametrize("kdim, vdim", [(E, E), (8, 10), (E, 9)])
    @pytest.mark.parametrize("bias", [True, False])
    @backends
    def test_equals_torch(self, backend, bias, kdim, vdim, batched, batch_first, need_weights):
        ours, theirs = pair(backend, bias=bias, kdim=kdim, vdim=vdim, batch_first=batch_first)
        x = inputs(kdim, vdim, batch_first, batched)
        for average in (True, False):
            options = {"need_weights": need_weights, "average_attn_weights": average}
            assert_equal(outputs(ours, x, **options), outputs(theirs, x, **options))

    @pytest.mark.parametrize("need_weights", [False, True])
    @pytest.mark.parametrize("kind", ["padding", "float_padding", "causal", "float", "per_head", "both"])
    @backends
    def test_masks_equal_torch(self, backend, kind, need_weights):
        ours, theirs = pair(backend, batch_first=True)
        generator = torch.Generator().manual_seed(3)
        padding = torch.zeros(B, S, dtype=torch.bool)
        padding[0, -2:] = padding[1, 0] = True
        pairs = torch.rand(L, S, generator=generator) < 0.3
        pairs[:, 3] = False
        options = {
            "padding": {"key_padding_mask": padding},
            "float_padding": {"key_padding_mask": torch.randn(B, S, generator=generator, dtype=torch.float64)},
            "causal": {"attn_mask": torch.ones(L, S, dtype=torch.bool).triu(1), "is_causal": True},
            "float": {"attn_mask": torch.randn(L, S, generator=generator, dtype=torch.float64)},
            "per_head": {"attn_mask": pairs.expand(B * HEADS, L, S).clone()},
            "both": {"attn_mask": pairs, "key_padding_mask": padding},
        }[kind]
        options["need_weights"] = need_weights
        assert_equal(outputs(ours, inputs(), **options), outputs(theirs, inputs(), **options))

    def test_unbatched_padding(self):
        ours, theirs = pair()
        padding = torch.tensor([True] * 2 + [False] * (S - 2))
        x = inputs(batched=False)
        options = {"key_padding_mask": padding}
        assert_equal(outputs(ours, x, **options), outputs(theirs, x, **options))

    def test_initialisation_has_the_same_bounds(self):
        ours, theirs = (m(64, 4) for m in (DisentangledMultiheadAttention, nn.MultiheadAttention))
        for name, parameter in theirs.named_parameters():
            other = ours.get_parameter(name)
            assert other.shape == parameter.shape
            torch.testing.assert_close(other.std(), parameter.std(), rtol=0.1, atol=0.0)

    def test_in_a_transformer_layer(self):
        """In eval mode the layer's fast path would skip a module's forward; it must not skip this one's."""
        layer = nn.TransformerEncoderLayer(E, HEADS, 16, dropout=0.0, batch_first=True).double()
        layer.self_attn = scramble(DisentangledMultiheadAttention(E, HEADS, batch_first=True).double())
        x = inputs()[0].detach()
        expected = layer.train()(x)
        with torch.no_grad():
            torch.testing.assert_close(layer.eval()(x), expected)
            plain = copy.deepcopy(layer)
            plain.self_attn.unary, plain.self_attn.mask_proj, plain.self_attn.whiten = False, None, None
            assert (plain(x) - expected).abs().max() > 1e-3


def written_out(module, query, key, value, padding=None):
    """Output and weights (B, heads, L, S), head by head."""
    d = E // HEADS
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.split(E)
    else:
        weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    biases = module.in_proj_bias.split(E)
    q, k, v = (x @ w.T + b for x, w, b in zip((query, key, value), weights, biases, strict=True))
    logits = key @ module.mask_proj.weight.T + module.mask_proj.bias
    # Over "the whole tensor" every head counts, so whitening comes first.
    q, k = (x.unflatten(-1, (HEADS, d)).permute(0, 2, 3, 1).reshape(-1, d, x.shape[1]) for x in (q, k))
    q, k = (whitened(x, module.whiten).unflatten(0, (B, HEADS)) for x in (q, k))
    pieces, maps = [], []
    for h in range(HEADS):
        s = torch.einsum("bci,bcj->bij", q[:, h], k[:, h]) / (math.sqrt(d) * module.temperature)
        m = logits[..., h]
        if padding is not None:
            s, m = s.masked_fill(padding[:, None], -math.inf), m.masked_fill(padding, -math.inf)
        weights = _softmax(s) + _softmax(m)[:, None]
        maps.append(weights)
        pieces.append(weights @ v[..., h * d : (h + 1) * d])
    y = torch.cat(pieces, -1) @ module.out_proj.weight.T + module.out_proj.bias
    return y, torch.stack(maps, 1)


class TestBothTerms:
    @pytest.mark.parametrize("whiten", WHITEN_NAMES)
    @pytest.mark.parametrize("kdim", [E, 8])
    @backends
    def test_equals_transcription(self, backend, kdim, whiten):
        options = {"kdim": kdim, "batch_first": True, "whiten": whiten, "temperature": 0.3, "backend": backend}
        module = scramble(DisentangledMultiheadAttention(E, HEADS, **options).double())
        x = inputs(kdim)
        names = list(dict(module.named_parameters()))
        y, weights = written_out(module, *x)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        grads = torch.autograd.grad(y, [*x, *module.parameters()], dy)
        assert weights[..., 0, :].max() > 0.5
        for need_weights in (False, True):
            ours = outputs(module, x, need_weights=need_weights, average_attn_weights=False)
            assert_equal((ours[0], None, ours[2]), (y.detach(), None, grads))
            if need_weights:
                torch.testing.assert_close(ours[1], weights, rtol=1e-10, atol=1e-10)
        assert names[-2:] == ["mask_proj.weight", "mask_proj.bias"]

    @pytest.mark.parametrize("whiten", ["channel", "spatial", None])
    def test_padding_leaves_keys_out_of_both_terms(self, whiten):
        module = scramble(DisentangledMultiheadAttention(E, HEADS, batch_first=True, whiten=whiten).double())
        padding = torch.zeros(B, S, dtype=torch.bool)
        padding[0, -3:] = True
        for need_weights in (False, True):
            y, _ = module(*inputs(), key_padding_mask=padding, need_weights=need_weights)
            torch.testing.assert_close(y, written_out(module, *inputs(), padding)[0], rtol=1e-10, atol=1e-10)
        query, key, value = inputs()
        shorter = module(query[:1], key[:1, :-3], value[:1, :-3], need_weights=False)[0]
        torch.testing.assert_close(y[:1], shorter, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("need_weights", [False, True])
    def test_empty_batch(self, need_weights):
        module = DisentangledMultiheadAttention(E, HEADS, batch_first=True)
        y, weights = module(*(torch.zeros(0, n, E) for n in (L, S, S)), need_weights=need_weights)
        y.sum().backward()
        assert y.shape == (0, L, E) and (weights is None or weights.shape == (0, L, S))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype):
        module = scramble(DisentangledMultiheadAttention(E, HEADS, batch_first=True).double())
        expected = module(*inputs(), need_weights=False)[0]
        for need_weights in (False, True):
            y, _, grads = outputs(copy.deepcopy(module).to(dtype), inputs(dtype=dtype), need_weights=need_weights)
            assert all(grad.isfinite().all() for grad in grads)
            torch.testing.assert_close(y.double(), expected, rtol=0.1, atol=0.1)

    def test_gradcheck(self):
        module = scramble(DisentangledMultiheadAttention(4, 2, batch_first=True).double())
        x = [torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        assert torch.autograd.gradcheck(lambda *x: module(*x, need_weights=False)[0], x)

    def test_compiles_copies_and_is_saved(self):
        module = scramble(DisentangledMultiheadAttention(E, HEADS, batch_first=True).double())
        copied = compiled(module)
        expected = outputs(module, inputs(), need_weights=False)
        assert_equal(outputs(copied, inputs(), need_weights=False), expected)
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        assert_equal(outputs(torch.load(file, weights_only=False), inputs(), need_weights=False), expected)
        assert "12, 3, kdim=12" in repr(module) and "whiten='channel'" in repr(module)

    def test_memory_is_linear(self):
        def largest(need_weights):
            module, x = DisentangledMultiheadAttention(8, 2, batch_first=True), torch.randn(1, 3000, 8)
            with torch.profiler.profile(profile_memory=True) as profile:
                module(x, x, x, need_weights=need_weights)[0].sum().backward()
            return max(event.cpu_memory_usage for event in profile.events())

        assert largest(False) < 16 << 20 < 64 << 20 < largest(True)


class TestWrongCalls:
    @pytest.mark.parametrize(
        "error, name, options",
        [
            (ValueError, "embed_dim", {"embed_dim": 0}),
            (ValueError, "embed_dim", {"embed_dim": 10}),
            (ValueError, "num_heads", {"num_heads": None}),
            (ValueError, "kdim", {"kdim": -1}),
            (ValueError, "bias", {"bias": 1}),
            (ValueError, "unary", {"unary": None}),
            (ValueError, "whiten", {"whiten": "bn"}),
            (ValueError, "temperature", {"temperature": 0}),
            (NotImplementedError, "dropout", {"dropout": 0.1}),
            (NotImplementedError, "add_bias_kv", {"add_bias_kv": True}),
            (NotImplementedError, "add_zero_attn", {"add_zero_attn": True}),
        ],
    )
    def test_options(self, error, name, options):
        with pytest.raises(error, match=f"^{name}: expected "):
            DisentangledMultiheadAttention(**{"embed_dim": E, "num_heads": HEADS, **options})

    @pytest.mark.parametrize(
        "error, name, fault",
        [
            (TypeError, "query", {"query": None}),
            (ValueError, "query", {"query": torch.zeros(B, L, 5)}),
            (ValueError, "key", {"key": torch.zeros(B + 1, S, E)}),
            (ValueError, "key", {"key": torch.zeros(S, E)}),
            (ValueError, "value", {"value": torch.zeros(B, S + 1, E)}),
            (ValueError, "key_padding_mask", {"key_padding_mask": torch.zeros(S, B, dtype=torch.bool)}),
            (ValueError, "key_padding_mask", {"key_padding_mask": torch.zeros(B, S, dtype=torch.int64)}),
            (TypeError, "key_padding_mask", {"key_padding_mask": [True]}),
            (ValueError, "attn_mask", {"attn_mask": torch.zeros(L, S)}),
            (ValueError, "attn_mask", {"is_causal": True}),
        ],
    )
    def test_calls(self, error, name, fault):
        module = DisentangledMultiheadAttention(E, HEADS, batch_first=True)
        arguments = dict(zip(("query", "key", "value"), inputs(dtype=torch.float32), strict=True))
        with pytest.raises(error, match=f"^{name}: expected "):
            module(**{**arguments, **fault})

    def test_masks_that_have_no_meaning(self):
        for whiten, unary in itertools.product(("in", "ln_nostd", "fln"), (False, True)):
            module = DisentangledMultiheadAttention(E, HEADS, batch_first=True, whiten=whiten, unary=unary)
            with pytest.raises(ValueError, match=r"^key_padding_mask: expected None with whiten="):
                module(*inputs(dtype=torch.float32), key_padding_mask=torch.zeros(B, S, dtype=torch.bool))
