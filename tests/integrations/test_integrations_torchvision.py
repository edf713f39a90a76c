"""Converted models of torchvision through its create_feature_extractor, which traces them by torch.fx.

Features, gradients of the image and of every parameter are those of the original, in float64, to 1e-10.
"""

import copy

import originals
import pytest
import torch
from blocks import scramble
from mm_packages import importorskip

from dnl_ext.integrations import convert

NODES = {
    "resnet18": {"layer2": "early", "layer3": "block", "layer4": "late"},
    "vit": {"encoder.layers.encoder_layer_0": "early", "encoder.layers.encoder_layer_1": "block", "encoder.ln": "late"},
}


def resnet18():
    """With mmcv's block, as transcribed, behind the third stage."""
    model = importorskip("torchvision.models").resnet18(weights=None)
    model.layer3.append(originals.NonLocal2d(256, reduction=16, sub_sample=True, norm=True))
    return model


def vit():
    """Whose nn.MultiheadAttention is converted."""
    kind = importorskip("torchvision.models").VisionTransformer
    options = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32, "num_classes": 5}
    return scramble(kind(image_size=32, patch_size=8, **options))


def features_and_gradients(extractor, size):
    """By name."""
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    images.requires_grad_()
    extractor.zero_grad()
    features = extractor(images)
    sum(feature.square().mean() for feature in features.values()).backward()
    grads = {name: p.grad for name, p in extractor.named_parameters() if p.grad is not None}
    return {**features, "images": images.grad, **grads}


@pytest.mark.parametrize("make, sizes", [(resnet18, (64, 96)), (vit, (32,))])
@pytest.mark.parametrize("training", [True, False])
def test_feature_extractor(training, make, sizes):
    torch.manual_seed(0)
    original = make().double()
    converted = copy.deepcopy(original)
    report = convert(converted, multihead=True)
    assert len(report.converted) == {"resnet18": 1, "vit": 2}[make.__name__] and not report.skipped
    create = importorskip("torchvision.models.feature_extraction").create_feature_extractor
    leaves = {"leaf_modules": [originals.NonLocal2d]}  # torch.fx does not trace the transcription
    extractors = [
        create(model, NODES[make.__name__], tracer_kwargs=leaves).train(training) for model in (original, converted)
    ]
    for size in sizes:
        expected, result = (features_and_gradients(extractor, size) for extractor in extractors)
        assert result.keys() == expected.keys() and {"early", "block", "late"} < result.keys()
        assert len(result) > 30
        for name, tensor in result.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-10, atol=1e-10, msg=name)
    for name, buffer in extractors[0].named_buffers():
        torch.testing.assert_close(extractors[1].get_buffer(name), buffer)


@pytest.mark.parametrize(
    "make, block, names",
    [
        (resnet18, "layer3.2", {"g.0.conv", "theta.conv", "conv_out.conv", "disentangled_attention"}),
        (vit, "encoder.layers.encoder_layer_0.self_attention", {"attend", "out_proj"}),
    ],
)
def test_nodes_inside_a_block(make, block, names):
    """The layers and the attention of a block have names, so that a feature may be taken from inside."""
    extraction = importorskip("torchvision.models.feature_extraction")
    train, evaluation = extraction.get_graph_node_names(convert(make(), multihead=True).model)
    assert train == evaluation
    assert names < {name.removeprefix(f"{block}.") for name in train if name.startswith(f"{block}.")}
