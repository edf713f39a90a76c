"""DisentangledNonLocal1d / 2d / 3d against the transcriptions of the blocks they reproduce."""

import copy
import functools
import io
import pickle

import pytest
import torch
from blocks import (
    BLOCKS,
    CHANNELS_LAST,
    assert_loads_both_ways,
    assert_not_flat,
    assert_same,
    backends,
    compiled,
    dimensions,
    make_input,
    run,
    scramble,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transcriptions import MmsegBlock, OfficialBlock

from dnl_ext.modules import DisentangledNonLocal2d, DisentangledNonLocal3d


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


class TestLayoutsAndDtypes:
    @pytest.mark.parametrize("sub_sample", [None, "before", "after"])
    @pytest.mark.parametrize("form", ["plain", "mmseg", "official"])
    @pytest.mark.parametrize("dims", [2, 3])
    @backends
    def test_memory_format_is_kept(self, backend, dims, form, sub_sample):
        if form == "mmseg":
            block = BLOCKS[dims].mmseg(8, sub_sample=sub_sample is not None, backend=backend)
        elif form == "official":
            block = BLOCKS[dims].official(8, downsample=sub_sample is not None, backend=backend)
        else:
            block = BLOCKS[dims](8, sub_sample=sub_sample, backend=backend)
        scramble(block)
        x = make_input(dims, dtype=torch.float32)
        y = block(x)
        assert y.is_contiguous()
        z = block(x.detach().to(memory_format=CHANNELS_LAST[dims]))
        assert z.is_contiguous(memory_format=CHANNELS_LAST[dims]) and not z.is_contiguous()
        torch.testing.assert_close(z, y, rtol=1e-4, atol=1e-4)

    @backends
    def test_strided_input(self, backend):
        block = scramble(DisentangledNonLocal2d(8, backend=backend).double()).eval()
        wide = make_input(2, 16, spatial=(10, 7)).detach()
        cut = wide[:, ::2, 1::2, :-1]
        torch.testing.assert_close(block(cut), block(cut.contiguous()), rtol=1e-12, atol=1e-12)

    @dimensions
    @pytest.mark.parametrize("sub_sample", [None, "before", "after"])
    @pytest.mark.parametrize("learn_gamma", [False, True])
    @backends
    def test_empty_batch(self, backend, learn_gamma, sub_sample, dims):
        block = scramble(BLOCKS[dims](4, sub_sample=sub_sample, learn_gamma=learn_gamma, backend=backend))
        statistics = block.norm.running_mean.clone(), block.norm.running_var.clone()
        x = make_input(dims, 4, 0, dtype=torch.float32)
        y = block(x)
        assert y.shape == x.shape
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert all(not p.grad.any() for p in block.parameters())  # zero, and there: DDP waits for each
        assert torch.equal(block.norm.running_mean, statistics[0])
        assert torch.equal(block.norm.running_var, statistics[1])

    @pytest.mark.parametrize("learn_gamma", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @backends
    def test_low_precision_module(self, backend, dtype, learn_gamma):
        exact = scramble(DisentangledNonLocal2d(8, learn_gamma=learn_gamma, backend="reference").double()).eval()
        x = make_input(2)
        expected, dx_expected, _ = run(exact, x)
        block = copy.deepcopy(exact).to(dtype)
        block.backend = backend
        y, dx, grads = run(block, x.to(dtype))
        assert y.dtype == dx.dtype == dtype and {grad.dtype for grad in grads.values()} == {dtype}
        # The logits of a temperature of 0.05 amplify the rounding of q and k some twentyfold.
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.5, torch.float16: 0.1}[dtype]
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
        relative = (dx.double() - dx_expected).norm() / dx_expected.norm()
        assert relative < tolerance

    @pytest.mark.parametrize("form", ["mmseg", "official"])
    @backends
    def test_autocast(self, backend, form):
        block = scramble(getattr(DisentangledNonLocal2d, form)(8, backend=backend))
        seen = []
        attend = block._attend
        block._attend = lambda *args: seen.extend([*args, attend(*args)]) or seen[-1]
        x = make_input(2, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = block(x)
        assert {tensor.dtype for tensor in seen} == {torch.bfloat16}
        assert y.dtype == torch.float32 and y.is_contiguous()
        y.square().sum().backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in block.parameters())


class _Sizes(TorchDispatchMode):
    """Records the names of copying operations and the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.largest, self.copies = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                if func.overloadpacket.__name__ in ("clone", "copy_", "_to_copy", "_reshape_copy"):
                    self.copies.append((func.overloadpacket.__name__, tuple(tensor.shape)))
        return result


class TestMemory:
    """What the block itself hands from operation to operation; an operator's workspace is its own tests' matter."""

    SIZE = 24  # N = 576 positions, N * N = 331,776; the largest tensor of a linear block is 2 * 8 * N = 9,216

    def record(self, block, memory_format):
        x = make_input(2, dtype=torch.float32, spatial=(self.SIZE, self.SIZE), memory_format=memory_format)
        grad = torch.ones_like(x)
        with _Sizes() as sizes:
            block(x).backward(grad)
        return sizes

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("form", ["mmseg", "official"])
    def test_fused_is_linear_and_copies_nothing(self, form, memory_format):
        block = scramble(getattr(DisentangledNonLocal2d, form)(8, backend="fused"))
        sizes = self.record(block, memory_format)
        assert sizes.largest <= 2 * 8 * self.SIZE**2
        assert not [copied for copied in sizes.copies if len(copied[1]) > 2]

    def test_reference_is_not(self):
        block = DisentangledNonLocal2d.mmseg(8, backend="reference")
        assert self.record(block, torch.contiguous_format).largest >= self.SIZE**4


class TestTools:
    @pytest.mark.parametrize("form", ["mmseg", "official"])
    @backends
    def test_compile(self, backend, form):
        block = scramble(getattr(DisentangledNonLocal2d, form)(8, backend=backend).double())
        copied = compiled(block)
        x = make_input(2)
        y, dx, grads = run(block, x)
        y_compiled, dx_compiled, grads_compiled = run(copied, x)
        torch.testing.assert_close(y_compiled, y, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(dx_compiled, dx, rtol=1e-10, atol=1e-10)
        for (name, grad), other in zip(grads.items(), grads_compiled.values(), strict=True):
            torch.testing.assert_close(other, grad, rtol=1e-10, atol=1e-10, msg=name)

    @pytest.mark.parametrize("form", ["mmseg", "official"])
    @backends
    def test_copies_and_pickles(self, backend, form):
        block = scramble(getattr(DisentangledNonLocal2d, form)(8, backend=backend).double()).eval()
        x = make_input(2)
        saved = io.BytesIO()
        torch.save(block, saved)
        saved.seek(0)
        for other in (
            copy.deepcopy(block),
            pickle.loads(pickle.dumps(block)),
            torch.load(saved, weights_only=False),
        ):
            assert torch.equal(other(x), block(x))

    @backends
    def test_in_a_network(self, backend):
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), DisentangledNonLocal2d.mmseg(8, backend=backend), nn.ReLU()
        )
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        x = make_input(2, 3, dtype=torch.float32, spatial=(8, 8)).detach()
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = network(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] and network[1].conv_out.bn.weight.any()


class TestErrors:
    @pytest.mark.parametrize(
        "name, options",
        [
            ("in_channels", {"in_channels": 0}),
            ("in_channels", {"in_channels": 8.0}),
            ("inter_channels", {"inter_channels": -1}),
            ("inter_channels", {"inter_channels": True}),
            ("value_channels", {"value_channels": 0}),
            ("value_channels", {"value_channels": 4, "use_out": False}),
            ("norm", {"norm": "layer"}),
            ("norm", {"norm": 1}),
            ("norm", {"norm": nn.BatchNorm2d(8)}),
            ("norm", {"norm": lambda channels: channels}),
            ("out_bias", {"out_bias": "yes"}),
            ("qk_bias", {"qk_bias": None}),
            ("unary", {"unary": 1}),
            ("learn_gamma", {"learn_gamma": 0.5}),
            ("temperature", {"temperature": 0}),
            ("temperature", {"temperature": float("nan")}),
            ("temperature", {"temperature": "0.05"}),
            ("sub_sample", {"sub_sample": True}),
            ("sub_sample", {"sub_sample": "both"}),
            ("whiten", {"whiten": "nln"}),
            ("whiten", {"whiten": False}),
            ("style", {"style": "mmcv"}),
            ("use_out", {"style": "mmseg", "use_out": False}),
            ("backend", {"backend": "cuda"}),
        ],
    )
    def test_options(self, name, options):
        with pytest.raises(ValueError, match=f"^{name}: expected "):
            DisentangledNonLocal2d(**{"in_channels": 8, **options})

    @pytest.mark.parametrize(
        "name, options",
        [
            ("in_channels", {"in_channels": None}),
            ("reduction", {"reduction": 0}),
            ("sub_sample", {"sub_sample": "after"}),
        ],
    )
    def test_mmseg_options(self, name, options):
        with pytest.raises(ValueError, match=f"^{name}: expected "):
            DisentangledNonLocal2d.mmseg(**{"in_channels": 8, **options})

    @pytest.mark.parametrize("name", ["downsample", "out_bn", "use_out"])
    def test_official_options(self, name):
        with pytest.raises(ValueError, match=f"^{name}: expected "):
            DisentangledNonLocal2d.official(8, **{name: "yes"})

    @dimensions
    def test_number_of_dimensions(self, dims):
        for wrong in {1, 2, 3} - {dims}:
            with pytest.raises(ValueError, match=rf"expected {dims + 2} dimensions .*, got shape \(2, 8"):
                BLOCKS[dims](8)(make_input(wrong))

    def test_channels(self):
        with pytest.raises(ValueError, match=r"expected 8 channels in dimension 1, got shape \(2, 4, 5, 6\)"):
            DisentangledNonLocal2d(8)(make_input(2, 4))

    def test_spatial_sizes(self):
        with pytest.raises(ValueError, match=r"spatial sizes of at least \(1, 1\), got shape \(2, 8, 0, 3\)"):
            DisentangledNonLocal2d(8)(torch.zeros(2, 8, 0, 3))
        for sub_sample in ("before", "after"):
            with pytest.raises(ValueError, match=r"spatial sizes of at least \(1, 2, 2\)"):
                DisentangledNonLocal3d(8, sub_sample=sub_sample)(torch.zeros(2, 8, 4, 1, 2))

    def test_not_a_tensor(self):
        with pytest.raises(TypeError, match=r"input: expected a torch\.Tensor, got list"):
            DisentangledNonLocal2d(8)([1.0])

    def test_strict_loading_names_what_is_missing(self):
        with pytest.raises(RuntimeError, match=r"Missing key.*gamma"):
            DisentangledNonLocal2d.official(8).load_state_dict(DisentangledNonLocal2d.mmseg(8).state_dict())
