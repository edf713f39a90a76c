# DNLNet on ADE20K with the whitening and the temperature, 0.1, of the paper's configuration.
_base_ = [
    "mmseg::_base_/models/dnl_r50-d8.py",
    "mmseg::_base_/datasets/ade20k.py",
    "mmseg::_base_/default_runtime.py",
    "mmseg::_base_/schedules/schedule_80k.py",
]
custom_imports = dict(imports=["dnl_ext.integrations.mmseg"], allow_failed_imports=False)
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    pretrained="open-mmlab://resnet101_v1c",
    backbone=dict(depth=101),
    decode_head=dict(type="dnl_ext.DNLHead", num_classes=150, whiten="channel", temperature=0.1),
    auxiliary_head=dict(num_classes=150),
)
