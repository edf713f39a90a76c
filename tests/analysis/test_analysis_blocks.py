"""The analysis of whole blocks and networks: which modules are understood, their rows, and the probe."""

import pytest
import torch
from eager_blocks import MmcvNonLocal, OfficialNonLocal

import dnl_ext
from dnl_ext import analysis
from dnl_ext.analysis.terms import split_images
from dnl_ext.modules import AttentionInputs


def eager_blocks():
    torch.manual_seed(1)
    return {
        "nl": MmcvNonLocal(8), "nl, no scale": MmcvNonLocal(8, use_scale=False),
        "nl, sub-sampled": MmcvNonLocal(8, sub_sample=True), "dnl": MmcvNonLocal(8, dnl=True),
        "official": OfficialNonLocal(8, 4), "official, downsample": OfficialNonLocal(8, 4, downsample=True),
        "official nl": OfficialNonLocal(8, 4, whiten_type=(), with_gc=False),
        "official, unary from the keys": OfficialNonLocal(8, 4, whiten_type=(), with_gc=False, with_unary=True),
        "official, bn": OfficialNonLocal(8, 4, whiten_type=("bn",)).eval(),
    }  # fmt: skip


class TestBlocks:
    @pytest.mark.parametrize("name", eager_blocks())
    def test_eager_blocks_are_understood(self, name):
        block, x = eager_blocks()[name].double(), torch.randn(2, 8, 4, 6, dtype=torch.float64)
        inputs = analysis.block_inputs(block, x)
        pairwise, unary = block.maps(x)
        for image, terms in enumerate(split_images(inputs)):
            rows = terms.rows(torch.arange(24))
            applied = rows.total if terms.joint == "product" else rows.pairwise
            torch.testing.assert_close(applied, pairwise[image])
            if unary is not None:
                torch.testing.assert_close(rows.unary, unary[image])
        assert inputs.query_shape == (4, 6)
        assert inputs.key_shape == ((2, 3) if "sample" in name else (4, 6))

    def assert_rows_make_the_output(self, block, x):
        """Weights times values, through the block's own out-projection, are what its forward adds."""
        for image, terms in enumerate(split_images(block.attention_inputs(x))):
            rows = terms.rows(torch.arange(terms.queries))
            weight = terms.gain + 1 if terms.joint == "sum" else 1.0
            y = (weight * rows.total @ terms.value).T.view(1, -1, *x.shape[2:])
            y = y if block.conv_out is None else block.conv_out(y)
            torch.testing.assert_close(x[image : image + 1] + y, block(x)[image : image + 1])

    def block(self, **options):
        block = dnl_ext.DisentangledNonLocal2d(8, **{"norm": None, "temperature": 0.5, **options}).double().eval()
        for layer in block.modules():
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.normal_(layer.weight)
        if block.gamma is not None:
            torch.nn.init.constant_(block.gamma, 0.3)
        return block

    @pytest.mark.parametrize("sub_sample", [None, "before", "after"])
    @pytest.mark.parametrize("variant", ["nl", "pairwise", "unary", "dnl_shared_key", "dnl"])
    def test_every_variant(self, variant, sub_sample):
        x = torch.randn(2, 8, 4, 6, dtype=torch.float64) + 0.5
        block = self.block(variant=variant, sub_sample=sub_sample)
        self.assert_rows_make_the_output(block, x)
        joint = split_images(block.attention_inputs(x)).__next__().joint
        expected = {"nl": "product", "dnl_shared_key": "sum", "dnl": "sum"}.get(variant, variant)
        assert joint == expected

    @pytest.mark.parametrize("whiten", ["spatial", "ln_nostd", "fln_nostd", "in", "ln", "fln", "bn", "bn_affine"])
    def test_every_whitening(self, whiten):
        x = torch.randn(2, 8, 4, 6, dtype=torch.float64) + 0.5
        self.assert_rows_make_the_output(self.block(whiten=whiten), x)

    @pytest.mark.parametrize("options", [{"learn_gamma": True}, {"mode": "gaussian"}, {"style": "mmseg"}])
    def test_other_options(self, options):
        self.assert_rows_make_the_output(self.block(**options), torch.randn(2, 8, 4, 6, dtype=torch.float64))

    @pytest.mark.parametrize("mode", ["dot_product", "concatenation"])
    def test_no_softmax_no_map(self, mode):
        with pytest.raises(NotImplementedError, match=f"softmaxes, got '{mode}'"):
            dnl_ext.NonLocal2d(8, mode=mode).attention_inputs(torch.randn(1, 8, 4, 4))

    def test_global_context_is_one_map(self):
        for block in (dnl_ext.GlobalContext2d(8), dnl_ext.SimplifiedNonLocal2d(8)):
            (terms,) = split_images(block.attention_inputs(torch.randn(1, 8, 4, 6)))
            assert terms.joint == "unary" and analysis.measure_terms(terms, 8).total.jsd.value < 1e-6

    def test_attention_rows(self):
        block, x = MmcvNonLocal(8, dnl=True).double(), torch.randn(1, 8, 4, 6, dtype=torch.float64)
        maps = analysis.attention_rows(block, x, [(0, 0), (3, 1)])
        pairwise, unary = block.maps(x)
        torch.testing.assert_close(maps.pairwise, pairwise[0, [0, 19]].view(2, 4, 6))
        torch.testing.assert_close(maps.unary, unary[0].view(4, 6))
        torch.testing.assert_close(maps.total, (maps.pairwise + maps.unary) / 2)
        assert maps.own is maps.pairwise

    def test_rows_in_one_and_three_dimensions(self):
        for block, shape, query in (
            (dnl_ext.DisentangledNonLocal1d(4), (9,), (7,)),
            (dnl_ext.DisentangledNonLocal3d(4), (2, 3, 4), (1, 2, 3)),
        ):
            maps = analysis.attention_rows(block, torch.randn(1, 4, *shape), [query])
            assert maps.pairwise.shape == (1, *shape) and maps.unary.shape == shape

    def test_wrong_calls(self):
        block = MmcvNonLocal(8)
        with pytest.raises(ValueError, match="expected one image, got 2"):
            analysis.attention_rows(block, torch.randn(2, 8, 4, 4), [(0, 0)])
        with pytest.raises(ValueError, match=r"expected positions on 4 x 4, got \(4, 0\)"):
            analysis.attention_rows(block, torch.randn(1, 8, 4, 4), [(4, 0)])
        with pytest.raises(ValueError, match="queries: expected at least one"):
            analysis.attention_rows(block, torch.randn(1, 8, 4, 4), [])
        with pytest.raises(TypeError, match=r"expected positions of integers, got \[\(0.5, 0\)\]"):
            analysis.attention_rows(block, torch.randn(1, 8, 4, 4), [(0.5, 0)])
        with pytest.raises(analysis.NotAttention, match="expected attention_inputs"):
            analysis.block_inputs(torch.nn.Conv2d(1, 1, 1), torch.randn(1, 1, 2, 2))
        block.mode = "dot_product"
        with pytest.raises(analysis.NotAttention, match="got 'dot_product'"):
            analysis.block_inputs(block, torch.randn(1, 8, 4, 4))

    def test_any_module_with_the_method(self):
        class Heads(torch.nn.Module):
            """Two heads, four dimensions."""

            def attention_inputs(self, x):
                tokens = x.flatten(2).transpose(1, 2).unflatten(2, (2, -1)).transpose(1, 2)
                shape = tuple(x.shape[2:])
                return AttentionInputs(tokens, tokens, tokens, None, 1.0, None, 1.0, shape, shape)

            def forward(self, x):
                return x

        with analysis.AttentionProbe(Heads(), queries=6) as probe:
            probe.model(torch.randn(3, 8, 4, 4))
        assert len(probe.blocks[""].images) == 6


class TestProbe:
    def network(self):
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, 2, 1), MmcvNonLocal(8), torch.nn.ReLU(), OfficialNonLocal(8, 4),
            dnl_ext.DisentangledNonLocal2d(8),
        )  # fmt: skip

    def loader(self):
        return [(torch.randn(2, 3, 8, 12), torch.randint(0, 3, (2, 8, 12))) for _ in range(2)]

    def test_every_block_and_image(self):
        network = self.network()
        calls = []
        with analysis.AttentionProbe(network, queries=10) as probe:
            probe.run(self.loader(), progress=lambda *call: calls.append(call))
        assert calls == [(1, 2), (2, 2)]
        assert [report.joint for report in probe.blocks.values()] == ["product", "sum", "sum"]
        assert list(probe.blocks) == ["1", "3", "4"] and all(len(r.images) == 4 for r in probe.blocks.values())
        summary = probe.summary()["1"]
        single = [image.total.jsd.value for image in probe.blocks["1"].images]
        assert summary["total.jsd"].value == pytest.approx(sum(single) / 4)
        assert summary["total.jsd"].count == 4
        assert "pairwise.own_class.mass" in summary and "coupling.pairwise_by_unary.slope" in summary
        assert "| cosine distance of rows, total |" in probe.table()
        assert probe.to_dict()["blocks"][0]["images"] == 4
        assert network.training  # as before
        network(torch.randn(1, 3, 8, 8))
        assert len(probe.blocks["1"].images) == 4  # the hooks are gone

    def test_equals_the_measurement_by_hand(self):
        network, images = self.network().eval(), torch.randn(1, 3, 8, 12)
        with analysis.AttentionProbe(network, queries=None) as probe, torch.no_grad():
            network(images)
            features = network[0](images)
            outputs = network[1](features)
        (terms,) = split_images(analysis.block_inputs(network[1], features))
        flat = [x[0].flatten(1).T for x in (features, outputs)]
        expected = analysis.measure_terms(terms, None, inputs=flat[0], outputs=flat[1])
        assert probe.blocks["1"].images[0].decomposition == expected.decomposition
        assert probe.blocks["1"].images[0].total.entropy.value == pytest.approx(expected.total.entropy.value)
        assert probe.blocks["1"].images[0].input_cosine_distance == expected.input_cosine_distance
        assert probe.blocks["1"].images[0].output_cosine_distance == expected.output_cosine_distance

    def test_does_not_change_the_network(self):
        network, images = self.network().eval(), torch.randn(1, 3, 8, 12)
        before = network(images)
        with analysis.AttentionProbe(network):
            torch.testing.assert_close(network(images), before, rtol=0, atol=0)

    def test_under_autocast_only_the_block_is_narrow(self):
        """Rows come from the bfloat16 query and key, but in float32."""
        network, images = self.network().eval(), 3 * torch.randn(1, 3, 8, 12)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            with analysis.AttentionProbe(network, queries=None) as probe:
                network(images)
            features = network[0](images)
            inputs = analysis.block_inputs(network[1], features)
            maps = analysis.attention_rows(network[1], features, [(1, 2)])
        assert inputs.query.dtype == torch.bfloat16
        (terms,) = split_images(inputs)
        expected = analysis.measure_terms(terms, None)
        assert probe.blocks["1"].images[0].total.entropy.value == pytest.approx(expected.total.entropy.value, rel=1e-7)
        assert probe.blocks["1"].images[0].decomposition == expected.decomposition
        torch.testing.assert_close(maps.total[0].flatten(), terms.rows(torch.tensor([8])).total[0], rtol=1e-6, atol=0)

    def test_a_block_without_softmax_is_skipped(self):
        network = self.network()
        network[1].mode = "dot_product"
        with analysis.AttentionProbe(network, queries=4) as probe:
            probe.run(self.loader(), progress=False)
        assert list(probe.blocks) == ["3", "4"] and "dot_product" in probe.skipped["1"]

    def test_no_block(self):
        with pytest.raises(ValueError, match="has no non-local block"):
            analysis.AttentionProbe(torch.nn.Conv2d(1, 1, 1))
