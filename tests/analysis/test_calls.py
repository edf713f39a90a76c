"""Who called F.scaled_dot_product_attention, and that looking at it changes nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention  # by a name of its own

from dnl_ext import analysis
from dnl_ext.analysis import AttentionCall, AttentionCalls, NotMeasured


class Attend(nn.Module):
    def __init__(self, function=scaled_dot_product_attention, times=1):
        super().__init__()
        self.function, self.times = function, times

    def forward(self, x):
        for _ in range(self.times):
            x = self.function(x, x, x)
        return x


def names(model, x):
    seen = []
    with AttentionCalls(model, lambda name, call: seen.append(name)), torch.no_grad():
        model(x)
    return seen


TOKENS = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0))


class TestNames:
    def test_of_modules(self):
        model = nn.Sequential(nn.Sequential(Attend()), nn.Identity(), Attend(F.scaled_dot_product_attention))
        assert names(model, TOKENS) == ["0.0", "2"]
        assert names(Attend(), TOKENS) == [""]

    def test_of_further_calls_of_one_forward(self):
        assert names(nn.Sequential(Attend(times=3)), TOKENS) == ["0", "0#2", "0#3"]

    def test_of_a_module_that_runs_twice(self):
        shared = Attend()
        assert names(nn.Sequential(shared, shared), TOKENS) == ["0", "0"]
        report = analysis.measure_model(nn.Sequential(shared, shared), [TOKENS])
        assert len(report.layers["0"].heads[1].images) == 2

    def test_of_a_compiled_network(self):
        """It runs as it was written, since compiled code makes its calls elsewhere."""

        def backend(graph, inputs):
            raise AssertionError("compiled")

        assert names(torch.compile(nn.Sequential(Attend()), backend=backend), TOKENS) == ["_orig_mod.0"]

    def test_an_error_leaves_nothing_behind(self):
        class Fails(nn.Module):
            def forward(self, x):
                raise KeyError("mine")

        inner = nn.Sequential(Fails())

        class Catches(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = inner

            def forward(self, x):
                try:
                    return self.inner(x)
                except KeyError:
                    return F.scaled_dot_product_attention(x, x, x)

        assert names(Catches(), TOKENS) == [""]
        with pytest.raises(KeyError, match="mine"):
            names(inner, TOKENS)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in inner.modules())
        assert torch.backends.mha.get_fastpath_enabled()


class TestChangesNothing:
    @pytest.mark.parametrize("need_weights", [True, False])
    def test_multihead_attention(self, need_weights):
        attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)  # in training mode
        x = torch.randn(2, 5, 8)
        torch.manual_seed(3)
        expected, after = attention(x, x, x, need_weights=need_weights), torch.get_rng_state()
        calls = []
        torch.manual_seed(3)
        with AttentionCalls(attention, lambda name, call: calls.append(call)):
            found = attention(x, x, x, need_weights=need_weights)
        assert len(calls) == 1
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), after)  # nor does looking draw random numbers

    def test_function_is_itself_again(self):
        measured = nn.MultiheadAttention(8, 2)
        function = F.scaled_dot_product_attention
        analysis.measure_model(measured, [(torch.randn(5, 8),) * 3])
        assert F.scaled_dot_product_attention is function

    def test_gradients(self):
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        x = torch.randn(2, 5, 8)
        expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
        with AttentionCalls(layer, lambda name, call: None):
            found = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)

    def test_mode_of_the_network(self):
        model = nn.Sequential(Attend(), nn.Dropout())
        model[1].eval()
        analysis.measure_model(model, [TOKENS])
        assert model.training and torch.backends.mha.get_fastpath_enabled()


class TestFastPath:
    def test_is_off_while_looking(self):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        x = torch.randn(2, 5, 8)
        with torch.no_grad():
            expected = layer(x)
            with AttentionCalls(layer, lambda name, call: None):
                assert not torch.backends.mha.get_fastpath_enabled()
                torch.testing.assert_close(layer(x), expected)
        assert torch.backends.mha.get_fastpath_enabled()

    def test_stays_off_where_it_was(self):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            names(Attend(), TOKENS)
            assert not torch.backends.mha.get_fastpath_enabled()
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


class TestCalls:
    def test_what_cannot_be_measured(self):
        with pytest.raises(NotMeasured, match="fewer than two queries"):
            next(AttentionCall(TOKENS[:, :, :1], TOKENS, TOKENS).heads())
        with pytest.raises(NotMeasured, match="fewer than two keys"):
            next(AttentionCall(TOKENS, TOKENS[:, :, :1], TOKENS[:, :, :1]).heads())
        nested = torch.nested.nested_tensor([torch.randn(2, 3, 4), torch.randn(2, 5, 4)], layout=torch.jagged)
        with pytest.raises(NotMeasured, match="nested tensors"):
            next(AttentionCall(nested, nested, nested).heads())

    def test_heads_of_fewer_and_more_dimensions(self):
        def places(*lead):
            x = torch.randn(*lead, 3, 4)
            return [(image, head) for image, head, _ in AttentionCall(x, x, x).heads()]

        assert places() == [(0, 0)]
        assert places(2) == [(0, 0), (1, 0)]
        assert places(2, 2) == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert places(2, 2, 1) == [(0, 0), (1, 0), (2, 0), (3, 0)]

    def test_remarks(self):
        mask = torch.ones(5, 5, dtype=torch.bool)
        assert AttentionCall(TOKENS, TOKENS, TOKENS, mask, 0.1).remarks() == ["mask", "before dropout of 0.1"]
        assert AttentionCall(TOKENS, TOKENS, TOKENS, mask.float()).remarks() == ["additive mask"]
        assert AttentionCall(TOKENS, TOKENS, TOKENS, is_causal=True).remarks() == ["causal"]

    def test_a_bias_is_of_a_product(self):
        with pytest.raises(ValueError, match="expected None for the joint 'pairwise'"):
            analysis.Terms(TOKENS[0, 0], TOKENS[0, 0], TOKENS[0, 0], None, 1.0, True, key_bias=torch.zeros(5))
