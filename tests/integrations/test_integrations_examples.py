"""Each configuration in examples/ trains on small tensors, in its own framework, on CPU; the code of the page runs.

Changed for that: no pretrained weights, BatchNorm for SyncBatchNorm (which needs a GPU), small inputs, ResNet-50 for
ResNet-101. mmdetection's step stops at the region proposals: behind them come compiled operators.
"""

import re
from pathlib import Path

import pytest
import torch
from mm_packages import importorskip

import dnl_ext

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scope(request):
    """The framework of a test as mmengine's default scope."""
    importorskip("mmengine")
    from mmengine.registry import DefaultScope

    importorskip(f"{request.param}.models")
    with DefaultScope.overwrite_default_scope(request.param):
        yield


def in_scope(name):
    return pytest.mark.parametrize("scope", [name], indirect=True)


def load(path):
    """The model of a configuration, made small."""
    importorskip("mmengine")
    from mmengine.config import Config
    from mmengine.registry import MODELS

    config = Config.fromfile(path)

    def shrink(node):
        if isinstance(node, dict):
            for key, value in node.items():
                if key == "pretrained" or (key == "init_cfg" and value and value.get("type") == "Pretrained"):
                    node[key] = None
                elif key == "type" and value == "SyncBN":
                    node[key] = "BN"
                else:
                    shrink(value)
        elif isinstance(node, (list, tuple)):
            for item in node:
                shrink(item)

    shrink(config.model)
    config.model.backbone.depth = 50
    if config.default_scope == "mmseg":
        config.model.data_preprocessor.size = (64, 64)
    model = MODELS.build(config.model)
    model.init_weights()
    return model.train()


def blocks(model):
    return [m for m in model.modules() if isinstance(m, dnl_ext.modules._block.AttentionBlock)]


def assert_trains(model, count, step):
    """Two steps of SGD: finite losses; the norm, or gamma, leaves its zero, and then every layer has a gradient.

    Biases of mask, query and key change nothing.
    """
    found = blocks(model)
    assert len(found) == count
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        loss = step()
        assert torch.isfinite(loss)
        loss.backward()
        optimizer.step()
    for block in found:
        last = block.gamma if block.gamma is not None else block.conv_out.bn.weight
        assert torch.count_nonzero(last) > 0
        for name, parameter in block.named_parameters():
            assert "bias" in name or torch.count_nonzero(parameter.grad) > 0, f"{name} has no gradient"


@pytest.mark.parametrize("name, classes, temperature", [
    ("cityscapes-769x769", 19, 0.05), ("ade20k-512x512", 150, 0.1), ("pascal-context-59-480x480", 59, 0.1),
])  # fmt: skip
@in_scope("mmseg")
def test_segmentation(scope, name, classes, temperature):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    (path,) = (ROOT / "examples/mmsegmentation").glob(f"*_{name}.py")
    model = load(path)
    block = model.decode_head.dnl_block
    assert (block.whiten, block.temperature, model.decode_head.num_classes) == ("channel", temperature, classes)
    samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.randint(classes, (1, 64, 64)))) for _ in range(2)]
    inputs = [torch.randint(256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)]

    def step():
        data = model.data_preprocessor({"inputs": inputs, "data_samples": samples}, training=True)
        return model.parse_losses(model(**data, mode="loss"))[0]

    assert_trains(model, 1, step)


@in_scope("mmdet")
def test_detection(scope):
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    (path,) = (ROOT / "examples/mmdetection").glob("*.py")
    model = load(path)
    assert type(model.backbone.layer3[-2].nl_gc_block.conv_mask) is torch.nn.Conv2d
    sample = DetDataSample(metainfo={"img_shape": (64, 64), "pad_shape": (64, 64), "batch_input_shape": (64, 64)})
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[4.0, 4, 40, 50], [20, 10, 60, 30]]), labels=torch.zeros(2).long()
    )
    x = torch.randn(1, 3, 64, 64)

    def step():
        return model.parse_losses(model.rpn_head.loss(model.extract_feat(x), [sample]))[0]

    assert_trains(model, 1, step)


@in_scope("mmaction")
def test_video(scope):
    from mmaction.structures import ActionDataSample

    (path,) = (ROOT / "examples/mmaction2").glob("*.py")
    model = load(path)
    inputs = [torch.randint(256, (1, 3, 8, 64, 64), dtype=torch.uint8) for _ in range(2)]
    samples = [ActionDataSample().set_gt_label(label) for label in (3, 5)]

    def step():
        data = model.data_preprocessor({"inputs": inputs, "data_samples": samples}, training=True)
        return model.parse_losses(model(**data, mode="loss"))[0]

    assert_trains(model, 5, step)


@pytest.mark.parametrize(
    "page, package",
    [
        ("integrations", "torch"),
        ("howto/timm", "torchvision"),
        ("howto/timm", "timm"),
        ("howto/mmsegmentation", "mmseg.models.decode_heads"),
        ("howto/mmdetection", "mmdet.models.necks"),
        ("howto/mmaction2", "mmaction.models.backbones"),
    ],
)
def test_code_of_the_page(page, package):
    """A block of the page that imports the package runs; it asserts what it shows."""
    importorskip(package)
    text = (ROOT / f"docs/{page}.md").read_text()
    codes = [
        code
        for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        if re.search(rf"^(import|from) {package}\b", code, re.MULTILINE)
    ]
    assert codes
    for code in codes:
        exec(compile(code, f"docs/{page}.md", "exec"), {})
