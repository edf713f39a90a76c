# I3D on Kinetics-400 with DNL blocks in the five places where mmaction2's non-local I3D has its blocks.
_base_ = (
    "mmaction::recognition/i3d/i3d_imagenet-pretrained-r50-nl-embedded-gaussian_8xb8-32x2x1-100e_kinetics400-rgb.py"
)
custom_imports = dict(imports=["dnl_ext.integrations.mmaction"], allow_failed_imports=False)
model = dict(
    backbone=dict(
        type="dnl_ext.ResNet3d",
        non_local_cfg=dict(
            _delete_=True,
            type="DisentangledNonLocal3d",
            sub_sample=True,
            temperature=0.05,
            whiten="channel",
            norm_cfg=dict(type="BN3d", requires_grad=True),
        ),
    )
)
