"""Empty batches, no queries, no channels: empty results, and zeros for what others would have contributed to."""

import inputs
import pytest
import torch

import dnl_ext
from dnl_ext import reference

B, NQ, NK, DQK, DV = 2, 5, 7, 3, 4


def attention_inputs(dtype=torch.float32):
    """query, key, value, mask_logits."""
    return inputs.make("disentangled_attention", (B,), NQ, NK, DQK, DV, dtype)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3), (0, 0, 2)])
@pytest.mark.parametrize("ops", [dnl_ext, reference], ids=["fused", "reference"])
def test_empty_batches(ops, shape):
    q = torch.randn(*shape, NQ, DQK, requires_grad=True)
    k = torch.randn(*shape, NK, DQK, requires_grad=True)
    v = torch.randn(*shape, NK, DV, requires_grad=True)
    m = torch.randn(*shape, NK, requires_grad=True)
    outputs = {
        ops.disentangled_attention(q, k, v, m): (*shape, NQ, DV),
        ops.pairwise_attention(q, k, v): (*shape, NQ, DV),
        ops.unary_attention(m, v): (*shape, DV),
        ops.mean_subtract(q): (*shape, NQ, DQK),
        ops.pairwise_softmax(q, k): (*shape, NQ, NK),
        ops.unary_softmax(m): (*shape, NK),
    }
    leaves = (q, k, v, m)
    for output, expected in outputs.items():
        assert output.shape == expected
        grads = torch.autograd.grad(output.sum(), leaves, allow_unused=True)
        assert any(grad is not None for grad in grads)
        assert all(grad.shape == x.shape for grad, x in zip(grads, leaves, strict=True) if grad is not None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("whiten", ["channel", None])
def test_no_queries(dtype, whiten):
    query, *others = attention_inputs(dtype)
    query = query[:, :0]
    leaves = [x.clone().requires_grad_() for x in (query, *others)]
    output = dnl_ext.disentangled_attention(*leaves, whiten=whiten)
    assert output.shape == (B, 0, DV)
    dq, *grads = torch.autograd.grad(output.sum(), leaves)
    assert dq.shape == (B, 0, DQK)
    for grad, leaf in zip(grads, leaves[1:], strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))
    assert dnl_ext.pairwise_softmax(query, others[0], whiten=whiten).shape == (B, 0, NK)


def test_no_value_channels():
    query, key, value, mask_logits = attention_inputs()
    value = value[..., :0]
    leaves = [x.clone().requires_grad_() for x in (query, key, value, mask_logits)]
    output = dnl_ext.disentangled_attention(*leaves)
    assert output.shape == (B, NQ, 0)
    for grad, leaf in zip(torch.autograd.grad(output.sum(), leaves), leaves, strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))
    assert dnl_ext.unary_attention(mask_logits, value).shape == (B, 0)


def test_mean_of_no_positions():
    x = torch.zeros(2, 0, 3, requires_grad=True)
    y = dnl_ext.mean_subtract(x)
    assert y.shape == (2, 0, 3)
    assert torch.autograd.grad(y.sum(), x)[0].shape == (2, 0, 3)
    assert dnl_ext.mean_subtract(torch.zeros(0), 0).shape == (0,)


@pytest.mark.parametrize("shape", [(), (0,), (2,)])
def test_no_keys_is_a_value_error(shape):
    q, k, v, m = (torch.zeros(*shape, *s) for s in ((NQ, DQK), (0, DQK), (0, DV), (0,)))
    for function, arguments in (
        (dnl_ext.disentangled_attention, (q, k, v, m)),
        (dnl_ext.pairwise_attention, (q, k, v)),
        (dnl_ext.pairwise_softmax, (q, k)),
        (dnl_ext.unary_attention, (m, v)),
        (dnl_ext.unary_softmax, (m,)),
    ):
        with pytest.raises(ValueError, match="expected at least one"):
            function(*arguments)
