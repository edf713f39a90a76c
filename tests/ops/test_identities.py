"""The identities of docs/numerics.md and csrc/ops, each as a property of the fused operators and of the reference."""

import pytest
import torch
from torch import nn

import dnl_ext
from dnl_ext import reference
from dnl_ext.modules import DisentangledNonLocal2d

LEAD, NQ, NK, DQK, DV = (2, 3), 37, 53, 19, 11

backends = pytest.mark.parametrize("ops", [dnl_ext, reference], ids=["fused", "reference"])
whitens = pytest.mark.parametrize("whiten", ["channel", None])
pytestmark = backends


def close(actual, expected, tolerance=1e-11):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def make(mean=2.0):
    """query, key, value, mask logits and a gradient of the output, float64, none of them with mean zero."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*LEAD, *shape, generator=generator, dtype=torch.float64) + mean

    return normal(NQ, DQK), normal(NK, DQK), normal(NK, DV), normal(NK), normal(NQ, DV)


def gradients(function, inputs, grad):
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves, grad)


class TestWhitening:
    @whitens
    def test_centring_the_keys_changes_nothing(self, ops, whiten):
        q, k, v, _, _ = make()
        centred = ops.pairwise_attention(q, ops.mean_subtract(k), v, whiten=whiten)
        close(centred, ops.pairwise_attention(q, k, v, whiten=whiten))

    @whitens
    def test_moving_all_keys_changes_nothing(self, ops, whiten):
        q, k, _, _, _ = make()
        moved = ops.pairwise_softmax(q, k + 7 * torch.randn(DQK, dtype=k.dtype), whiten=whiten)
        close(moved, ops.pairwise_softmax(q, k, whiten=whiten))

    def test_moving_all_queries_changes_only_the_standard_block(self, ops):
        q, k, v, _, _ = make()
        shift = torch.randn(DQK, dtype=q.dtype)
        close(ops.pairwise_attention(q + shift, k, v), ops.pairwise_attention(q, k, v))
        standard = ops.pairwise_attention(q, k, v, whiten=None)
        assert (ops.pairwise_attention(q + shift, k, v, whiten=None) - standard).abs().max() > 0.1

    def test_whitened_is_the_standard_block_of_centred_queries(self, ops):
        q, k, v, _, _ = make()
        close(ops.pairwise_attention(ops.mean_subtract(q), k, v, whiten=None), ops.pairwise_attention(q, k, v))

    def test_query_mean_is_a_bias_per_key(self, ops):
        q, k, v, _, _ = make()
        scale = 0.3
        logits = scale * (q @ k.mT - q.mean(-2, keepdim=True) @ k.mT)
        close(ops.pairwise_softmax(q, k, scale=scale), torch.softmax(logits, -1))
        close(ops.pairwise_attention(q, k, v, scale=scale), torch.softmax(logits, -1) @ v)

    def test_mean_subtract_is_a_symmetric_projection(self, ops):
        x, y, *_ = make()
        y = y[..., :NQ, :]
        once = ops.mean_subtract(x)
        close(ops.mean_subtract(once), once)
        close((once * y).sum(), (x * ops.mean_subtract(y)).sum(), 1e-10)
        close(once.mean(-2), torch.zeros_like(once.mean(-2)))
        (dx,) = gradients(ops.mean_subtract, (x,), y)
        close(dx, ops.mean_subtract(y))


class TestMaps:
    @whitens
    def test_rows_sum_to_one(self, ops, whiten):
        q, k, _, m, _ = make()
        p, u = ops.pairwise_softmax(q, k, whiten=whiten), ops.unary_softmax(m)
        assert p.min() >= 0 and u.min() >= 0
        close(p.sum(-1), torch.ones_like(p.sum(-1)))
        close(u.sum(-1), torch.ones_like(u.sum(-1)))

    def test_both_terms_of_equal_values_give_them_twice(self, ops):
        """sum_j (P_ij + u_j) = 2: the paper adds two softmaxes, it does not average them."""
        q, k, v, m, _ = make()
        v = v[..., :1, :].expand_as(v)
        close(ops.disentangled_attention(q, k, v, m), 2 * v[..., :1, :].expand(*LEAD, NQ, DV))

    def test_scale_zero_is_the_mean_of_the_values(self, ops):
        q, k, v, _, _ = make()
        close(ops.pairwise_attention(q, k, v, scale=0.0), v.mean(-2, keepdim=True).expand(*LEAD, NQ, DV))

    def test_scale_defaults_to_one_over_the_root_of_the_width(self, ops):
        q, k, v, m, _ = make()
        close(ops.disentangled_attention(q, k, v, m), ops.disentangled_attention(q, k, v, m, scale=DQK**-0.5))

    def test_negating_scale_is_negating_queries(self, ops):
        q, k, v, _, _ = make()
        close(ops.pairwise_attention(q, k, v, scale=-0.4), ops.pairwise_attention(-q, k, v, scale=0.4))

    def test_order_of_keys_is_irrelevant_and_order_of_queries_is_kept(self, ops):
        q, k, v, m, _ = make()
        y = ops.disentangled_attention(q, k, v, m)
        keys, queries = torch.randperm(NK), torch.randperm(NQ)
        close(ops.disentangled_attention(q, k[..., keys, :], v[..., keys, :], m[..., keys]), y)
        close(ops.disentangled_attention(q[..., queries, :], k, v, m), y[..., queries, :])

    def test_output_is_linear_in_value(self, ops):
        q, k, v, m, _ = make()
        w = torch.randn_like(v)
        separate = 2 * ops.disentangled_attention(q, k, v, m) - 3 * ops.disentangled_attention(q, k, w, m)
        close(ops.disentangled_attention(q, k, 2 * v - 3 * w, m), separate)

    def test_pairwise_attention_applies_the_map(self, ops):
        q, k, v, m, _ = make()
        close(ops.pairwise_attention(q, k, v), ops.pairwise_softmax(q, k) @ v)
        close(ops.unary_attention(m, v), (ops.unary_softmax(m).unsqueeze(-2) @ v).squeeze(-2))


class TestUnaryTerm:
    def test_is_added_to_every_query(self, ops):
        q, k, v, m, _ = make()
        unary = ops.unary_attention(m, v).unsqueeze(-2)
        close(ops.disentangled_attention(q, k, v, m), ops.pairwise_attention(q, k, v) + unary)

    def test_is_left_out_without_mask_logits(self, ops):
        q, k, v, _, _ = make()
        close(ops.disentangled_attention(q, k, v), ops.pairwise_attention(q, k, v))

    def test_moving_all_mask_logits_changes_nothing(self, ops):
        _, _, v, m, _ = make()
        close(ops.unary_attention(m + 5, v), ops.unary_attention(m, v))
        close(ops.unary_softmax(m - 5), ops.unary_softmax(m))

    def test_gradients_are_rank_one(self, ops):
        """dv_j += u_j G and dm_j = u_j (<G, v_j> - <G, pooled>), with G = sum_i dy_i."""
        q, k, v, m, dy = make()
        _, _, dv, dm = gradients(ops.disentangled_attention, (q, k, v, m), dy)
        _, _, dv_pairwise = gradients(ops.pairwise_attention, (q, k, v), dy)
        u, total = torch.softmax(m, -1), dy.sum(-2)
        pooled = (u.unsqueeze(-2) @ v).squeeze(-2)
        close(dv - dv_pairwise, u.unsqueeze(-1) * total.unsqueeze(-2), 1e-10)
        along = (v @ total.unsqueeze(-1)).squeeze(-1)
        close(dm, u * (along - (total * pooled).sum(-1, keepdim=True)), 1e-9)

    def test_pooling_alone_has_the_same_gradients(self, ops):
        _, _, v, m, dy = make()
        dy = dy[..., 0, :]
        dm, dv = gradients(ops.unary_attention, (m, v), dy)
        u = torch.softmax(m, -1)
        along = (v @ dy.unsqueeze(-1)).squeeze(-1)
        close(dv, u.unsqueeze(-1) * dy.unsqueeze(-2))
        close(dm, u * (along - (u * along).sum(-1, keepdim=True)))

    def test_mask_gradient_sums_to_zero(self, ops):
        q, k, v, m, dy = make()
        dm = gradients(ops.disentangled_attention, (q, k, v, m), dy)[3]
        close(dm.sum(-1), torch.zeros_like(dm.sum(-1)), 1e-9)
        (dm,) = gradients(ops.unary_softmax, (m,), torch.randn_like(m))
        close(dm.sum(-1), torch.zeros_like(dm.sum(-1)))

    def test_reaches_neither_query_nor_key(self, ops):
        q, k, v, m, dy = make()
        dq, dk, _, _ = gradients(ops.disentangled_attention, (q, k, v, m), dy)
        dq_alone, dk_alone, _ = gradients(ops.pairwise_attention, (q, k, v), dy)
        close(dq, dq_alone)
        close(dk, dk_alone)


class TestPairwiseGradients:
    @whitens
    @pytest.mark.parametrize("mean", [0.0, 3.0])
    def test_key_gradient_sums_to_zero_over_keys(self, ops, whiten, mean):
        q, k, v, m, dy = make(mean)
        dk = gradients(lambda *x: ops.disentangled_attention(*x, scale=0.1, whiten=whiten), (q, k, v, m), dy)[1]
        assert dk.abs().max() > 1e-3
        close(dk.sum(-2), torch.zeros_like(dk.sum(-2)), 1e-10)

    def test_query_gradient_has_mean_zero_only_when_whitened(self, ops):
        q, k, v, m, dy = make()
        dq = gradients(lambda *x: ops.disentangled_attention(*x, scale=0.1), (q, k, v, m), dy)[0]
        assert dq.abs().max() > 1e-3
        close(dq.mean(-2), torch.zeros_like(dq.mean(-2)))
        dq = gradients(lambda *x: ops.disentangled_attention(*x, scale=0.1, whiten=None), (q, k, v, m), dy)[0]
        assert dq.mean(-2).abs().max() > 1e-3

    @whitens
    def test_moving_all_keys_changes_no_gradient(self, ops, whiten):
        """Rows of dS sum to zero, so what multiplies them from the key side may be centred or not."""
        q, k, v, _, dy = make()

        def attention(q, k, v):
            return ops.pairwise_attention(q, k, v, scale=0.2, whiten=whiten)

        moved = gradients(attention, (q, k + 4, v), dy)
        for actual, expected in zip(moved, gradients(attention, (q, k, v), dy), strict=True):
            close(actual, expected, 1e-10)

    def test_delta_is_the_product_of_output_and_its_gradient(self, ops):
        """sum_j P_ij <dy_i, v_j> = <dy_i, y_i>, whichever way dS = P (dP - Delta) has it."""
        q, k, v, _, dy = make()
        p = ops.pairwise_softmax(q, k)
        delta = (p * (dy @ v.mT)).sum(-1)
        close(delta, (dy * ops.pairwise_attention(q, k, v)).sum(-1), 1e-10)
        ds = p * (dy @ v.mT - delta.unsqueeze(-1))
        close(ds.sum(-1), torch.zeros_like(ds.sum(-1)), 1e-10)
        scale = DQK**-0.5
        dq, dk, dv = gradients(ops.pairwise_attention, (q, k, v), dy)
        expected = scale * (ds @ (k - k.mean(-2, keepdim=True)))
        close(dq, expected - expected.mean(-2, keepdim=True), 1e-10)
        close(dk, scale * (ds.mT @ (q - q.mean(-2, keepdim=True))), 1e-10)
        close(dv, p.mT @ dy, 1e-10)

    def test_value_gradient_sums_to_twice_that_of_the_output(self, ops):
        q, k, v, m, dy = make()
        dv = gradients(ops.disentangled_attention, (q, k, v, m), dy)[2]
        close(dv.sum(-2), 2 * dy.sum(-2), 1e-10)

    @whitens
    def test_equal_values_leave_nothing_for_query_key_and_mask(self, ops, whiten):
        q, k, v, m, dy = make()
        v = v[..., :1, :].expand_as(v)
        dq, dk, _, dm = gradients(lambda *x: ops.disentangled_attention(*x, whiten=whiten), (q, k, v, m), dy)
        for grad in (dq, dk, dm):
            close(grad, torch.zeros_like(grad))

    def test_one_key_is_a_copy_of_its_value(self, ops):
        q, k, v, m, dy = make()
        k, v, m = k[..., :1, :], v[..., :1, :], m[..., :1]
        close(ops.disentangled_attention(q, k, v, m), 2 * v.expand(*LEAD, NQ, DV))
        dq, dk, dv, dm = gradients(ops.disentangled_attention, (q, k, v, m), dy)
        for grad in (dq, dk, dm):
            close(grad, torch.zeros_like(grad))
        close(dv, 2 * dy.sum(-2, keepdim=True), 1e-10)


class TestConvolutionBiases:
    """theta, phi and the mask's convolution get exactly zero gradient for their bias: the operator cannot see it."""

    def make(self, ops, whiten="channel"):
        x = torch.randn(2, 6, 23, dtype=torch.float64) + 1
        convs = {
            name: nn.Conv1d(6, width, 1, dtype=torch.float64)
            for name, width in (("theta", 5), ("phi", 5), ("g", 4), ("mask", 1))
        }
        theta, phi, g, mask = (conv(x) for conv in convs.values())
        attended = ops.disentangled_attention(theta.mT, phi.mT, g.mT, mask.squeeze(1), scale=0.8, whiten=whiten)
        (attended**2).sum().backward()
        return {name: (conv.bias.grad, conv.weight.grad) for name, conv in convs.items()}

    def test_are_zero_where_the_softmax_or_the_mean_takes_them(self, ops):
        grads = self.make(ops)
        for name in ("theta", "phi", "mask"):
            bias, weight = grads[name]
            assert weight.abs().max() > 1e-3, name
            close(bias, torch.zeros_like(bias), 1e-10)
        assert grads["g"][0].abs().max() > 1e-3

    def test_theta_has_one_in_the_standard_block(self, ops):
        grads = self.make(ops, whiten=None)
        assert grads["theta"][0].abs().max() > 1e-3
        close(grads["phi"][0], torch.zeros_like(grads["phi"][0]), 1e-10)

    def test_the_module_has_none_either(self, ops):
        backend = "fused" if ops is dnl_ext else "reference"
        block = DisentangledNonLocal2d.mmseg(8, reduction=2, backend=backend).double()
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.5)
        x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
        (block(x) ** 2).sum().backward()
        biases = {name: p.grad for name, p in block.named_parameters() if name.endswith("bias")}
        silent = [grad for name, grad in biases.items() if any(part in name for part in ("theta", "phi", "mask"))]
        assert len(silent) == 3, list(biases)
        size = max(grad.abs().max() for grad in biases.values())
        for grad in silent:
            assert grad.abs().max() < 1e-11 * size
