"""dnl_ext.integrations against the packages themselves, on CPU: ``make test-integrations`` installs them.

Each test skips where its package is missing. Comparisons are in float64, to 1e-10, unless said otherwise.
"""

import copy
import functools

import pytest
import torch
from blocks import assert_same, make_input, scramble
from mm_packages import importorskip
from torch import nn

import dnl_ext
from dnl_ext.integrations import convert, restore

close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def assert_converts(original, x, *names, backward=True):
    """Converting changes `names`, and neither outputs, gradients nor the state dict, and restoring brings all back."""
    new = copy.deepcopy(original)
    report = convert(new)
    new = report.model
    assert tuple(change.name for change in report.converted) == names and not report.skipped
    assert list(new.state_dict()) == list(original.state_dict())
    compare = assert_same if backward else lambda ours, theirs, x: close(ours(x), theirs(x))
    compare(new, original, x)
    scramble(new, seed=5)
    original.load_state_dict(new.state_dict(), strict=True)
    compare(new, original, x)
    new.load_state_dict(scramble(original, seed=6).state_dict(), strict=True)
    compare(new, original, x)
    back = restore(new, report)
    assert [type(m) for m in back.modules()] == [type(m) for m in original.modules()]
    compare(back, original, x)


class TestMmcv:
    @pytest.mark.parametrize("norm_cfg", [None, {"type": "BN"}])
    @pytest.mark.parametrize("sub_sample", [False, True])
    @pytest.mark.parametrize("mode", ["embedded_gaussian", "gaussian", "dot_product", "concatenation"])
    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_non_local(self, dims, mode, sub_sample, norm_cfg):
        """Of "concatenation" the forward alone: mmcv's backward raises."""
        cnn = importorskip("mmcv.cnn")
        norm_cfg = norm_cfg and {"type": f"BN{dims}d"}
        kind = {1: cnn.NonLocal1d, 2: cnn.NonLocal2d, 3: cnn.NonLocal3d}[dims]
        block = scramble(kind(8, sub_sample=sub_sample, norm_cfg=norm_cfg, mode=mode).double())
        assert_converts(block, make_input(dims), "", backward=mode != "concatenation")
        ours = getattr(dnl_ext, kind.__name__)(8, sub_sample=sub_sample, norm_cfg=norm_cfg, mode=mode)
        assert [name for name, _ in ours.named_children() if name != "pool"] == list(dict(block.named_children()))
        for name, layer in block.named_modules():
            if isinstance(layer, nn.modules.pooling._MaxPoolNd):
                assert repr(ours.get_submodule(name)) == repr(layer)

    @pytest.mark.parametrize("reduction, use_scale", [(1, False), (4, True)])
    def test_options(self, reduction, use_scale):
        cnn = importorskip("mmcv.cnn")
        block = cnn.NonLocal2d(8, reduction=reduction, use_scale=use_scale, norm_cfg={"type": "GN", "num_groups": 2})
        assert_converts(scramble(block.double()), make_input(2), "")

    @pytest.mark.parametrize("pooling_type", ["att", "avg"])
    @pytest.mark.parametrize("fusion", [["channel_add"], ["channel_mul"], ["channel_add", "channel_mul"]])
    def test_context_block(self, fusion, pooling_type):
        cnn = importorskip("mmcv.cnn")
        block = scramble(cnn.ContextBlock(8, 1 / 4, pooling_type, fusion).double())
        assert_converts(block, make_input(2), "")


def segmentation_head(name, plugin=False, **options):
    heads = importorskip("mmseg.models.decode_heads")
    if plugin:
        from dnl_ext.integrations import mmseg as heads
    norm = {"type": "BN", "requires_grad": True}
    head = getattr(heads, name)(in_channels=6, channels=32, num_classes=3, norm_cfg=norm, dropout_ratio=0, **options)
    return scramble(head.double())


class Head(nn.Module):
    """A head as a module of one tensor."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head([x])


class TestMmseg:
    # Channels of query and key, 16, and temperature have exact float32 square roots and values: see the test below.
    @pytest.mark.parametrize("temperature", [0.0625, 0.5])
    @pytest.mark.parametrize("mode", ["embedded_gaussian", "dot_product"])
    def test_dnl_head(self, mode, temperature):
        head = segmentation_head("DNLHead", mode=mode, temperature=temperature)
        assert_converts(Head(head), make_input(2, channels=6), "head.dnl_block")

    def test_dnl_head_concatenation(self):
        head = segmentation_head("DNLHead", mode="concatenation")
        assert_converts(Head(head), make_input(2, channels=6), "head.dnl_block", backward=False)

    def test_temperature_of_005(self):
        """mmsegmentation divides float64 logits by a float32 temperature: exactly that far are the two apart."""
        head = segmentation_head("DNLHead", temperature=0.05)
        new = copy.deepcopy(head)
        convert(new)
        x = make_input(2, channels=6)
        expected, result = (copy.deepcopy(h)([x]) for h in (head, new))  # copies: running statistics move
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
        assert (result - expected).abs().max() > 1e-12
        new.dnl_block.temperature = float(torch.tensor(0.05))
        assert_same(Head(new), Head(head), x)

    @pytest.mark.parametrize("mode", ["embedded_gaussian", "gaussian", "dot_product"])
    @pytest.mark.parametrize("use_scale", [False, True])
    def test_nl_head(self, mode, use_scale):
        head = segmentation_head("NLHead", mode=mode, use_scale=use_scale)
        assert_converts(Head(head), make_input(2, channels=6), "head.nl_block")

    def test_gc_head(self):
        head = segmentation_head("GCHead", ratio=1 / 4)
        assert_converts(Head(head), make_input(2, channels=6), "head.gc_block")

    @pytest.mark.parametrize("name, options", [("DNLHead", {"temperature": 0.0625}), ("NLHead", {})])
    def test_plugin(self, name, options):
        """Their checkpoint, our head: the same outputs and gradients; and back."""
        theirs, ours = segmentation_head(name, **options), segmentation_head(name, plugin=True, **options)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert_same(Head(ours), Head(theirs), make_input(2, channels=6))
        theirs.load_state_dict(scramble(ours, seed=4).state_dict(), strict=True)
        assert_same(Head(ours), Head(theirs), make_input(2, channels=6))

    @pytest.mark.parametrize("kind", ["dnl_ext.DNLHead", "dnl_ext.integrations.mmseg.DNLHead"])
    def test_by_name(self, kind):
        importorskip("mmseg.models")
        import dnl_ext.integrations.mmseg as plugin

        registry = importorskip("mmseg.registry").MODELS
        head = registry.build({
            "type": kind, "in_channels": 6, "channels": 8, "num_classes": 3, "variant": "pairwise",
            "sub_sample": True, "whiten": "ln_nostd", "backend": "reference",
        })  # fmt: skip
        assert type(head) is plugin.DNLHead and head.dnl_block.whiten == "ln_nostd"
        assert head.dnl_block.variant == "pairwise" and head.dnl_block.backend == "reference"
        assert head([torch.randn(2, 6, 4, 4)]).shape == (2, 3, 4, 4)

    def test_errors(self):
        with pytest.raises(ValueError, match="whiten: expected one of"):
            segmentation_head("DNLHead", plugin=True, whiten="none")


class Pyramid(nn.Module):
    """BFP as a module of one tensor."""

    def __init__(self, neck):
        super().__init__()
        self.neck = neck

    def forward(self, x):
        return torch.cat([y.flatten() for y in self.neck((x, x[..., ::2, ::2], x[..., ::4, ::4]))])


def resnet(kind, **options):
    importorskip("mmdet.models")
    importorskip("dnl_ext.integrations.mmdet")
    config = {"type": kind, "depth": 50, "base_channels": 4, "num_stages": 3, "out_indices": (2,), "norm_eval": False}
    config.update(strides=(1, 2, 2), dilations=(1, 1, 1), **options)
    return importorskip("mmdet.registry").MODELS.build(config)


class TestMmdet:
    @pytest.mark.parametrize("plugin", ["mmcv", "dnl_ext"])
    def test_bfp(self, plugin):
        necks = importorskip("mmdet.models.necks")
        options = {"in_channels": 8, "num_levels": 3, "refine_level": 1, "refine_type": "non_local"}
        theirs = Pyramid(scramble(necks.BFP(**options).double()))
        x = make_input(2, spatial=(8, 8))
        if plugin == "mmcv":
            assert_converts(theirs, x, "neck.refine")
            return
        from dnl_ext.integrations.mmdet import BFP

        ours = Pyramid(BFP(**options).double())
        ours.load_state_dict(theirs.state_dict(), strict=True)
        assert_same(ours, theirs, x)
        dnl = BFP(**options, variant="dnl", norm_cfg={"type": "BN"})
        dnl.init_weights()
        assert dnl.refine.variant == "dnl" and dnl.refine.conv_out.bn.weight.abs().max() == 0
        with pytest.raises(ValueError, match="variant: expected None with refine_type='conv', got 'dnl'"):
            BFP(**{**options, "refine_type": "conv"}, variant="dnl")

    @pytest.mark.parametrize("kind, name, options", [
        ("ContextBlock", "context_block", {"ratio": 1 / 4}),
        ("NonLocal2d", "nonlocal_block", {"sub_sample": True, "norm_cfg": {"type": "BN"}}),
    ])  # fmt: skip
    def test_plugin(self, kind, name, options):
        """A stage of ResNet with our plug-in is the stage with mmcv's, and so is the latter converted."""

        def build(scope):
            cfg = {"type": f"{scope}{kind}", **options}
            return resnet("ResNet", plugins=[{"cfg": cfg, "position": "after_conv3"}]).layer2.double()

        theirs, ours = scramble(build("")), build("dnl_ext.")
        ours.load_state_dict(theirs.state_dict(), strict=True)
        x = make_input(2, channels=16, spatial=(8, 8))
        assert_same(ours, theirs, x)
        assert_converts(theirs, x, *[f"{i}.{name}" for i in range(4)])

    def test_plugin_of_the_paper(self):
        plugin = {"cfg": {"type": "dnl_ext.NonLocal2dGc", "ratio": 1 / 8}, "position": "after_conv3"}
        block = resnet("ResNet", plugins=[plugin]).layer2[0].nl_gc_block
        assert isinstance(block, dnl_ext.DisentangledNonLocal2d) and block.style == "official"
        assert (block.in_channels, block.inter_channels, block.temperature) == (32, 4, 0.05)

    def test_resnet_of_the_paper(self):
        """With gamma and the values zero it is mmdetection's ResNet; the block stands between residual sum and ReLU."""
        plain = scramble(resnet("ResNet").double())
        model = resnet("dnl_ext.ResNet", nlgcb={"ratio": 1 / 4}, stage_with_nlgcb=((), (0,), (-2,))).double()
        names = [name for name, module in model.named_modules() if isinstance(module, dnl_ext.DisentangledNonLocal2d)]
        assert names == ["layer2.0.nl_gc_block", "layer3.4.nl_gc_block"]
        missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
        assert not unexpected and all(".nl_gc_block." in key for key in missing)
        block = model.layer2[0].nl_gc_block
        x = make_input(2, channels=3, spatial=(16, 16))
        for stage in (model.layer2[0], model.layer3[4]):
            nn.init.zeros_(stage.nl_gc_block.conv_value.weight)
        close(model(x)[0], plain(x)[0])

        scramble(block)
        seen = []
        hook = block.register_forward_hook(lambda module, inputs, y: seen.append((inputs[0], y)))
        bottleneck, identity = model.layer2[0].eval(), torch.randn(1, 16, 8, 8, dtype=torch.float64)
        out = bottleneck(identity)
        ((given, gave),) = seen
        hook.remove()
        close(out, torch.relu(gave))
        close(torch.relu(given), plain.layer2[0].eval()(identity))
        bottleneck.with_cp = True
        close(bottleneck(identity.requires_grad_()), out)

    def test_initialisation(self):
        """mmengine's initialisation leaves the blocks as they are here: gamma and norm zero, the rest small."""
        options = {"type": "dnl_ext.NonLocal2d", "norm_cfg": {"type": "BN"}}
        model = resnet("ResNet", plugins=[{"cfg": options, "position": "after_conv3"}])
        model.init_weights()
        block = model.layer2[0].nonlocal_block
        assert block.conv_out.bn.weight.abs().max() == 0 and 0.005 < block.g.conv.weight.std() < 0.015
        model = resnet("dnl_ext.ResNet", nlgcb={}, stage_with_nlgcb=((), (), (-1,)))
        model.init_weights()
        block = model.layer3[-1].nl_gc_block
        assert block.gamma.item() == 0 and 0.005 < block.conv_value.weight.std() < 0.015

    def test_errors(self):
        with pytest.raises(ValueError, match="stage_with_nlgcb: expected indices of 3 blocks, got 3"):
            resnet("dnl_ext.ResNet", nlgcb={}, stage_with_nlgcb=((3,), (), ()))
        with pytest.raises(ValueError, match="stage_with_nlgcb: expected 3 tuples"):
            resnet("dnl_ext.ResNet", nlgcb={}, stage_with_nlgcb=((3,),))
        with pytest.raises(ValueError, match="ratio: expected a finite number above 0, got 0"):
            resnet("dnl_ext.ResNet", nlgcb={"ratio": 0}, stage_with_nlgcb=((1,), (), ()))


NON_LOCAL = ((0, 0), (1, 0), (0, 1), (0, 0))


def resnet3d(kind="ResNet3d", **options):
    importorskip("mmaction.models")
    importorskip("dnl_ext.integrations.mmaction")
    config = {"type": kind, "depth": 18, "pretrained": None, "base_channels": 4, "non_local": NON_LOCAL, **options}
    config.setdefault("zero_init_residual", False)
    return importorskip("mmaction.registry").MODELS.build(config)


class TestMmaction:
    names = ("layer2.0.non_local_block", "layer3.1.non_local_block")

    @pytest.mark.parametrize(
        "mode, use_scale", [("embedded_gaussian", False), ("gaussian", True), ("dot_product", False)]
    )
    def test_resnet3d(self, mode, use_scale):
        """Converted, and built by the plug-in: the same video network."""
        cfg = {"sub_sample": True, "use_scale": use_scale, "mode": mode, "norm_cfg": {"type": "BN3d"}}
        theirs = scramble(resnet3d(non_local_cfg=cfg).double())
        x = make_input(3, channels=3, batch=2, spatial=(2, 32, 32))
        ours = resnet3d("dnl_ext.ResNet3d", non_local_cfg=cfg).double()
        ours.load_state_dict(theirs.state_dict(), strict=True)
        assert_same(ours, theirs, x)
        assert_converts(theirs, x, *self.names)

    def test_disentangled(self):
        cfg = {"type": "DisentangledNonLocal3d", "sub_sample": True, "norm_cfg": {"type": "BN3d"}, "temperature": 0.1}
        model = resnet3d("dnl_ext.ResNet3d", non_local_cfg=cfg)
        model.init_weights()
        blocks = [model.get_submodule(name) for name in self.names]
        assert all(type(block) is dnl_ext.DisentangledNonLocal3d and block.temperature == 0.1 for block in blocks)
        assert all(block.conv_out.bn.weight.abs().max() == 0 for block in blocks)
        assert all(block.conv_mask.weight.abs().max() <= block.in_channels**-0.5 for block in blocks)
        plain = resnet3d("ResNet3d", non_local=(0, 0, 0, 0))
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if "non_local" not in k}, strict=True)
        x = torch.randn(1, 3, 2, 32, 32)
        model.eval(), plain.eval()
        assert torch.equal(model(x), plain(x))  # the blocks start as the identity

    def test_wrapper(self):
        """NL3DWrapper, which ResNetTSM makes: frames of a clip side by side in the batch."""
        importorskip("mmaction.models")
        tsm, bottleneck = (
            importorskip("mmaction.models.backbones.resnet_tsm"),
            importorskip("mmaction.models.backbones.resnet"),
        )
        block = bottleneck.Bottleneck(16, 4)
        wrapper = tsm.NL3DWrapper(block, 3, {"sub_sample": True, "norm_cfg": {"type": "BN3d"}})
        assert_converts(scramble(wrapper.double()), make_input(2, channels=16, batch=6), "non_local_block")

    @pytest.mark.parametrize("cfg, count", [(None, 0), ({"type": "DisentangledNonLocal3d"}, 1)])
    def test_tsm(self, cfg, count):
        importorskip("mmaction.models")
        importorskip("dnl_ext.integrations.mmaction")
        model = importorskip("mmaction.registry").MODELS.build({
            "type": "dnl_ext.ResNetTSM", "depth": 50, "num_segments": 2, "pretrained2d": False,
            "non_local": ((0, 0, 0), (0, 1, 0, 0), (0,) * 6, (0, 0, 0)), "non_local_cfg": cfg,
        })  # fmt: skip
        model.init_weights()
        assert sum(isinstance(m, dnl_ext.DisentangledNonLocal3d) for m in model.modules()) == count
        model.eval()
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 2048, 1, 1)

    def test_feature_bank_is_skipped(self):
        importorskip("mmaction.models")
        fbo = importorskip("mmaction.models.roi_heads.shared_heads.fbo_head")
        report = convert(fbo.NonLocalLayer(4, 4, 2, 1, 1))
        assert not report.converted and "two inputs" in report.skipped[0].reason

    def test_errors(self):
        with pytest.raises(ValueError, match="non_local_cfg: expected one of 'NonLocal3d'"):
            resnet3d("dnl_ext.ResNet3d", non_local_cfg={"type": "NonLocal2d"})
