"""NonLocal1d / 2d / 3d against mmcv's blocks written out, and the attention without softmax that they use."""

import copy
import io
import itertools

import pytest
import torch
from blocks import BLOCKS as DISENTANGLED
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
from transcriptions import MmcvBlock

import dnl_ext
from dnl_ext import NonLocal1d, NonLocal2d, NonLocal3d, reference
from dnl_ext.modules._block import MODES

BLOCKS = {1: NonLocal1d, 2: NonLocal2d, 3: NonLocal3d}
modes = pytest.mark.parametrize("mode", MODES)


class TestBlocks:
    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("norm", [False, True])
    @pytest.mark.parametrize("sub_sample", [False, True, "before"])
    @modes
    @dimensions
    @backends
    def test_equals_original(self, backend, dims, mode, sub_sample, norm, channels_last):
        before = sub_sample == "before"
        original = MmcvBlock(6, 3, True, sub_sample is True, norm, dims, mode, before).double()
        norm_cfg = {"type": "BN"} if norm else None
        ours = BLOCKS[dims](6, sub_sample, reduction=3, norm_cfg=norm_cfg, mode=mode, backend=backend).double()
        scramble(original)
        assert_loads_both_ways(ours, original)
        memory_format = CHANNELS_LAST.get(dims) if channels_last else None
        assert_same(ours, original, make_input(dims, 6, memory_format=memory_format))

    def test_without_scale(self):
        original = scramble(MmcvBlock(8, use_scale=False).double())
        ours = NonLocal2d(8, use_scale=False).double()
        ours.load_state_dict(original.state_dict())
        assert_same(ours, original, make_input(2))

    def test_key_names(self):
        g = ["g.conv.weight", "g.conv.bias", "conv_out.conv.weight", "conv_out.conv.bias"]
        both = [f"{layer}.conv.{kind}" for layer in ("theta", "phi") for kind in ("weight", "bias")]
        assert list(NonLocal2d(8).state_dict()) == g + both
        assert list(NonLocal2d(8, mode="gaussian").state_dict()) == g
        assert list(NonLocal3d(8, mode="concatenation").state_dict()) == [*g, *both, "concat_project.conv.weight"]
        assert NonLocal3d(8, mode="concatenation").concat_project.conv.weight.shape == (1, 8, 1, 1)
        assert {"g.0.conv.weight", "phi.0.conv.bias"} <= set(NonLocal2d(8, sub_sample=True).state_dict())
        assert "phi.0.conv.bias" not in NonLocal2d(8, sub_sample=True, mode="gaussian").state_dict()
        for kind, key in (("SyncBN", "bn"), ("GN", "gn"), ("IN2d", None)):
            cfg = {"type": kind, **({"num_groups": 2} if kind == "GN" else {})}
            keys = set(NonLocal2d(8, norm_cfg=cfg).state_dict())
            assert (f"conv_out.{key}.weight" in keys) == (key is not None) and "conv_out.conv.bias" not in keys

    @modes
    def test_identity_at_init_that_learns(self, mode):
        for norm_cfg in (None, {"type": "BN"}):
            x, block = make_input(2, dtype=torch.float32), NonLocal2d(8, mode=mode, norm_cfg=norm_cfg)
            y = block(x)
            assert torch.equal(y, x)
            y.square().sum().backward()
            assert any(p.grad.any() for p in block.conv_out.parameters())

    def test_initialisation(self):
        block = NonLocal2d(64, std=0.2, zeros_init=False)
        for conv in (block.g.conv, block.theta.conv, block.phi.conv, block.conv_out.conv):
            assert 0.15 < conv.weight.std() < 0.25 and not conv.bias.any()
        normal = NonLocal2d(64, zeros_init=False, norm_cfg={"type": "BN"}).conv_out.bn.weight
        assert 0.005 < normal.std() < 0.02
        assert not any(
            p.requires_grad
            for p in NonLocal2d(8, norm_cfg={"type": "BN", "requires_grad": False}).conv_out.bn.parameters()
        )
        assert NonLocal2d(8, norm_cfg={"type": "BN", "eps": 0.1}).conv_out.bn.eps == 0.1
        assert NonLocal2d(1).inter_channels == 1

    @modes
    @dimensions
    @pytest.mark.parametrize("style", ["mmcv", "mmseg"])
    def test_attributes_are_those_of_mmcv(self, style, dims, mode):
        """What a mode does not have is no attribute, and the layers of key and value pool: mmcv's tests look there."""
        make = BLOCKS[dims] if style == "mmcv" else DISENTANGLED[dims].mmseg
        block = make(8, mode=mode)
        absent = {"theta", "phi"} if mode == "gaussian" else set()
        absent |= set() if mode == "concatenation" else {"concat_project"}
        names = ("g", "theta", "phi", "concat_project", "conv_out")
        assert {name for name in names if not hasattr(block, name)} == absent
        pooled = make(8, mode=mode, sub_sample=True)
        window = {1: 2, 2: (2, 2), 3: (1, 2, 2)}[dims]
        assert len(pooled.g) == 2 and (mode == "gaussian" or len(pooled.phi) == 2)
        for pool in (pooled.g[1], pooled.phi if mode == "gaussian" else pooled.phi[1]):
            assert type(pool) is getattr(nn, f"MaxPool{dims}d") and pool.kernel_size == window

    @modes
    @dimensions
    @backends
    def test_empty_batch(self, backend, dims, mode):
        x, block = make_input(dims, batch=0, dtype=torch.float32), BLOCKS[dims](8, mode=mode, backend=backend)
        block(x).sum().backward()
        assert x.grad.shape == x.shape and all(not p.grad.any() for p in block.parameters())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @modes
    def test_half_precision(self, mode, dtype):
        exact = scramble(NonLocal2d(8, mode=mode).double())
        y, dx, grads = run(copy.deepcopy(exact).to(dtype), make_input(2).to(dtype))
        assert y.dtype == dx.dtype == dtype and all(g.isfinite().all() for g in (dx, *grads.values()))
        torch.testing.assert_close(y.double(), exact(make_input(2)), rtol=0.1, atol=0.1)

    @modes
    def test_compiles_copies_and_is_saved(self, mode):
        block, x = scramble(NonLocal2d(8, mode=mode).double()), make_input(2)
        copied = compiled(block)
        (y, dx, _), (y_compiled, dx_compiled, _) = run(block, x), run(copied, x)
        torch.testing.assert_close(y_compiled, y, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(dx_compiled, dx, rtol=1e-10, atol=1e-10)
        file = io.BytesIO()
        torch.save(block, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), block(x))
        assert f"mode={mode!r}" in repr(block)

    @pytest.mark.parametrize(
        "name, options",
        [
            ("in_channels", {"in_channels": 0}),
            ("reduction", {"reduction": 0}),
            ("mode", {"mode": "softmax"}),
            ("sub_sample", {"sub_sample": None}),
            ("sub_sample", {"sub_sample": "both"}),
            ("conv_cfg", {"conv_cfg": {"type": "DCN"}}),
            ("conv_cfg", {"conv_cfg": {"type": "Conv1d"}}),
            ("norm_cfg", {"norm_cfg": "BN"}),
            ("norm_cfg", {"norm_cfg": {"type": "BN1d"}}),
            ("norm_cfg", {"norm_cfg": {"type": "GN"}}),
            ("norm_cfg", {"norm_cfg": {"num_groups": 2}}),
            ("std", {"std": -1}),
            ("zeros_init", {"zeros_init": 0}),
            ("use_scale", {"use_scale": None}),
            ("backend", {"backend": "cuda"}),
        ],
    )
    def test_wrong_options(self, name, options):
        with pytest.raises(ValueError, match=f"^{name}: expected "):
            NonLocal2d(**{"in_channels": 8, **options})

    def test_accepted_conv_cfg(self):
        for dims, block in BLOCKS.items():
            block(8, conv_cfg={"type": f"Conv{dims}d"})


class TestConcatenation:
    @pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
    @pytest.mark.parametrize("nq, nk, dv", [(7, 9, 4), (1, 1, 1), (300, 211, 17)])
    def test_equals_the_map(self, lead, nq, nk, dv):
        leaves = [torch.randn(*lead, *shape, dtype=torch.float64) for shape in ((nq,), (nk,), (nk, dv))]
        results = []
        for function in (dnl_ext.concatenation_attention, reference.concatenation_attention):
            inputs = [x.clone().requires_grad_() for x in leaves]
            y = function(*inputs)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), inputs)))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)

    def test_gradcheck(self):
        torch.manual_seed(0)
        inputs = [torch.randn(2, *s, dtype=torch.float64, requires_grad=True) for s in ((5,), (6,), (6, 3))]
        assert torch.autograd.gradcheck(dnl_ext.concatenation_attention, inputs)
        assert torch.autograd.gradgradcheck(dnl_ext.concatenation_attention, inputs)

    def test_equal_logits_and_sums_of_zero(self):
        """Ties keep any order; a_i + b_j = 0 has no weight."""
        a, b = torch.tensor([0.0, 1.0, -1.0, 2.0]), torch.tensor([1.0, -1.0, 1.0, -2.0, 0.0])
        v = torch.randn(5, 3)
        expected = reference.concatenation_attention(a, b, v)
        torch.testing.assert_close(dnl_ext.concatenation_attention(a, b, v), expected)

    def test_large_logits_that_cancel(self):
        """a near 1e4 and b near -1e4: the weights are of size 1, and a running sum in float32 would lose them."""
        generator = torch.Generator().manual_seed(0)
        a, b = torch.randn(2, 500, generator=generator) + torch.tensor([[1e4], [-1e4]])
        v = torch.randn(500, 8, generator=generator)
        expected = reference.concatenation_attention(a.double(), b.double(), v.double())
        error = (dnl_ext.concatenation_attention(a, b, v) - expected).norm()
        assert error <= 2 * (reference.concatenation_attention(a, b, v) - expected).norm()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_error_is_within_twice_the_reference(self, dtype):
        generator = torch.Generator().manual_seed(0)
        for scale, mean in itertools.product((0.3, 1.0), (0.0, 3.0)):
            a, b, v = (scale * torch.randn(s, generator=generator) + mean for s in ((300,), (200,), (200, 16)))
            inputs = [x.to(dtype).requires_grad_() for x in (a, b, v)]
            wide = [x.detach().double().requires_grad_() for x in inputs]
            dy = torch.randn(300, 16, generator=generator).to(dtype)
            results = []
            for function, leaves in (
                (reference.concatenation_attention, wide),
                (dnl_ext.concatenation_attention, inputs),
                (reference.concatenation_attention, inputs),
            ):
                y = function(*leaves)
                results.append((y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))))
            for i, (truth, ours, theirs) in enumerate(zip(*results, strict=True)):
                assert (ours - truth).norm() <= (3 if i else 2) * (theirs - truth).norm()

    @pytest.mark.parametrize("nq, batch", [(0, 2), (4, 0)])
    def test_empty(self, nq, batch):
        y = dnl_ext.concatenation_attention(torch.randn(batch, nq), torch.randn(batch, 5), torch.randn(batch, 5, 3))
        assert y.shape == (batch, nq, 3)

    def test_wrong_calls(self):
        a, b, v = torch.randn(2, 4), torch.randn(2, 5), torch.randn(2, 5, 3)
        for name, arguments in (
            ("key_logits", (a, a, v)), ("query_logits", (a[0], b, v)), ("value", (a, b[:, :0], v[:, :0])),
            ("query_logits", (a.double(), b, v)),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=f"^{name}: expected "):
                dnl_ext.concatenation_attention(*arguments)


class TestDotProduct:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_equals_the_map(self, dtype):
        q, k, v = (torch.randn(2, n, c).to(dtype) for n, c in ((31, 5), (47, 5), (47, 9)))
        truth = reference.dot_product_attention(q.double(), k.double(), v.double())
        theirs = (reference.dot_product_attention(q, k, v) - truth).norm()
        assert (dnl_ext.dot_product_attention(q, k, v) - truth).norm() <= max(2 * theirs, 1e-14 * truth.norm())

    def test_gradients(self):
        inputs = [torch.randn(2, *s, dtype=torch.float64, requires_grad=True) for s in ((5, 3), (6, 3), (6, 2))]
        assert torch.autograd.gradcheck(dnl_ext.dot_product_attention, inputs)
        assert torch.autograd.gradgradcheck(dnl_ext.dot_product_attention, inputs)

    def test_float16_sums_do_not_overflow(self):
        x = torch.full((1, 40_000, 1), 40.0, dtype=torch.float16)
        assert (dnl_ext.dot_product_attention(x[:, :1], x, x) == 40.0**3).all()  # a sum of 6.4e7 in between

    @modes
    def test_no_map_is_built(self, mode):
        """Nothing of N x N in forward or backward: at N = 4,096 a map is 64 MiB."""

        def largest_allocation(backend):
            block, x = NonLocal2d(8, mode=mode, backend=backend), torch.randn(1, 8, 64, 64, requires_grad=True)
            with torch.profiler.profile(profile_memory=True) as profile:
                block(x).square().sum().backward()
            return max(event.cpu_memory_usage for event in profile.events())

        assert largest_allocation("fused") < 32 << 20 < 64 << 20 <= largest_allocation("reference")

    def test_shared_key_logits(self):
        q, k = torch.randn(2, 7, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
        expected = torch.einsum("bc,bjc->bj", q.mean(1), k)
        for function in (dnl_ext.shared_key_logits, reference.shared_key_logits):
            torch.testing.assert_close(function(q, k), expected)
        with pytest.raises(ValueError, match=r"^key: expected shape"):
            dnl_ext.shared_key_logits(q, k[..., 1:])


def test_spatial_sizes_are_checked():
    with pytest.raises(ValueError, match="spatial sizes of at least"):
        NonLocal3d(8, sub_sample=True)(torch.zeros(2, 8, 4, 1, 2))
