"""What raises or goes wrong in the blocks in use and works here: one test for each, named after it.

docs/modules.md lists them. That the results are right, not just there, is tested against transcriptions in
test_modules.py, test_variants.py, test_whitening.py and test_nonlocal.py; here is the case itself.
"""

import copy

import pytest
import torch
from blocks import BLOCKS, assert_same, dimensions, make_input, scramble
from transcriptions import MmcvBlock, OfficialBlock

import dnl_ext
from dnl_ext import DisentangledNonLocal2d, DisentangledNonLocal3d, NonLocal2d
from dnl_ext.modules._block import MODES

modes = pytest.mark.parametrize("mode", MODES)


def learns(block, x):
    """Every parameter gets a finite gradient, and some step down the gradient lowers the loss."""
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    optimizer, losses = torch.optim.SGD(block.parameters(), lr=0.02), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (block(x) - target).square().mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
        optimizer.step()
        losses.append(loss.item())
    return losses[-1] < losses[0]


def test_dnl_gaussian_leaves_its_input_alone_and_has_a_backward():
    """There the means are subtracted from the block's own input, in place."""
    block, x = scramble(DisentangledNonLocal2d.mmseg(8, mode="gaussian").double()), make_input(2)
    before = x.detach().clone()
    assert learns(block, x)
    assert torch.equal(x, before)


@modes
def test_dnl_with_sub_sample(mode):
    """There the mask keeps N logits for N / 4 values, and the product of the two raises."""
    block = scramble(DisentangledNonLocal2d.mmseg(8, sub_sample=True, mode=mode).double())
    assert learns(block, make_input(2))


@pytest.mark.parametrize("disentangled", [False, True])
def test_concatenation_can_be_trained(disentangled):
    """There the weights are divided in place behind a ReLU that its backward still needs."""
    if disentangled:
        block = DisentangledNonLocal2d.mmseg(8, mode="concatenation")
    else:
        block = NonLocal2d(8, mode="concatenation")
    block = scramble(block.double())
    before = block.concat_project.conv.weight.detach().clone()
    assert learns(block, make_input(2)) and not torch.equal(block.concat_project.conv.weight, before)


@modes
@pytest.mark.parametrize("make", [NonLocal2d, DisentangledNonLocal2d.mmseg])
def test_half_precision_of_large_features(make, mode):
    """There q.k overflows float16 before it is scaled: 256 channels of deviation 30 give products of 230,000."""
    torch.manual_seed(0)
    block = make(256, mode=mode, reduction=1)
    if mode != "gaussian":
        for layer in (block.theta, block.phi):
            torch.nn.init.eye_(layer.conv.weight.data.view(256, 256))
    if mode == "concatenation":
        torch.nn.init.constant_(block.concat_project.conv.weight, 0.01)
    torch.nn.init.normal_(block.g.conv.weight, std=1e-3)  # a dot product of such features is itself near 65504
    out, norm = block._out_and_norm()
    torch.nn.init.normal_(out.weight if norm is None else norm.weight, std=1e-3)  # else the output is the input
    x = torch.randn(1, 256, 8, 8) * 30
    logits = torch.einsum("bci,bcj->bij", x.flatten(2), x.flatten(2))
    assert logits.max() > torch.finfo(torch.float16).max
    expected = block(x)
    assert (expected - x).abs().max() > 1e-3
    for dtype in (torch.float16, torch.bfloat16):
        half, leaf = copy.deepcopy(block).to(dtype), x.to(dtype).requires_grad_()
        y = half(leaf)
        y.mean().backward()
        assert y.isfinite().all() and leaf.grad.isfinite().all()
        assert (y.float() - expected).norm() < 0.02 * expected.norm()


@modes
@dimensions
def test_empty_batch(dims, mode):
    """There a reshape to -1 of nothing raises."""
    for block in (BLOCKS[dims].mmseg(8, mode=mode), getattr(dnl_ext, f"NonLocal{dims}d")(8, mode=mode)):
        x = make_input(dims, batch=0, dtype=torch.float32)
        block(x).sum().backward()
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("terms", [{}, {"with_gc": False, "with_unary": True}])
@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions_with_the_unary_term(dims, terms):
    """There the unary vector has two trailing dimensions whatever the block's."""
    original = scramble(OfficialBlock(8, 4, dims=dims, **terms).double())
    block = BLOCKS[dims].official(8, 4, **terms).double()
    block.load_state_dict(original.state_dict())
    assert_same(block, original, make_input(dims))
    assert learns(block, make_input(dims))


def test_the_norm_of_three_dimensions_is_of_three():
    """There ``out_bn`` is a BatchNorm2d in every dimension."""
    block = DisentangledNonLocal3d.official(8, use_out=True, out_bn=True)
    assert block(make_input(3, dtype=torch.float32)).shape == (2, 8, 2, 4, 3)


@pytest.mark.parametrize("name", ["NLin", "gc", "channels"])
def test_unknown_whitening_raises(name):
    """There three shipped configurations name one that the code does not know, and nothing is whitened."""
    with pytest.raises(ValueError, match=r"^whiten_type: expected one of 'channel'"):
        DisentangledNonLocal2d.official(8, whiten_type=name)


def test_logits_are_divided_by_the_root_of_the_width():
    """An older detection toolbox multiplied by it: at 256 channels, logits 256 times as hot."""
    block, original = NonLocal2d(8).double(), scramble(MmcvBlock(8).double())
    block.load_state_dict(original.state_dict())
    assert block._scale() == 1 / 2.0 and original.divisor == 2.0
    assert_same(block, original, make_input(2))
