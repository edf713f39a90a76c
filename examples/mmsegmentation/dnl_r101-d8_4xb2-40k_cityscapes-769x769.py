# DNLNet on Cityscapes with the paper's block: means of query and key subtracted per channel, temperature 0.05.
# Block and keys are mmsegmentation's, so its checkpoints of DNLHead load.
_base_ = [
    "mmseg::_base_/models/dnl_r50-d8.py",
    "mmseg::_base_/datasets/cityscapes_769x769.py",
    "mmseg::_base_/default_runtime.py",
    "mmseg::_base_/schedules/schedule_40k.py",
]
custom_imports = dict(imports=["dnl_ext.integrations.mmseg"], allow_failed_imports=False)
model = dict(
    data_preprocessor=dict(size=(769, 769)),
    pretrained="open-mmlab://resnet101_v1c",
    backbone=dict(depth=101),
    decode_head=dict(type="dnl_ext.DNLHead", num_classes=19, whiten="channel", temperature=0.05, align_corners=True),
    auxiliary_head=dict(num_classes=19, align_corners=True),
    test_cfg=dict(mode="slide", crop_size=(769, 769), stride=(513, 513)),
)
