"""DisentangledNonLocal1d / 2d / 3d against the transcriptions of the blocks they reproduce."""

import functools

import pytest
import torch
from blocks import (
    BLOCKS,
    assert_loads_both_ways,
    assert_not_flat,
    assert_same,
    backends,
    dimensions,
    make_input,
    scramble,
)
from torch import nn
from transcriptions import MmsegBlock, OfficialBlock

from dnl_ext.modules import DisentangledNonLocal2d


class TestMmseg:
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("norm", [True, False])
    @pytest.mark.parametrize("sub_sample", [False, True])
    @pytest.mark.parametrize("use_scale, temperature", [(True, 0.05), (False, 0.2), (True, 1.0 / 3)])
    @backends
    def test_equals_original(self, backend, use_scale, temperature, sub_sample, norm, memory_format):
        original = MmsegBlock(8, 2, use_scale, temperature, sub_sample, norm).double()
        ours = DisentangledNonLocal2d.mmseg(
            8, 2, use_scale, temperature, sub_sample, "batch" if norm else None, backend=backend
        ).double()
        scramble(original)
        assert_loads_both_ways(ours, original)
        assert_same(ours, original, make_input(2, memory_format=memory_format))
        if temperature == 0.05:
            assert_not_flat(original)

    @pytest.mark.parametrize("sub_sample", [False, True])
    @pytest.mark.parametrize("dims", [1, 3])
    @backends
    def test_other_dimensions(self, backend, dims, sub_sample):
        original = scramble(MmsegBlock(6, 3, sub_sample=sub_sample, dims=dims).double())
        ours = BLOCKS[dims].mmseg(6, 3, sub_sample=sub_sample, backend=backend).double()
        assert_loads_both_ways(ours, original)
        assert_same(ours, original, make_input(dims, 6))

    @backends
    def test_eval_mode(self, backend):
        original = scramble(MmsegBlock(8).double()).eval()
        ours = DisentangledNonLocal2d.mmseg(8, backend=backend).double().eval()
        ours.load_state_dict(original.state_dict())
        assert_same(ours, original, make_input(2))

    def test_key_names(self):
        convs = {f"{name}.conv.{kind}" for name in ("theta", "phi", "g") for kind in ("weight", "bias")}
        rest = {"conv_out.conv.weight", "conv_mask.weight", "conv_mask.bias"}
        bn = {f"conv_out.bn.{k}" for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
        assert set(DisentangledNonLocal2d.mmseg(8).state_dict()) == convs | rest | bn
        keys = set(DisentangledNonLocal2d.mmseg(8, sub_sample=True).state_dict())
        assert {"g.0.conv.weight", "g.0.conv.bias", "phi.0.conv.weight", "theta.conv.weight"} <= keys
        assert "conv_out.gn.weight" in DisentangledNonLocal2d.mmseg(8, norm=lambda c: nn.GroupNorm(2, c)).state_dict()
        assert "conv_out.bn.weight" in DisentangledNonLocal2d.mmseg(8, norm=nn.SyncBatchNorm).state_dict()

    def test_initialisation(self):
        block = DisentangledNonLocal2d.mmseg(64)
        assert torch.equal(block.conv_out.bn.weight, torch.zeros(64))
        assert block.conv_out.conv.weight.std() > 0.1 and 0.005 < block.theta.conv.weight.std() < 0.02
        assert not block.g.conv.bias.any()
        without_norm = DisentangledNonLocal2d.mmseg(64, norm=None).conv_out.conv
        assert not without_norm.weight.any() and not without_norm.bias.any()


class TestOfficial:
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("with_gc", [True, False])
    @pytest.mark.parametrize("use_out, out_bn", [(False, False), (True, False), (True, True), (False, True)])
    @pytest.mark.parametrize("downsample", [False, True])
    @pytest.mark.parametrize("whiten_type", ["channel", None])
    @backends
    def test_equals_original(self, backend, whiten_type, downsample, use_out, out_bn, with_gc, memory_format):
        original = OfficialBlock(8, 4, downsample, use_out, out_bn, whiten_type, 0.05, with_gc).double()
        ours = DisentangledNonLocal2d.official(
            8, 4, 0.05, downsample, use_out, out_bn, whiten_type, with_gc, backend=backend
        ).double()
        scramble(original)
        assert_loads_both_ways(ours, original)
        assert_same(ours, original, make_input(2, memory_format=memory_format))
        assert_not_flat(original)

    @pytest.mark.parametrize("downsample, use_out, out_bn", [(False, False, False), (True, True, True)])
    @pytest.mark.parametrize("dims", [1, 3])
    @backends
    def test_other_dimensions(self, backend, dims, downsample, use_out, out_bn):
        original = scramble(OfficialBlock(8, 2, downsample, use_out, out_bn, dims=dims).double())
        ours = BLOCKS[dims].official(8, 2, 0.05, downsample, use_out, out_bn, backend=backend).double()
        assert_loads_both_ways(ours, original)
        assert_same(ours, original, make_input(dims))

    @backends
    def test_without_scale(self, backend):
        original = scramble(OfficialBlock(8, 4, temperature=0.5).double())
        ours = DisentangledNonLocal2d.official(8, 4, 1.0, use_scale=False, backend=backend).double()
        ours.load_state_dict(original.state_dict())
        assert_same(ours, original, make_input(2))  # sqrt(4) * 0.5 == 1.0

    def test_key_names(self):
        base = {"gamma", "conv_value.weight"}
        base |= {f"conv_{name}.{kind}" for name in ("query", "key", "mask") for kind in ("weight", "bias")}
        assert set(DisentangledNonLocal2d.official(8).state_dict()) == base
        keys = set(DisentangledNonLocal2d.official(8, use_out=True, out_bn=True, with_gc=False).state_dict())
        assert {"conv_value.bias", "conv_out.weight", "out_bn.weight"} <= keys
        assert not {"conv_out.bias", "conv_mask.weight"} & keys

    @pytest.mark.parametrize(
        "name, whiten", [("in_nostd", "channel"), (["channel"], "channel"), (("in_nostd",), "channel"), ([], None)]
    )
    def test_whiten_names(self, name, whiten):
        assert DisentangledNonLocal2d.official(8, whiten_type=name).whiten == whiten

    @pytest.mark.parametrize("name", ["ln-like", "nln", ["channel", "bn"], "", 1])
    def test_unknown_whiten_names_raise(self, name):
        with pytest.raises(ValueError, match="whiten_type: expected one of 'channel'"):
            DisentangledNonLocal2d.official(8, whiten_type=name)

    def test_initialisation(self):
        block = DisentangledNonLocal2d.official(64, use_out=True, out_bn=True)
        assert torch.equal(block.gamma, torch.zeros(1)) and torch.equal(block.out_bn.weight, torch.ones(64))
        for conv in (block.conv_query, block.conv_key, block.conv_value, block.conv_mask, block.conv_out):
            assert 0.005 < conv.weight.std() < 0.02
            assert conv.bias is None or not conv.bias.any()


class TestPlain:
    def test_key_names(self):
        keys = set(DisentangledNonLocal2d(8, learn_gamma=True, norm=None).state_dict())
        layers = {f"conv_{n}.{kind}" for n in ("query", "key", "value", "mask", "out") for kind in ("weight", "bias")}
        assert keys == layers | {"gamma"}
        assert "norm.running_mean" in DisentangledNonLocal2d(8).state_dict()

    @pytest.mark.parametrize("learn_gamma", [False, True])
    @pytest.mark.parametrize("sub_sample", [None, "before", "after"])
    @pytest.mark.parametrize("unary", [True, False])
    @dimensions
    def test_fused_equals_reference(self, dims, unary, sub_sample, learn_gamma):
        options = {"sub_sample": sub_sample, "unary": unary, "learn_gamma": learn_gamma}
        reference = scramble(BLOCKS[dims](6, 2, 5, backend="reference", **options).double())
        fused = BLOCKS[dims](6, 2, 5, backend="fused", **options).double()
        fused.load_state_dict(reference.state_dict())
        assert_same(fused, reference, make_input(dims, 6))

    @backends
    def test_gamma_multiplies_the_pairwise_term_only(self, backend):
        x = make_input(2, 4)
        block = scramble(
            DisentangledNonLocal2d(4, use_out=False, norm=None, learn_gamma=True, backend=backend).double()
        )
        block.gamma.data.fill_(0)
        unary = block(x) - x
        torch.testing.assert_close(unary, unary.mean((2, 3), keepdim=True).expand_as(unary))
        block.gamma.data.fill_(1)
        constant = DisentangledNonLocal2d(4, use_out=False, norm=None, backend=backend).double()
        constant.load_state_dict({name: t for name, t in block.state_dict().items() if name != "gamma"})
        torch.testing.assert_close(block(x), constant(x), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"norm": None},
            {"norm": functools.partial(nn.GroupNorm, 2)},
            {"norm": None, "out_bias": False, "learn_gamma": True},
            {"norm": None, "unary": False, "learn_gamma": True},
            {"norm": None, "unary": False, "learn_gamma": True, "use_out": False},
            {"use_out": False},
            {"style": "mmseg"},
            {"style": "mmseg", "norm": None},
            {"style": "official", "unary": False, "learn_gamma": True},
        ],
    )
    @backends
    def test_identity_at_init(self, backend, options):
        x = make_input(2, dtype=torch.float32)
        block = DisentangledNonLocal2d(8, backend=backend, **options)
        y = block(x)
        assert torch.equal(y, x)
        y.square().sum().backward()
        # The start is not a dead point: some parameter that feeds the output learns.
        assert any(p.grad.any() for name, p in block.named_parameters() if name.endswith("weight") or name == "gamma")

    def test_bias_switches(self):
        off = DisentangledNonLocal2d(8, qk_bias=False, value_bias=False, mask_bias=False, out_bias=False, norm=None)
        assert not [name for name in off.state_dict() if name.endswith("bias")]
        assert "conv_out.bias" not in DisentangledNonLocal2d(8).state_dict()
        assert "conv_out.bias" in DisentangledNonLocal2d(8, out_bias=True).state_dict()

    def test_default_widths(self):
        block = DisentangledNonLocal2d(8)
        assert (block.inter_channels, block.value_channels) == (4, 4)
        assert DisentangledNonLocal2d(8, use_out=False).value_channels == 8
        assert DisentangledNonLocal2d(1).inter_channels == 1

    def test_repr(self):
        text = repr(DisentangledNonLocal2d(8, 2, sub_sample="after"))
        for part in ("8, inter_channels=2, value_channels=2", "temperature=0.05", "sub_sample='after'", "conv_query"):
            assert part in text


class TestGradients:
    @pytest.mark.parametrize("learn_gamma, sub_sample", [(False, None), (True, "before")])
    @dimensions
    @backends
    def test_gradcheck(self, backend, dims, learn_gamma, sub_sample):
        block = BLOCKS[dims](3, 2, 2, norm=None, learn_gamma=learn_gamma, sub_sample=sub_sample, backend=backend)
        scramble(block.double())
        names, parameters = zip(*block.named_parameters(), strict=True)
        x = make_input(dims, 3, 1, spatial={1: (5,), 2: (2, 3), 3: (2, 2, 2)}[dims])

        def call(x, *values):
            return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))

        assert torch.autograd.gradcheck(call, (x, *parameters))

    @backends
    def test_gradgradcheck(self, backend):
        x = make_input(2, 3, 1, spatial=(2, 2))
        block = scramble(DisentangledNonLocal2d(3, 2, norm=None, backend=backend).double())
        assert torch.autograd.gradgradcheck(block, (x,))

    @backends
    def test_frozen_parameters(self, backend):
        block = scramble(DisentangledNonLocal2d(8, backend=backend).double())
        block.requires_grad_(False)
        block.conv_key.weight.requires_grad_(True)
        block(make_input(2).detach()).sum().backward()
        assert block.conv_key.weight.grad is not None and block.conv_query.weight.grad is None
