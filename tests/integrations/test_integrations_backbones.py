"""Backbones of timm itself: features, normalisation, weights, and one line for what cannot be had."""

import pytest
import torch
from mm_packages import importorskip

from dnl_ext.segmentation import SegmentationNetwork
from dnl_ext.segmentation.backbones import TimmBackbone
from dnl_ext.segmentation.errors import InputError
from dnl_ext.segmentation.network import prepare


@pytest.fixture(autouse=True)
def timm():
    return importorskip("timm")


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "mobilenetv3_small_050"])
@pytest.mark.parametrize("size", [(64, 96), (50, 67)])
def test_features_have_stride_8(name, size):
    backbone = TimmBackbone(name)
    features = backbone(torch.rand(1, 3, *size))
    assert features.shape == (1, backbone.channels, -(-size[0] // 8), -(-size[1] // 8))


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0"])
def test_input_is_normalised_as_in_pretraining(name, timm):
    backbone = prepare(TimmBackbone(name), torch.device("cpu"))
    settings = timm.data.resolve_data_config(model=timm.create_model(name))
    images = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(backbone(images), backbone.body((images - mean) / std)[-1])
    assert {"mean", "std"} <= backbone.state_dict().keys()


def test_norms_keep_their_statistics_and_train_their_weights():
    network = SegmentationNetwork(3, "dnl", channels=16, backbone="timm:resnet18", block_gain=1.0).train()
    before = {name: value.clone() for name, value in network.encoder.state_dict().items()}
    network(torch.rand(2, 3, 64, 64)).square().mean().backward()
    assert network.project.training and not any(module.training for module in network.encoder.modules())
    for name, value in network.encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.encoder.body.bn1.parameters())
    frozen = SegmentationNetwork(3, "dnl", channels=16, backbone="timm:resnet18", frozen=True)
    assert not any(p.requires_grad for p in frozen.encoder.parameters())


class TestWeights:
    def test_of_a_whole_network(self, timm, tmp_path):
        """A classifier's state dict, from which what the backbone lacks is left out."""
        whole = timm.create_model("resnet18")
        torch.save(whole.state_dict(), tmp_path / "whole.pth")
        backbone = TimmBackbone("resnet18", weights=tmp_path / "whole.pth")
        images = torch.rand(1, 3, 32, 32)
        assert torch.equal(backbone.body.conv1(images), whole.conv1(images))

    def test_of_another_network(self, timm, tmp_path):
        torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "18.pth")
        with pytest.raises(InputError, match=r"18\.pth are not of resnet34: they lack layer1\.2"):
            TimmBackbone("resnet34", weights=tmp_path / "18.pth")
        with pytest.raises(
            InputError, match=r"18\.pth are not of resnet50: layer1\.0\.conv1\.weight is \(64, 64, 3, 3\)"
        ):
            TimmBackbone("resnet50", weights=tmp_path / "18.pth")

    def test_unreadable(self, tmp_path):
        with pytest.raises(InputError, match=r"--backbone-weights .*none\.pth does not exist"):
            TimmBackbone("resnet18", weights=tmp_path / "none.pth")
        (tmp_path / "text.pth").write_text("no weights")
        with pytest.raises(InputError, match=r"--backbone-weights: cannot read .*text\.pth: ") as raised:
            TimmBackbone("resnet18", weights=tmp_path / "text.pth")
        assert "\n" not in str(raised.value)

    def test_that_cannot_be_downloaded(self, timm, monkeypatch):
        create = timm.create_model

        def offline(name, pretrained=False, **options):
            if pretrained:
                raise OSError("no route\nto host")
            return create(name, pretrained=pretrained, **options)

        monkeypatch.setattr(timm, "create_model", offline)
        with pytest.raises(
            InputError, match=r"cannot load its weights \(no route to host\); give them with --backbone-w"
        ):
            TimmBackbone("resnet18", pretrained=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", "--backbone timm:resnet81: timm has no such network, but resnet"),
        ("vit_tiny_patch16_224", r"no features of stride 8 \(.*output_stride"),
    ],
)
def test_names_that_do_not_fit(name, message):
    with pytest.raises(InputError, match=message):
        TimmBackbone(name)


def test_a_network_is_rebuilt_from_its_state_dict(tmp_path):
    options = {"channels": 16, "backbone": "timm:resnet18", "block_gain": 1.0}
    first = SegmentationNetwork(3, "dnl", **options).eval()
    first.encoder.mean.fill_(0.25)  # travels with the weights
    again = SegmentationNetwork(3, "dnl", **options).eval()
    again.load_state_dict(first.state_dict())
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(first(images), again(images))
