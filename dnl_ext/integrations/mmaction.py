"""Video backbones for mmaction2 whose ``non_local_cfg`` builds this package's blocks.

``type="dnl_ext.ResNet3d"``, ``"dnl_ext.ResNet3dSlowOnly"`` and ``"dnl_ext.ResNetTSM"`` are mmaction2's backbones with
every ``non_local_block`` replaced. In a config::

    custom_imports = dict(imports=["dnl_ext.integrations.mmaction"], allow_failed_imports=False)
    model = dict(backbone=dict(type="dnl_ext.ResNet3d", non_local=((0, 0, 0), (1, 0, 1, 0), ...),
                               non_local_cfg=dict(type="DisentangledNonLocal3d", temperature=0.05)))

``non_local_cfg`` has an optional ``type``. ``"NonLocal3d"``, the default, takes mmcv's arguments and loads mmaction2's
checkpoints; ``"DisentangledNonLocal3d"`` takes those of ``dnl_ext.DisentangledNonLocal3d.mmseg``, with ``norm_cfg``
in place of ``norm``. Importing this module without mmaction2 raises ImportError.
"""

from typing import Any

from torch import nn

from ..modules import DisentangledNonLocal3d, NonLocal3d
from ..modules._common import check_choice
from ..modules.non_local import norm_of_cfg
from ._registry import MODELS, require

_backbones = require("mmaction2", "mmaction.models.backbones")


def _build(channels: int, type: str = "NonLocal3d", **options: Any) -> nn.Module:
    check_choice("non_local_cfg", type, ("NonLocal3d", "DisentangledNonLocal3d"))
    if type == "NonLocal3d":
        return NonLocal3d(channels, **options)
    return DisentangledNonLocal3d.mmseg(channels, norm=norm_of_cfg(options.pop("norm_cfg", None), 3), **options)


class _NonLocalBlocks(nn.Module):
    """A backbone that builds its ``non_local_block``s here."""

    def __init__(self, *args: Any, non_local_cfg: dict[str, Any] | None = None, **kwargs: Any) -> None:
        # The smallest block that the backbone can build, to be replaced. ResNetTSM takes an empty dict for no blocks.
        super().__init__(*args, non_local_cfg={"mode": "gaussian"} if non_local_cfg else {}, **kwargs)
        self.non_local_cfg = dict(non_local_cfg or {})
        for module in self._with_block():
            module.non_local_block = _build(module.non_local_block.in_channels, **self.non_local_cfg)

    def _with_block(self) -> list[Any]:
        return [module for module in self.modules() if hasattr(module, "non_local_block")]

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        """As there. Where that sets every convolution and norm, the blocks then initialise themselves again."""
        super().init_weights(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]  # of the backbone behind it
        if getattr(self, "pretrained", None) is None and getattr(self, "init_cfg", None) is None:
            for module in self._with_block():
                module.non_local_block.reset_parameters()


def _register(name: str) -> Any:
    base = getattr(_backbones, name)
    doc = f"mmaction2's {name}; ``non_local_cfg`` as in :mod:`dnl_ext.integrations.mmaction`, the rest as there."
    kind = type(base)(name, (_NonLocalBlocks, base), {"__doc__": doc, "__module__": __name__})
    return MODELS.register_module(module=kind, name=name)


ResNet3d: Any = _register("ResNet3d")
ResNet3dSlowOnly: Any = _register("ResNet3dSlowOnly")
ResNetTSM: Any = _register("ResNetTSM")
