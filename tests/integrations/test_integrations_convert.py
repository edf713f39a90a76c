"""dnl_ext.integrations.convert and restore, on transcriptions of the blocks that they know. Needs torch alone."""

import copy
import subprocess
import sys
from functools import partial

import originals
import pytest
import torch
from blocks import assert_same, make_input, scramble
from torch import nn

import dnl_ext
from dnl_ext.integrations import convert, restore

MODES = ("embedded_gaussian", "gaussian", "dot_product", "concatenation")
OFFICIAL = [
    {"whiten_type": [name]} for name in ("channel", "spatial", "ln_nostd", "bn", "bn_affine")
] + [
    {"whiten_type": []},
    {"whiten_type": ["in_nostd_tempered"]},  # a name that the code does not know whitens nothing
    {"temperature": 1.0, "downsample": True},
    {"with_gc": False},
    {"with_gc": False, "with_unary": True},
    {"use_out": True},
    {"use_out": True, "out_bn": True, "downsample": True},
]  # fmt: skip

CASES = [
    *[(name, {"mode": mode, "sub_sample": sub, "norm": norm})
      for name in ("NonLocal1d", "NonLocal2d", "NonLocal3d", "DisentangledNonLocal2d")
      for mode in MODES for sub, norm in ((False, True), (True, False))],
    ("NonLocal2d", {"use_scale": False, "reduction": 1}),
    ("NonLocal2D", {"use_scale": False}),
    ("NonLocal2D", {"mode": "dot_product"}),
    *[("ForkedNonLocal2D", {"fixbug": fixbug, "temp": 2.0, "downsample": down, "norm": down, "use_scale": scale})
      for fixbug, down, scale in ((False, False, True), (True, True, True), (False, True, False))],
    ("ForkedNonLocal2D", {"mode": "dot_product"}),
    ("DisentangledNonLocal2d", {"temperature": 0.1, "use_scale": False, "reduction": 4}),
    *[("NonLocal2d_bn", {"planes": 4, **options}) for options in OFFICIAL],
    ("NonLocal2d_bn", {"planes": 4, "dims": 3}),
    ("NonLocal2dGc", {}),
    ("NonLocal2dGc", {"ratio": 1 / 2, "temperature": 1.0, "with_gc": False}),
    *[("NonLocal2d_nowd", {"planes": 4, "whiten_type": [name]})
      for name in ("in_nostd", "in", "ln_nostd", "ln", "fln_nostd", "fln")],
    ("NonLocal2d_nowd", {"planes": 4, "nowd": ["gc"]}),
    ("NonLocal2d_nowd", {"planes": 4, "with_nl": False, "use_out": True}),
    ("Unary2d", {"planes": 4}),
    ("Unary2d", {"planes": 4, "use_out": True, "downsample": True}),
    ("ContextBlock", {}),
    ("ContextBlock", {"ratio": 1 / 2, "pooling_type": "avg", "fusion_types": ["channel_mul", "channel_add"]}),
    ("SimpleContextBlock", {}),
]  # fmt: skip


def build(name, **options):
    return scramble(getattr(originals, name)(8, **options).double())


def dims_of(block):
    return next(
        layer.weight.dim() - 2
        for layer in block.modules()
        if hasattr(layer, "kernel_size") and hasattr(layer, "weight")
    )


class Model(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.before, self.stage, self.after = nn.Conv2d(3, 8, 1), nn.Sequential(nn.ReLU(), block), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.after(self.stage(self.before(x)))


class TestEquals:
    @pytest.mark.parametrize("backend", ["fused", "reference"])
    @pytest.mark.parametrize("name, options", CASES)
    def test_outputs_gradients_and_state_dict(self, name, options, backend):
        """To 1e-10 in float64; the state dicts have the same keys in the same order and load strictly both ways."""
        original = build(name, **options)
        report = convert(copy.deepcopy(original), backend=backend)
        (change,), block = report.converted, report.model
        assert not report.skipped and type(block).__module__.startswith("dnl_ext.")
        assert change.source.endswith(type(original).__name__) and change.target.startswith(type(block).__name__)
        assert block.backend == backend
        x = make_input(dims_of(original), batch=3)
        assert_same(block, original, x)
        assert list(block.state_dict()) == list(original.state_dict())
        scramble(block, seed=9)
        original.load_state_dict(block.state_dict(), strict=True)
        assert_same(block, original, x)
        scramble(original, seed=10)
        block.load_state_dict(original.state_dict(), strict=True)
        assert_same(block, original, x)

    @pytest.mark.parametrize("name, options", CASES)
    def test_restore(self, name, options):
        """Back to the original class, with the weights as they are now."""
        original = build(name, **options)
        keep, kind, registered = copy.deepcopy(original), type(original), set(original._parameters)
        report = convert(original)
        scramble(report.model, seed=9)
        keep.load_state_dict(report.model.state_dict(), strict=True)
        restored = restore(report.model.eval(), report)
        assert not any(module.training for module in restored.modules())
        assert restored is original and type(restored) is kind and set(restored._parameters) == registered
        assert_same(restored, keep.eval(), make_input(dims_of(keep)))

    def test_restore_takes_the_layers_of_now(self):
        """A layer or a parameter that was exchanged after converting goes back too."""
        report = convert(build("NonLocal2d_bn", planes=4))
        block, new = report.model, nn.Conv2d(8, 4, 1).double()
        block.conv_query, block.gamma = new, nn.Parameter(torch.ones(1, dtype=torch.float64))
        expected = block(make_input(2))
        restored = restore(block, report)
        assert restored.conv_query is new and restored.gamma is block.gamma
        torch.testing.assert_close(restored(make_input(2)), expected, rtol=1e-10, atol=1e-10)


class TestTakesOver:
    def test_order_of_parameters(self):
        """A block that registers its layers in another order keeps that order, as an optimizer's state needs."""
        block = build("NonLocal2d_nowd", planes=4)
        block._modules = {"conv_value": block._modules.pop("conv_value"), **block._modules}
        expected = list(block.parameters())
        report = convert(block)
        assert len(report.converted) == 1
        assert all(a is b for a, b in zip(report.model.parameters(), expected, strict=True))

    def test_model(self):
        """Only the block changes; the parameters are the same objects in the same order; no random number is drawn."""
        model = Model(originals.DisentangledNonLocal2d(8))
        keep, parameters, state = copy.deepcopy(model), list(model.parameters()), torch.get_rng_state()
        report = convert(model)
        assert report.model is model and torch.equal(torch.get_rng_state(), state)
        assert [(c.name, c.target) for c in report.converted] == [("stage.1", "DisentangledNonLocal2d.mmseg")]
        assert isinstance(model.stage[1], dnl_ext.DisentangledNonLocal2d)
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert list(model.state_dict()) == list(keep.state_dict())
        keep.load_state_dict(model.state_dict(), strict=True)
        assert "stage.1: originals.DisentangledNonLocal2d -> DisentangledNonLocal2d.mmseg(in_channels=8" in str(report)

    def test_optimizer_made_before(self):
        model = Model(build("NonLocal2d")).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        convert(model)
        before = model.stage[1].g.conv.weight.clone()
        model(make_input(2, channels=3)).square().sum().backward()
        optimizer.step()
        assert (model.stage[1].g.conv.weight - before).abs().max() > 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_dtype_training_and_requires_grad(self, dtype):
        block = originals.DisentangledNonLocal2d(8, norm=True).to(dtype).eval()
        block.conv_out.bn.train()
        block.theta.requires_grad_(False)
        expected = {name: p.requires_grad for name, p in block.named_parameters()}
        new = convert(block).model
        assert {name: p.requires_grad for name, p in new.named_parameters()} == expected
        assert {p.dtype for p in new.parameters()} == {dtype}
        assert not new.training and not new.g.training and new.conv_out.bn.training
        assert new(torch.randn(2, 8, 4, 4, dtype=dtype)).dtype == dtype

    def test_device(self):
        block = originals.NonLocal2d_bn(8, 4).to("meta")
        assert {p.device.type for p in convert(block).model.parameters()} == {"meta"}

    def test_norms(self):
        for norm in (
            nn.SyncBatchNorm(8),
            nn.GroupNorm(4, 8),
            nn.InstanceNorm2d(8, affine=True),
            nn.BatchNorm2d(8, eps=0.1),
        ):
            block = build("NonLocal2d", norm=True)
            del block.conv_out.bn
            name = {"GroupNorm": "gn", "InstanceNorm2d": "in"}.get(type(norm).__name__, "bn")
            block.conv_out.add_module(name, norm.double())
            new = convert(block).model
            assert isinstance(new, dnl_ext.NonLocal2d) and getattr(new.conv_out, name) is norm

    def test_layers_with_hooks_and_parametrizations(self):
        block = build("DisentangledNonLocal2d")
        nn.utils.parametrizations.weight_norm(block.theta.conv)
        calls = []
        block.g.conv.register_forward_hook(lambda *_: calls.append("g"))
        keep = copy.deepcopy(block)
        new = convert(block).model
        x = make_input(2)
        torch.testing.assert_close(new(x), keep(x), rtol=1e-10, atol=1e-10)
        assert "g" in calls and list(new.state_dict()) == list(keep.state_dict())

    def test_shared_block(self):
        block = build("NonLocal2d")
        model = nn.ModuleList([nn.Sequential(block), block, nn.Sequential(block), block])
        report = convert(model)
        assert model[0][0] is model[1] is model[2][0] is model[3] and model[1] is not block
        assert [change.name for change in report.converted] == ["0.0", "1", "2.0", "3"]
        restore(model, report)
        assert model[0][0] is model[1] is model[2][0] is model[3] is block

    def test_nothing_to_do(self):
        model = nn.Sequential(nn.Conv2d(3, 3, 1), dnl_ext.NonLocal2d(3), dnl_ext.DisentangledNonLocal2d.mmseg(3))
        report = convert(model)
        assert not report.converted and not report.skipped and str(report) == "no non-local block found"


class TestMultihead:
    def test_only_on_request(self):
        model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
        assert not convert(model).converted and type(model.self_attn) is nn.MultiheadAttention

    @pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 5, "vdim": 6, "batch_first": True}])
    @pytest.mark.parametrize("need_weights", [False, True])
    def test_equals(self, options, need_weights):
        original = scramble(nn.MultiheadAttention(8, 2, **options).double())
        report = convert(copy.deepcopy(original), multihead=True)
        new = report.model
        assert list(new.state_dict()) == list(original.state_dict())
        inputs = [torch.randn(3, 3, width, dtype=torch.float64) for width in (8, original.kdim, original.vdim)]
        results = []
        for module in (new, original):
            leaves = [x.clone().requires_grad_() for x in inputs]
            y, weights = module(*leaves, need_weights=need_weights)
            (y.square().sum() + (weights.square().sum() if need_weights else 0)).backward()
            results.append([y, *[x.grad for x in leaves], *[p.grad for p in module.parameters()]])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        original.load_state_dict(new.state_dict(), strict=True)
        assert type(restore(new, report)) is nn.MultiheadAttention

    @pytest.mark.parametrize("training", [False, True])
    def test_transformer(self, training):
        model = nn.Transformer(8, 2, 2, 2, 16, dropout=0.0, batch_first=True).double().train(training)
        new = copy.deepcopy(model)
        assert len(convert(new, multihead=True).converted) == 6
        source, target = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 4, 8, dtype=torch.float64)
        mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
        expected, result = (m(source, target, tgt_mask=mask) for m in (model, new))
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


def _changed(name, change, **options):
    block = build(name, **options)
    change(block)
    return block


class _Subclass(originals.NonLocal2d):
    pass


def _hook(block):
    block.register_forward_hook(lambda *_: None)


def _backward_hook(block):
    block.register_full_backward_pre_hook(lambda *_: None)


def _saving_hook(block):
    block.register_state_dict_post_hook(lambda *_: None)


def _own_forward(block):
    block.forward = partial(type(block).forward, block)  # as accelerate and peft do


class NonLocalLayer(nn.Module):
    """mmaction2's layer of a long-term feature bank, as far as it is recognised."""

    def __init__(self):
        super().__init__()
        self.st_feat_conv, self.lt_feat_conv = nn.Conv3d(2, 2, 1), nn.Conv3d(2, 2, 1)


SKIPPED = [
    (lambda: nn.MultiheadAttention(8, 2, dropout=0.1), "dropout: expected 0.0, got 0.1"),
    (lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True), "add_bias_kv: expected False, got True"),
    (lambda: nn.MultiheadAttention(8, 2, add_zero_attn=True), "add_zero_attn: expected False, got True"),
    (lambda: type("Mine", (nn.MultiheadAttention,), {})(8, 2), "a subclass of MultiheadAttention"),
    (lambda: _Subclass(8), "a subclass of NonLocal2d, whose forward may differ"),
    (lambda: build("NonLocal2D"), "use_scale: expected False, since True multiplies"),
    (lambda: build("NonLocal2D", mode="gaussian"), "mode: expected 'embedded_gaussian' or 'dot_product' of NonLocal2D"),
    (lambda: _changed("ForkedNonLocal2D", lambda b: setattr(b, "learn_t", True)), "whiten_type, gcb, learn_t:"),
    (lambda: _changed("NonLocal2d", lambda b: b.g.add_module("activate", nn.ReLU())), "g: expected a convolution"),
    (lambda: build("NonLocal2dGc", with_2fc=True), "with_2fc: expected False"),
    (lambda: _changed("NonLocal2dGc", lambda b: setattr(b, "conv_query", nn.Sequential(b.conv_query))), "double_conv:"),
    (lambda: _changed("Unary2d", lambda b: setattr(b, "downsample", nn.AvgPool2d(2)), planes=4), "expected a max"),
    (lambda: build("NonLocal2d_bn", planes=4, whiten_type=["channel", "spatial"]), "whiten_type: expected one"),
    (lambda: _changed("NonLocal2d_bn", lambda b: setattr(b, "with_unary", True), planes=4), "with_unary: expected F"),
    (lambda: build("NonLocal2d_nowd", planes=4, whiten_type=["in"], eps=1e-3), "eps: expected 1e-05"),
    (lambda: build("Unary2d", planes=4, out_bn=True), "out_bn: expected None without a pairwise term"),
    (lambda: build("NonLocal2d_nowd", planes=4, with_nl=False, out_bn=True), "out_bn: expected None without"),
    (NonLocalLayer, "it attends from short-term to long-term features"),
    *((lambda h=h: _changed("NonLocal2d", h), "a hook is registered on the block itself")
      for h in (_hook, _backward_hook, _saving_hook)),
    (lambda: _changed("NonLocal2d", _own_forward), "the block itself has a forward of its own"),
    (lambda: _changed("NonLocal2d", lambda b: delattr(b, "mode")), "it has no mode"),
    (lambda: _changed("NonLocal2d", lambda b: setattr(b.g, "conv", nn.Conv2d(8, 4, 3))), "expected convolutions of"),
    (lambda: _changed("NonLocal2d", lambda b: setattr(b, "g", nn.Identity())), "a NonLocal2d that is built otherwise"),
    (lambda: _changed("NonLocal2d", lambda b: setattr(b, "reduction", 4)), "expected in_channels // reduction = 2"),
    (lambda: _changed("NonLocal2d", lambda b: setattr(b, "extra", nn.Linear(2, 2))), "differs in ['extra.bias'"),
    (lambda: _changed("NonLocal2d", lambda b: setattr(b, "mode", "cosine")), "mode: expected one of"),
    (lambda: _changed("NonLocal2d", lambda b: b.g.__setitem__(1, nn.MaxPool2d(3)), sub_sample=True), "expected a max"),
    (lambda: _changed("DisentangledNonLocal2d", lambda b: setattr(b, "temperature", 0.0)), "temperature: expected"),
    (lambda: _changed("ContextBlock", lambda b: setattr(b, "ratio", 1.0)), "expected int(8 * 1.0) hidden channels"),
]  # fmt: skip


class TestSkips:
    @pytest.mark.parametrize("make, reason", SKIPPED)
    def test_reason(self, make, reason):
        """A known block that has no equal here stays, untouched, and the report says why."""
        model = nn.Sequential(nn.ReLU(), make())
        block, keys = model[1], list(model[1].state_dict())
        report = convert(model, multihead=True)
        assert not report.converted and model[1] is block and list(block.state_dict()) == keys
        (skipped,) = report.skipped
        assert skipped.name == "1" and reason in skipped.reason and reason in str(report)

    def test_others_are_converted(self):
        report = convert(nn.Sequential(build("NonLocal2D"), build("NonLocal2d")))
        assert [c.name for c in report.converted] == ["1"] and [s.name for s in report.skipped] == ["0"]


class TestErrors:
    def test_arguments(self):
        with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got str"):
            convert("model.pth")
        with pytest.raises(ValueError, match="backend: expected one of 'fused', 'reference', got 'cuda'"):
            convert(nn.ReLU(), backend="cuda")
        with pytest.raises(ValueError, match="multihead: expected one of False, True, got 1"):
            convert(nn.ReLU(), multihead=1)

    def test_restore_of_another_model(self):
        report = convert(Model(build("NonLocal2d")))
        for other in (nn.ReLU(), Model(build("NonLocal2d"))):
            with pytest.raises(ValueError, match=r"model: expected the converted model .* 'stage\.1'"):
                restore(other, report)

    @pytest.mark.parametrize("plugin", ["mmseg", "mmdet", "mmaction"])
    def test_without_the_framework(self, plugin):
        """In a process of its own, where neither framework nor its base can be imported."""
        code = (
            "import sys; sys.modules.update(dict.fromkeys(['mmengine', 'mmseg', 'mmdet', 'mmaction']));"
            f"import dnl_ext.integrations; import dnl_ext.integrations.{plugin}"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.returncode == 1 and "To install it: pip install mmengine" in result.stderr
