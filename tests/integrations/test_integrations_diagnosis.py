"""Attention heads of torchvision's and timm's transformers: all are found, and their figures are those of full maps."""

import pytest
import torch
from mm_packages import importorskip

from dnl_ext.analysis import measure_model

IMAGES = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def torchvision_vit():
    """12 blocks would do no more than two."""
    kind = importorskip("torchvision.models").VisionTransformer
    return kind(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)


def timm_vit(**options):
    kind = importorskip("timm.models.vision_transformer").VisionTransformer
    return kind(img_size=32, patch_size=8, depth=2, num_heads=2, embed_dim=16, num_classes=5, **options)


def maps_of_torchvision(block, x):
    """(heads, N, N) of a block for its input."""
    x = block.ln_1(x)
    return block.self_attention(x, x, x, need_weights=True, average_attn_weights=False)[1][0]


def maps_of_timm(block, x):
    """The same, from the projection of query, key and value."""
    attention, x = block.attn, block.norm1(x)
    query, key, _ = attention.qkv(x)[0].unflatten(1, (3, attention.num_heads, attention.head_dim)).unbind(1)
    logits = torch.einsum("ihc,jhc->hij", attention.q_norm(query), attention.k_norm(key)) * attention.scale
    return logits.softmax(2)


CASES = {
    "torchvision": (torchvision_vit, "encoder.layers", "self_attention", maps_of_torchvision),
    "timm": (timm_vit, "blocks", "attn", maps_of_timm),
    "timm, normalised": (lambda: timm_vit(qk_norm=True), "blocks", "attn", maps_of_timm),
}


@pytest.mark.parametrize("name", CASES)
def test_vision_transformers(name):
    make, blocks, attention, maps = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=1.0 if parameter.dim() == 1 else 0.5)
    layers, seen = model.get_submodule(blocks), []
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    report = measure_model(model, [IMAGES], queries=None)
    children = [child for child, _ in layers.named_children()]
    assert list(report.layers) == [f"{blocks}.{child}.{attention}" for child in children]
    for layer, x, found in zip(layers, seen, report.layers.values(), strict=True):
        with torch.no_grad():
            rows = maps(layer, x).double()
        assert rows.shape == (2, 17, 17)
        order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
        first, second = rows[:, order[:-1:2]], rows[:, order[1::2]]

        def entropy(p):
            return torch.special.entr(p).sum(-1)

        jsd = (entropy((first + second) / 2) - (entropy(first) + entropy(second)) / 2).mean(1)
        assert float(jsd.min()) > 0.001  # far above what rounding makes of it
        for head in range(2):
            total = found.heads[head].images[0].total
            assert total.entropy.value == pytest.approx(float(entropy(rows[head]).mean()), rel=1e-4)
            assert total.jsd.value == pytest.approx(float(jsd[head]), rel=1e-3)


def test_windows_with_relative_positions(monkeypatch):
    """Swin: each window is an image, a bias of the heads that depends on the query, and masks where windows wrap.

    timm computes it by matrix products of its own unless it is asked for what it calls experimental.
    """
    config = importorskip("timm.layers.config")
    monkeypatch.setattr(config, "_USE_FUSED_ATTN", config._USE_FUSED_ATTN)  # as it was, afterwards
    config.set_fused_attn(True, experimental=True)
    kind = importorskip("timm.models.swin_transformer").SwinTransformer
    model = kind(img_size=32, patch_size=2, window_size=4, embed_dim=8, depths=(2, 1), num_heads=(2, 4), num_classes=5)
    report = measure_model(model, [IMAGES])
    sizes = {name: (len(layer.heads), len(layer.heads[0].images)) for name, layer in report.layers.items()}
    assert sizes == {
        "layers.0.blocks.0.attn": (2, 16), "layers.0.blocks.1.attn": (2, 16), "layers.1.blocks.0.attn": (4, 4),
    }  # fmt: skip
    assert all(layer.remarks == ["additive mask"] and layer.heads[0].images[0].mask for layer in report.layers.values())


def test_a_pool_of_one_query_is_named():
    model = timm_vit(global_pool="map", class_token=False).eval()
    report = measure_model(model, [IMAGES])
    assert list(report.layers) == ["blocks.0.attn", "blocks.1.attn"]
    assert list(report.skipped) == ["attn_pool"] and "fewer than two queries" in report.skipped["attn_pool"]
