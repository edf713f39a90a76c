"""What blocks are used with: layouts, dtypes and sizes, memory, tools of torch, and wrong calls."""

import copy
import io
import pickle

import pytest
import torch
from blocks import (
    BLOCKS,
    CHANNELS_LAST,
    backends,
    compiled,
    dimensions,
    make_input,
    run,
    scramble,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dnl_ext.modules import DisentangledNonLocal2d, DisentangledNonLocal3d


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

    @pytest.mark.parametrize(
        ("mode", "variant"),
        [(mode, "nl") for mode in ("embedded_gaussian", "gaussian", "dot_product", "concatenation")]
        + [("embedded_gaussian", variant) for variant in ("pairwise", "unary", "dnl", "dnl_shared_key")],
    )
    @pytest.mark.parametrize("form", ["plain", "mmseg"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @dimensions
    def test_autocast_and_pooled_keys(self, dims, dtype, form, mode, variant):
        """torch pools volumes in float32 under autocast, on a CPU."""
        if form == "mmseg" and dims == 2:
            block = BLOCKS[2].mmseg(8, sub_sample=True, mode=mode, variant=variant)
        elif form == "mmseg":
            block = BLOCKS[dims](8, sub_sample="after", style="mmseg", mode=mode, variant=variant)
        else:
            block = BLOCKS[dims](8, sub_sample="after", mode=mode, variant=variant)
        scramble(block)
        x = make_input(dims, dtype=torch.float32)
        with torch.autocast("cpu", dtype=dtype):
            y = block(x)
        y.square().sum().backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in block.parameters())

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
