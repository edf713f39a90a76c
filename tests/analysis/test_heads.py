"""Statistics of every attention head of a network: against dense maps in float64, for every kind of mask."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from eager_blocks import MmcvNonLocal
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dnl_ext import analysis
from dnl_ext.analysis import terms as terms_module
from dnl_ext.integrations import convert

BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 3, 9, 7, 4
EXACT = {"rel": 1e-9, "abs": 1e-10}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 4 rows, so that every test crosses chunk borders."""
    monkeypatch.setattr(terms_module, "CHUNK_VALUES", 4 * KEYS)


class Call(nn.Module):
    """A network that is one call of F.scaled_dot_product_attention."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value, **self.options)


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.4


def inputs(key_heads=HEADS):
    shape = (BATCH, key_heads, KEYS, WIDTH)
    return 2 * draw(BATCH, HEADS, QUERIES, WIDTH), draw(*shape, seed=1), draw(*shape, seed=2)


def masks():
    """Options of a call by name: what all queries share, and what depends on the query."""
    keys = torch.tensor([True, True, False, True, True, True, False])
    pairs = torch.rand(QUERIES, KEYS, generator=torch.Generator().manual_seed(5)) > 0.4
    pairs[:, 0] = True
    bias = draw(1, HEADS, QUERIES, KEYS, seed=6)
    return {
        "none": {},
        "scale": {"scale": 0.9},
        "padding": {"attn_mask": keys.expand(BATCH, 1, 1, KEYS)},
        "padding in a full mask": {"attn_mask": keys.repeat(QUERIES, 1)},
        "bias of the keys": {"attn_mask": draw(BATCH, 1, 1, KEYS).masked_fill(~keys, -torch.inf)},
        "padding by the least number": {
            "attn_mask": torch.zeros(1, KEYS, dtype=torch.float64).masked_fill(~keys, torch.finfo(torch.float64).min)
        },
        "mask of pairs": {"attn_mask": pairs},
        "causal padding": {"attn_mask": torch.ones(QUERIES, KEYS, dtype=torch.bool).tril() & keys},
        "position bias": {"attn_mask": bias},
        "position bias and mask": {"attn_mask": bias.masked_fill(~pairs, -torch.inf)},
        "causal": {"is_causal": True},
    }  # fmt: skip


def added(options):
    """What a call adds to the logits, (BATCH, HEADS, QUERIES, KEYS)."""
    mask = options.get("attn_mask")
    if options.get("is_causal"):
        mask = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril()
    if mask is None:
        mask = torch.zeros(())
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    mask = mask.masked_fill(mask < -1e300, -torch.inf).double()
    return mask.expand(BATCH, HEADS, QUERIES, KEYS)


def entropy(p):
    return torch.special.entr(p).sum(-1)


def row_figures(rows, order):
    """Mean entropy, cosine distance of all pairs, JSD of disjoint pairs in this order."""
    unit = F.normalize(rows, dim=1)
    distance = [(1 - unit[i] @ unit[j]) / 2 for i, j in itertools.combinations(range(len(rows)), 2)]
    first, second = rows[order[:-1:2]], rows[order[1::2]]
    jsd = entropy((first + second) / 2) - (entropy(first) + entropy(second)) / 2
    return {"entropy": entropy(rows).mean(), "cosine_distance": torch.stack(distance).mean(), "jsd": jsd.mean()}


def dense(query, key, added, scale, order):
    """The figures of one head from its full maps."""
    shared = bool((added == added[:1]).all())
    kept = (added > -torch.inf).any(0)
    logits = (scale * query @ key.T)[:, kept]
    in_pairs = 0.0 if shared else added[:, kept]
    by_key = logits.mean(0) + (added[0, kept] if shared else 0.0)
    pairwise = (logits - logits.mean(0) + in_pairs).softmax(1)
    total = (scale * query @ key.T + added).softmax(1)[:, kept]
    torch.testing.assert_close(total, F.normalize(pairwise * by_key.softmax(0), p=1, dim=1))  # a product, normalised
    rest = logits - logits.mean(0) - logits.mean(1, keepdim=True) + logits.mean()
    parts = {"pairwise": rest.var(correction=0), "unary": by_key.var(correction=0)}
    parts["row"] = logits.mean(1).var(correction=0)
    figures = {f"decomposition.{name}": part / sum(parts.values()) for name, part in parts.items()}
    figures["decomposition.unary_of_map"] = parts["unary"] / (parts["unary"] + parts["pairwise"])
    for name, rows in (("total", total), ("pairwise", pairwise)):
        figures |= {f"{name}.{key}": value for key, value in row_figures(rows, order).items()}
        figures[f"{name}.entropy_share"] = figures[f"{name}.entropy"] / math.log(int(kept.sum()))
    figures["unary.entropy"] = entropy(by_key.softmax(0))
    if not shared:
        figures |= {f"mask.{key}": value for key, value in row_figures(in_pairs.softmax(1), order).items()}
    return figures


def assert_equal(report, query, key, added, scale):
    (layer,) = report.layers.values()
    assert len(layer.heads) == HEADS
    for head, image in itertools.product(range(HEADS), range(BATCH)):
        order = torch.randperm(QUERIES, generator=torch.Generator().manual_seed(image))
        expected = dense(query[image, head], key[image, head], added[image, head], scale, order)
        found = analysis.results.flatten(layer.heads[head].images[image])
        for name, value in expected.items():
            assert found[name] == pytest.approx(float(value), **EXACT), (name, head, image)
        assert ("mask.jsd" in found) == ("mask.jsd" in expected)


class TestAgainstDenseMaps:
    @pytest.mark.parametrize("name", masks())
    def test_every_mask(self, name):
        options = masks()[name]
        query, key, value = inputs()
        report = analysis.measure_model(Call(**options), [(query, key, value)], queries=None)
        assert_equal(report, query, key, added(options), options.get("scale", 1 / math.sqrt(WIDTH)))

    def test_heads_that_share_keys(self):
        query, key, value = inputs(key_heads=1)
        report = analysis.measure_model(Call(enable_gqa=True), [(query, key, value)], queries=None)
        assert_equal(report, query, key.expand(-1, HEADS, -1, -1), added({}), 1 / math.sqrt(WIDTH))
        assert report.layers[""].remarks == ["1 key heads"]

    def test_heads_share_keys_in_groups(self):
        query, key = draw(1, 4, QUERIES, WIDTH), draw(1, 2, KEYS, WIDTH, seed=1)
        report = analysis.measure_model(Call(enable_gqa=True), [(query, key, key)], queries=None)
        repeated = key.repeat_interleave(2, 1)
        expected = analysis.measure_model(Call(), [(query, repeated, repeated)], queries=None)
        assert [head.summary() for head in report.layers[""].heads] == [
            head.summary() for head in expected.layers[""].heads
        ]

    def test_bfloat16_is_measured_in_float32(self):
        query, key, value = (x.bfloat16() for x in inputs())
        report = analysis.measure_model(Call(), [(query, key, value)], queries=None)
        expected = analysis.measure_model(Call(), [(query.double(), key.double(), value.double())], queries=None)
        for (_, _, found), (_, _, wanted) in zip(report.heads(), expected.heads(), strict=True):
            assert found["total.jsd"].value == pytest.approx(wanted["total.jsd"].value, rel=1e-4)

    def test_a_head_that_ignores_the_query_is_first(self):
        query, key, value = inputs()
        query[:, 1] = query[:, 1, :1]
        report = analysis.measure_model(Call(), [(query, key, value)])
        layer, head, figures = report.ranking()[0]
        assert (layer, head) == ("", 1)
        assert figures["total.jsd"].value < 1e-12 < report.ranking()[1][2]["total.jsd"].value
        assert figures["decomposition.unary_of_map"].value == pytest.approx(1)


class TestQueriesWithoutKeys:
    def test_are_left_out(self):
        mask = torch.ones(QUERIES, KEYS, dtype=torch.bool)
        mask[0, 2] = False  # so that it depends on the query
        mask[4:6] = False
        query, key, value = inputs()
        (layer,) = analysis.measure_model(Call(attn_mask=mask), [(query, key, value)], queries=None).layers.values()
        kept = [0, 1, 2, 3, 6, 7, 8]
        rows = (query[0, 0, kept] @ key[0, 0].T / 2).masked_fill(~mask[kept], -torch.inf).softmax(1)
        statistics = layer.heads[0].images[0]
        assert statistics.sampled == 7
        assert statistics.total.entropy.value == pytest.approx(float(entropy(rows).mean()))

    def test_an_image_of_padding(self):
        mask = torch.ones(BATCH, 1, 1, KEYS, dtype=torch.bool)
        mask[1] = False
        (layer,) = analysis.measure_model(Call(attn_mask=mask), [inputs()]).layers.values()
        assert [len(head.images) for head in layer.heads] == [1] * HEADS

    @pytest.mark.parametrize("size", [(1, 1, 1, KEYS), (QUERIES, KEYS)])
    def test_nothing_but_padding(self, size):
        mask = torch.zeros(size, dtype=torch.bool)
        mask[..., 0, 0] = True
        report = analysis.measure_model(Call(attn_mask=mask), [inputs()])
        assert not report.layers and "fewer than two keys" in report.skipped[""]


class TestModules:
    def tokens(self, count=QUERIES):
        return torch.randn(BATCH, count, 16, generator=torch.Generator().manual_seed(count))

    def test_multihead_attention_with_and_without_weights(self):
        attention = nn.MultiheadAttention(16, 4, batch_first=True)
        padding = torch.zeros(BATCH, QUERIES, dtype=torch.bool)
        padding[1, 6:] = True
        arguments = dict.fromkeys(("query", "key", "value"), self.tokens()) | {"key_padding_mask": padding}
        with_weights = analysis.measure_model(attention, [arguments]).heads()
        assert with_weights == analysis.measure_model(attention, [{**arguments, "need_weights": False}]).heads()
        assert len(with_weights) == 4
        weights = attention(**arguments, average_attn_weights=False)[1].detach()
        for (_, head, figures), maps in zip(with_weights, weights.transpose(0, 1), strict=True):
            expected = entropy(maps.double()).mean()
            assert figures["total.entropy"].value == pytest.approx(float(expected), rel=1e-5), head

    def test_decoder(self):
        """Cross attention from fewer queries, and what its own projections make of them."""
        decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 32, batch_first=True), 2).double().eval()
        target, memory = self.tokens(5).double(), self.tokens().double()
        causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
        report = analysis.measure_model(decoder, [{"tgt": target, "memory": memory, "tgt_mask": causal}], queries=None)
        assert list(report.layers) == [f"layers.{n}.{name}" for n in (0, 1) for name in ("self_attn", "multihead_attn")]
        assert report.layers["layers.0.self_attn"].remarks == ["causal"]  # which PyTorch finds in the mask
        cross = report.layers["layers.0.multihead_attn"].heads
        assert (len(cross), cross[0].images[0].queries, cross[0].images[0].keys) == (4, 5, QUERIES)

        layer, seen = decoder.layers[0], []
        layer.multihead_attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        decoder(target, memory, tgt_mask=causal)
        weights = layer.multihead_attn(seen[0], memory, memory, average_attn_weights=False)[1].detach()
        for head in range(4):
            for image in range(BATCH):
                order = torch.randperm(5, generator=torch.Generator().manual_seed(image))
                found = cross[head].images[image].total
                for name, value in row_figures(weights[image, head], order).items():
                    assert getattr(found, name).value == pytest.approx(float(value), **EXACT)

    def test_encoder_in_evaluation_mode(self):
        """Where PyTorch's fast path computes attention in C++, unseen, and makes nested tensors of padded batches."""
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2).eval()
        padding = torch.zeros(BATCH, QUERIES, dtype=torch.bool)
        padding[1, 6:] = True
        arguments = {"src": self.tokens(), "src_key_padding_mask": padding}
        report = analysis.measure_model(encoder, [arguments])
        assert list(report.layers) == ["layers.0.self_attn", "layers.1.self_attn"] and not report.skipped
        assert [image.keys for image in report.layers["layers.0.self_attn"].heads[0].images] == [QUERIES, 6]

    def test_converted_multihead_attention_is_named(self):
        model = convert(nn.Sequential(nn.MultiheadAttention(8, 2)), multihead=True).model
        report = analysis.measure_model(model, [])
        assert "restore" in report.skipped["0"]

    def test_blocks_stand_beside_heads(self):
        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.block, self.attention = MmcvNonLocal(8), nn.MultiheadAttention(8, 2, batch_first=True)

            def forward(self, x):
                x = self.block(x).flatten(2).transpose(1, 2)
                return self.attention(x, x, x)[0]

        report = analysis.measure_model(Both(), [torch.randn(1, 8, 4, 4)], progress=lambda *done: None)
        assert {name: len(layer.heads) for name, layer in report.layers.items()} == {"attention": 2, "block": 1}
        table = report.table()
        assert "| block | 1 | 16 x 16 |" in table and "Heads, those that ignore the query first" in table

    def test_a_block_that_calls_the_function_is_one_layer(self):
        class Block(MmcvNonLocal):
            def __init__(self):
                super().__init__(8)
                self.inner = Call()

            def attention_inputs(self, x):
                return analysis.blocks.mmseg_inputs(self, x)

            def forward(self, x):
                inputs = self.attention_inputs(x)
                self.inner(inputs.query, inputs.key, inputs.value)
                return x

        report = analysis.measure_model(nn.Sequential(Block()), [torch.randn(1, 8, 4, 4)])
        assert list(report.layers) == ["0"] and len(report.layers["0"].heads) == 1

    def test_wrong_calls(self):
        with pytest.raises(ValueError, match="queries: expected None or a number of at least 2, got 1"):
            analysis.measure_model(Call(), [], queries=1)

    def test_to_dict(self):
        entry = analysis.measure_model(Call(), [inputs()]).to_dict()
        assert len(entry["layers"][0]["heads"]) == HEADS
        assert entry["layers"][0]["heads"][0]["summary"]["total.jsd"]["count"] == BATCH


class Largest(TorchDispatchMode):
    """Size of the largest tensor that an operator gives."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.size = max(self.size, result.numel())
        return result


@pytest.mark.parametrize("options", [{}, {"is_causal": True}])
def test_memory_is_linear(options, monkeypatch):
    """No tensor grows faster than the number of positions, where a map of 2,048 has 4 M weights."""
    monkeypatch.setattr(terms_module, "CHUNK_VALUES", 2**15)
    tokens = torch.randn(1, 1, 2048, 32)
    call = analysis.AttentionCall(tokens, tokens, tokens, **options)
    with Largest() as largest:
        analysis.heads.HeadRecorder(analysis.ModelReport(), 256, 0, ())("layer", call)
    assert largest.size <= 256 * 2048
