"""Segmentation heads for mmsegmentation: ``type="dnl_ext.DNLHead"`` and ``type="dnl_ext.NLHead"``.

Each is mmsegmentation's head with its block replaced, so the state dicts are the same. In a config::

    custom_imports = dict(imports=["dnl_ext.integrations.mmseg"], allow_failed_imports=False)
    model = dict(decode_head=dict(type="dnl_ext.DNLHead"))

Importing this module without mmsegmentation raises ImportError.
"""

from typing import Any

from ..modules import DisentangledNonLocal2d, NonLocal2d
from ..modules.non_local import check_conv_cfg, norm_of_cfg
from ..types import Backend, BlockWhitening, SubSample, Variant
from ._registry import MODELS, require

_heads = require("mmsegmentation", "mmseg.models.decode_heads")


@MODELS.register_module()
class DNLHead(_heads.DNLHead):
    """mmsegmentation's DNLHead on :meth:`dnl_ext.DisentangledNonLocal2d.mmseg`.

    Args:
        reduction: as there, like all of FCNHead's arguments.
        use_scale: as there.
        mode: as there.
        temperature: as there.
        sub_sample: max-pool keys, values and the mask by 2 in H and W.
        variant: of the block, as in :class:`dnl_ext.DisentangledNonLocal2d`; the default is what mmsegmentation's does.
        whiten: of the block, likewise.
        backend: of the block.

    Raises:
        ValueError: an option of the block that does not fit.
    """

    def __init__(
        self,
        *,
        sub_sample: bool = False,
        variant: Variant = "dnl",
        whiten: BlockWhitening | None = "channel",
        backend: Backend = "fused",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_conv_cfg(self.conv_cfg, 2)
        self.dnl_block = DisentangledNonLocal2d.mmseg(
            self.channels,
            self.reduction,
            self.use_scale,
            self.temperature,
            sub_sample,
            norm_of_cfg(self.norm_cfg, 2),
            mode=self.mode,
            variant=variant,
            whiten=whiten,
            backend=backend,
        )


@MODELS.register_module()
class NLHead(_heads.NLHead):
    """mmsegmentation's NLHead on :class:`dnl_ext.NonLocal2d`.

    Args:
        reduction: as there, like all of FCNHead's arguments.
        use_scale: as there.
        mode: as there.
        sub_sample: max-pool keys and values by 2 in H and W.
        backend: of the block.

    Raises:
        ValueError: an option of the block that does not fit.
    """

    def __init__(self, *, sub_sample: bool | SubSample = False, backend: Backend = "fused", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.nl_block = NonLocal2d(
            self.channels,
            sub_sample,
            self.conv_cfg,
            self.reduction,
            self.use_scale,
            self.norm_cfg,
            self.mode,
            backend=backend,
        )
