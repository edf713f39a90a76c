# Mask R-CNN on COCO with one DNL block where the paper's code has it: in the last bottleneck but one of stage c4, after
# the residual sum. Everything else is mmdetection's Mask R-CNN.
_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["dnl_ext.integrations.mmdet"], allow_failed_imports=False)
model = dict(
    backbone=dict(
        type="dnl_ext.ResNet",
        nlgcb=dict(ratio=1 / 4, whiten_type="channel", temp=0.05, with_gc=True, downsample=False, use_out=False),
        stage_with_nlgcb=((), (), (-2,), ()),
    )
)
