"""Which blocks of other code :func:`dnl_ext.integrations.convert` knows, and what equals each of them here.

A row of `TABLE` names the classes and the attributes of a block and a function that reads its options off it. The
options come from attributes, the widths from the layers. Nothing is imported from elsewhere: classes are compared by
name, since every framework, and every copy of one, has its own.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from torch import nn

from .. import modules as ours
from ..modules._common import CONV, MAX_POOL, POOL_WINDOW
from ..modules.non_local import norm_of_cfg
from ..types import Norm

OURS = tuple(value for value in vars(ours).values() if inspect.isclass(value) and issubclass(value, nn.Module))


class CannotConvert(Exception):
    """A known block has something that ours has not; the message says what."""


class Recipe(NamedTuple):
    """What equals a block here: ``make(**arguments, backend=...)``; ``target`` is the name of ``make``."""

    target: str
    make: Callable[..., nn.Module]
    arguments: dict[str, Any]


class Recogniser(NamedTuple):
    """A kind of block: names of its classes, attributes that it has, and its recipe."""

    classes: tuple[str, ...]
    attributes: tuple[str, ...]
    recipe: Callable[[nn.Module], Recipe]


def is_ours(module: object) -> bool:
    """Is it a block of this package already."""
    return isinstance(module, OURS)


def recognise(module: nn.Module, multihead: bool = False) -> Recipe | None:
    """The :class:`Recipe` of a block, or None if it is none. Raises CannotConvert if it is one that has no recipe."""
    if isinstance(module, nn.MultiheadAttention):
        if not multihead:
            return None
        if type(module) is not nn.MultiheadAttention:
            raise CannotConvert("a subclass of MultiheadAttention, whose forward may differ")
        return _multihead(module)
    names = [kind.__name__ for kind in type(module).__mro__]
    row = next((row for row in TABLE if names[0] in row.classes), None)
    if row is None:
        base = next((name for row in TABLE for name in names if name in row.classes), None)
        if base is None:
            return None
        raise CannotConvert(f"a subclass of {base}, whose forward may differ")
    missing = [name for name in row.attributes if not hasattr(module, name)]
    if missing:
        raise CannotConvert(f"expected the attributes {', '.join(row.attributes)}; it has no {', '.join(missing)}")
    try:
        return row.recipe(module)
    except (AttributeError, IndexError, TypeError) as error:
        raise CannotConvert(f"a {names[0]} that is built otherwise: {error}") from error


def _dims(conv: Any) -> int:
    """The spatial dimensions of a convolution that is pointwise, 1, 2 or 3."""
    dims = next((d for d, kind in CONV.items() if isinstance(conv, kind)), None)
    if dims is None:
        raise CannotConvert(f"expected convolutions, got a {type(conv).__name__}")
    one = (1,) * dims
    if (conv.kernel_size, conv.stride, conv.groups) != (one, one, 1) or conv.padding not in ((0,) * dims, "valid"):
        raise CannotConvert(f"expected convolutions of kernel 1, stride 1, no padding and 1 group, got {conv}")
    return dims


def _check_pool(pool: Any, dims: int) -> None:
    """Check the sub-sampling: a max-pool over the window that ours has."""

    def each(value: Any) -> tuple[int, ...]:
        return value if isinstance(value, tuple) else (value,) * dims

    wanted = POOL_WINDOW[dims]
    if (
        not isinstance(pool, MAX_POOL[dims]) or each(pool.kernel_size) != wanted or each(pool.stride) != wanted
        or each(pool.padding) != (0,) * dims or each(pool.dilation) != (1,) * dims or pool.ceil_mode
    ):  # fmt: skip
        raise CannotConvert(f"expected a max-pool of window and stride {wanted}, got {pool}")


# mmcv and mmsegmentation


def _embedding(block: Any, name: str) -> Any:
    """The convolution of a mmcv ConvModule that is nothing else, possibly before a pool."""
    layer = getattr(block, name)
    if isinstance(layer, nn.Sequential):
        if len(layer) != 2:
            raise CannotConvert(f"{name}: expected a convolution and a pool, got {layer}")
        _check_pool(layer[1], _dims(layer[0].conv))
        layer = layer[0]
    if len(list(layer.children())) > 1:
        raise CannotConvert(f"{name}: expected a convolution alone, got {layer}")
    return layer.conv


def _norm_cfg(block: Any) -> dict[str, Any] | None:
    """The ``norm_cfg`` of NonLocal2d that gives the norm of a mmcv ``conv_out`` its name and its parameters."""
    conv_out = block.conv_out
    order = [step for step in getattr(conv_out, "order", ("conv", "norm")) if step != "act"]
    if getattr(conv_out, "with_activation", False) or order != ["conv", "norm"]:
        raise CannotConvert("conv_out: expected a convolution, then a norm, and no activation")
    norms = [layer for layer in conv_out.children() if layer is not conv_out.conv]
    if not norms:
        return None
    norm = norms[0]
    if len(norms) > 1:
        raise CannotConvert(f"conv_out: expected a convolution and at most one norm, got {conv_out}")
    if isinstance(norm, nn.SyncBatchNorm):
        return {"type": "SyncBN"}
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return {"type": "BN"}
    if isinstance(norm, nn.modules.instancenorm._InstanceNorm):
        return {"type": "IN", "affine": norm.affine, "track_running_stats": norm.track_running_stats}
    if isinstance(norm, nn.GroupNorm):
        return {"type": "GN", "num_groups": norm.num_groups}
    raise CannotConvert(f"conv_out: expected a batch, instance or group norm, got {norm}")


def _mmcv_options(block: Any) -> tuple[int, dict[str, Any]]:
    """Dimensions, and the arguments that mmcv's and mmsegmentation's block have in common here."""
    value = _embedding(block, "g")
    embeddings = () if block.mode == "gaussian" else ("theta", "phi")
    dims = _dims(value)
    for conv in [_embedding(block, name) for name in embeddings] + [block.conv_out.conv]:
        if _dims(conv) != dims:
            raise CannotConvert(f"expected convolutions of {dims} dimensions, got {conv}")
    sub_sample = bool(getattr(block, "sub_sample", False))
    if sub_sample and block.mode == "gaussian":
        _check_pool(block.phi, dims)
    if max(value.in_channels // block.reduction, 1) != value.out_channels:
        raise CannotConvert(
            f"expected in_channels // reduction = {value.in_channels // block.reduction} channels of g, "
            f"got {value.out_channels}"
        )
    return dims, {
        "in_channels": value.in_channels, "reduction": block.reduction, "use_scale": bool(block.use_scale),
        "sub_sample": sub_sample, "mode": block.mode,
    }  # fmt: skip


def _mmcv(block: Any) -> Recipe:
    dims, arguments = _mmcv_options(block)
    make = getattr(ours, f"NonLocal{dims}d")
    return Recipe(make.__name__, make, {**arguments, "norm_cfg": _norm_cfg(block)})


def _mmdet_2d(block: Any) -> Recipe:
    """With `fixbug`, the copy in the paper's detection code; without, mmdetection's own before mmcv had the block."""
    if block.mode not in ("embedded_gaussian", "dot_product"):
        raise CannotConvert(f"mode: expected 'embedded_gaussian' or 'dot_product' of NonLocal2D, got {block.mode!r}")
    if not hasattr(block, "fixbug"):
        if block.mode == "embedded_gaussian" and block.use_scale:
            raise CannotConvert("use_scale: expected False, since True multiplies in some versions of NonLocal2D")
        return _mmcv(block)
    if block.whiten_type is not None or block.gc_block is not None or block.learn_t:
        raise CannotConvert(
            "whiten_type, gcb, learn_t: expected None, None, False, got "
            f"{block.whiten_type!r}, {block.gcb!r}, {block.learn_t}"
        )
    dims, common = _mmcv_options(block)
    channels = block.g.conv.out_channels
    if block.downsample is not None:
        _check_pool(block.downsample, dims)
    make = getattr(ours, f"DisentangledNonLocal{dims}d")
    arguments = {
        "in_channels": common["in_channels"], "inter_channels": channels, "variant": "nl", "style": "mmseg",
        "mode": block.mode, "use_scale": common["use_scale"], "norm": _norm(block, dims),
        "sub_sample": None if block.downsample is None else "before",
        # Without `fixbug` it multiplies by sqrt(channels) where ours divides.
        "temperature": block.temp / channels if block.use_scale and not block.fixbug else float(block.temp),
    }  # fmt: skip
    return Recipe(make.__name__, make, arguments)


def _norm(block: Any, dims: int) -> Norm:
    """The same as the argument ``norm`` of the other blocks."""
    cfg = _norm_cfg(block)
    return "batch" if cfg == {"type": "BN"} else norm_of_cfg(cfg, dims)


def _mmseg(block: Any) -> Recipe:
    dims, arguments = _mmcv_options(block)
    _dims(block.conv_mask)
    make = getattr(ours, f"DisentangledNonLocal{dims}d")
    arguments = {**arguments, "temperature": float(block.temperature), "norm": _norm(block, dims)}
    return Recipe(f"{make.__name__}.mmseg", make.mmseg, arguments)


# The paper's segmentation and detection code


def _official(block: Any, **options: Any) -> Recipe:
    """The recipe of a block of that code, from its layers and from `options` of ``.official()``."""
    if isinstance(getattr(block, "conv_query", None), nn.Sequential):
        raise CannotConvert("double_conv: expected one convolution of query and key, got several")
    if getattr(block, "with_2fc", False):
        raise CannotConvert("with_2fc: expected False, got a unary term with a transform of its own")
    use_out, value = block.conv_out is not None, block.conv_value
    dims = _dims(value)
    for name in ("conv_query", "conv_key", "conv_mask", "conv_out"):
        if getattr(block, name, None) is not None:
            _dims(getattr(block, name))
    if block.downsample is not None:
        _check_pool(block.downsample, dims)
    if block.out_bn is not None and not isinstance(block.out_bn, nn.modules.batchnorm._BatchNorm):
        raise CannotConvert(f"out_bn: expected a batch norm, got {block.out_bn}")
    if block.out_bn is not None and not options.get("with_nl", True):
        raise CannotConvert(
            "out_bn: expected None without a pairwise term, where its running variance differs from ours"
        )
    query = getattr(block, "conv_query", value if use_out else None)
    make = getattr(ours, f"DisentangledNonLocal{dims}d")
    arguments = {
        "in_channels": value.in_channels, "inter_channels": None if query is None else query.out_channels,
        "downsample": block.downsample is not None, "use_out": use_out, "out_bn": block.out_bn is not None, **options,
    }  # fmt: skip
    return Recipe(f"{make.__name__}.official", make.official, arguments)


def _official_bn(block: Any) -> Recipe:
    # There, each name that is `in` the list is applied, in this order; `in` a string, each that it contains.
    known = ("channel", "spatial", "bn_affine", "bn", "ln_nostd")
    names = [name for name in known if name in block.whiten_type]
    if len(names) > 1:
        raise CannotConvert(f"whiten_type: expected one whitening, got {block.whiten_type!r}, which does {names}")
    with_unary = bool(getattr(block, "with_unary", False))
    if with_unary and (block.with_gc or names != ["channel"]):
        raise CannotConvert(
            "with_unary: expected False, or True with whiten_type 'channel' and without with_gc, "
            f"got True with {block.whiten_type!r} and with_gc={block.with_gc}"
        )
    return _official(
        block, whiten_type=names[0] if names else None, temperature=float(block.temperature),
        with_gc=bool(block.with_gc), with_unary=with_unary,
    )  # fmt: skip


def _official_nowd(block: Any) -> Recipe:
    # There, the first of these that is `in` the list counts.
    known = ("in_nostd", "in", "ln_nostd", "ln", "fln_nostd", "fln")
    name = next((name for name in known if name in block.whiten_type), None)
    if name in ("in", "ln", "fln") and block.eps != 1e-5:
        raise CannotConvert(f"eps: expected 1e-05 with whiten_type {name!r}, got {block.eps}")
    return _official(
        block, whiten_type=name, temperature=1.0, use_scale="nl" not in block.nowd, with_gc=bool(block.with_gc),
        with_nl=bool(block.with_nl),
    )  # fmt: skip


# GCNet


def _context(block: Any) -> Recipe:
    if getattr(block, "simple", False):
        make = ours.SimplifiedNonLocal2d
        return Recipe(make.__name__, make, {"in_channels": block.conv_value.in_channels})
    transforms = [getattr(block, f"channel_{name}_conv", None) for name in ("add", "mul")]
    transforms = [transform for transform in transforms if transform is not None]
    dims, channels = _dims(transforms[0][0]), transforms[0][0].in_channels
    for transform in transforms:
        kinds = [type(layer).__name__ for layer in transform]
        if len(kinds) != 4 or not isinstance(transform[1], nn.LayerNorm) or not isinstance(transform[2], nn.ReLU):
            raise CannotConvert(f"expected transforms of convolution, LayerNorm, ReLU, convolution, got {kinds}")
        _dims(transform[3])
    make = getattr(ours, f"GlobalContext{dims}d")
    arguments = {
        "in_channels": channels, "ratio": block.ratio, "pooling_type": block.pooling_type,
        "fusion_types": tuple(block.fusion_types),
    }  # fmt: skip
    if max(int(channels * block.ratio), 1) != transforms[0][0].out_channels:
        raise CannotConvert(f"expected int({channels} * {block.ratio}) hidden channels, got {transforms[0][0]}")
    return Recipe(make.__name__, make, arguments)


# PyTorch


def _multihead(block: Any) -> Recipe:
    for name, present in (
        ("dropout", block.dropout), ("add_bias_kv", block.bias_k is not None), ("add_zero_attn", block.add_zero_attn),
    ):  # fmt: skip
        if present:
            raise CannotConvert(f"{name}: expected {type(present)(0)}, got {present}")
    make = ours.DisentangledMultiheadAttention
    arguments = {
        "embed_dim": block.embed_dim, "num_heads": block.num_heads, "bias": block.in_proj_bias is not None,
        "kdim": block.kdim, "vdim": block.vdim, "batch_first": block.batch_first, "unary": False, "whiten": None,
    }  # fmt: skip
    return Recipe(make.__name__, make, arguments)


def _refuse(reason: str, block: Any) -> NoReturn:
    raise CannotConvert(reason)


_MMCV = ("g", "conv_out", "reduction", "use_scale", "mode")
_OFFICIAL = ("conv_value", "conv_out", "out_bn", "downsample")

TABLE = (
    # mmcv.cnn, and through it mmsegmentation's NLHead, mmdetection's BFP and mmaction2's non_local_block
    Recogniser(("NonLocal1d", "NonLocal2d", "NonLocal3d"), _MMCV, _mmcv),
    # mmdetection before mmcv had the block, and its copy in the paper's detection code
    Recogniser(("NonLocal2D",), _MMCV, _mmdet_2d),
    # mmsegmentation's DNLHead
    Recogniser(("DisentangledNonLocal2d",), (*_MMCV, "temperature", "conv_mask"), _mmseg),
    # the paper's segmentation code, and the block of its detection code
    Recogniser(
        ("NonLocal2d_bn", "NonLocal2dGc", "NonLocal3dGc", "_NonLocalNd_bn"),
        (*_OFFICIAL, "gamma", "whiten_type", "temperature", "with_gc"), _official_bn,
    ),
    Recogniser(
        ("NonLocal2d_nowd", "_NonLocalNd_nowd"),
        (*_OFFICIAL, "gamma", "whiten_type", "with_gc", "with_nl", "nowd", "eps"), _official_nowd,
    ),
    Recogniser(("Unary2d", "_Unary"), (*_OFFICIAL, "conv_mask"), functools.partial(_official, with_nl=False)),
    # mmcv.cnn, GCNet, and the copy of it in the paper's detection code
    Recogniser(("ContextBlock",), ("ratio", "pooling_type", "fusion_types"), _context),
    # mmaction2's long-term feature bank
    Recogniser(
        ("NonLocalLayer",), ("st_feat_conv", "lt_feat_conv"),
        functools.partial(_refuse, "it attends from short-term to long-term features, two inputs"),
    ),
)  # fmt: skip
