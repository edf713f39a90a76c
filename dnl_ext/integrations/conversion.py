"""Replace the non-local blocks of an existing model by those of this package: :func:`convert` and :func:`restore`.

What a block is, and what equals it here, is a table in :mod:`._recognise`. A replacement takes over the layers of the
original, the very modules with their parameters, and nothing is copied: dtype, device, training mode, requires_grad,
hooks of the layers and an optimizer that already holds the parameters all stay. Only the block around them, its forward
and its pools, is new, and is built on the meta device, so that no random number is drawn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..modules._block import BACKENDS
from ..modules._common import check_choice, check_flags
from ..types import Backend
from ._recognise import CannotConvert, Recipe, is_ours, recognise


@dataclass(frozen=True)
class Converted:
    """One replaced block.

    Attributes:
        name: its name in the model.
        source: its class.
        target: the class or classmethod of this package that made the new one.
        arguments: of ``target``.
        original: the old block.

    Example:
        >>> import torch
        >>> from dnl_ext.integrations import convert
        >>> print(convert(torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2)), multihead=True).converted[0].target)
        DisentangledMultiheadAttention
    """

    name: str
    source: str
    target: str
    arguments: dict[str, Any]
    original: nn.Module = field(repr=False)

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{self.name or '(the model)'}: {self.source} -> {self.target}({arguments})"


@dataclass(frozen=True)
class Skipped:
    """One block that was recognised and left as it is.

    Attributes:
        name: its name in the model.
        source: its class.
        reason: why it was left, in one sentence.

    Example:
        >>> import torch
        >>> from dnl_ext.integrations import convert
        >>> print(convert(torch.nn.MultiheadAttention(8, 2, dropout=0.5), multihead=True).skipped[0].reason)
        dropout: expected 0.0, got 0.5
    """

    name: str
    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name or '(the model)'}: {self.source} left as it is: {self.reason}"


@dataclass
class Report:
    """What :func:`convert` did; ``str()`` has a line for each block.

    Attributes:
        model: the model: the one given, changed in place, or if that is a block itself, what replaces it.
        converted: a :class:`Converted` for each replaced block.
        skipped: a :class:`Skipped` for each block that was recognised and left.

    Example:
        >>> import torch
        >>> from dnl_ext.integrations import convert
        >>> print(convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))))
        no non-local block found
    """

    model: nn.Module = field(repr=False)
    converted: list[Converted] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(map(str, [*self.converted, *self.skipped])) or "no non-local block found"


def convert(model: nn.Module, *, multihead: bool = False, backend: Backend = "fused") -> Report:
    """Replace, in place, every block of `model` that this package knows by its own, with the same layers.

    The state dict keeps its keys: a checkpoint of either model loads strictly into the other. The parameters stay the
    same objects, so an optimizer made before goes on working.

    Args:
        model: the nn.Module. Blocks are known by class name and attributes; nothing is imported.
        multihead: also ``torch.nn.MultiheadAttention``, by :class:`.DisentangledMultiheadAttention` without its terms.
        backend: of the new blocks, ``"fused"`` or ``"reference"``.

    Returns:
        A :class:`Report`: ``.model``, ``.converted`` and ``.skipped``. A block that is known but cannot be converted
        is in ``.skipped``, with the reason; it raises nothing.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: an option that does not fit.

    Example:
        >>> import torch
        >>> from dnl_ext.integrations import convert
        >>> model = torch.nn.TransformerEncoderLayer(16, 2, dropout=0.0)  # or a model with blocks of mmcv, GCNet, ...
        >>> report = convert(model, multihead=True)
        >>> print(report)  # doctest: +ELLIPSIS
        self_attn: ...MultiheadAttention -> DisentangledMultiheadAttention(embed_dim=16, ...)
        >>> report.model is model
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    check_flags(multihead=multihead)
    check_choice("backend", backend, tuple(BACKENDS))
    report, done = Report(model), {}

    def replacement(module: nn.Module) -> tuple[Recipe | None, Any]:
        """(recipe, new block), (None, the reason there is none), or (None, None) for what is no block."""
        try:
            recipe = recognise(module, multihead)
            return recipe, None if recipe is None else _replacement(module, recipe, backend)
        except CannotConvert as error:
            return None, str(error)

    def visit(module: nn.Module, name: str) -> nn.Module:
        """What stands for `module`: a new block, or itself with its children visited."""
        if is_ours(module):
            return module
        if id(module) not in done:
            done[id(module)] = replacement(module)
        recipe, result = done[id(module)]
        if recipe is not None:
            report.converted.append(Converted(name, _class_name(module), recipe.target, recipe.arguments, module))
            return result
        if result is not None:
            report.skipped.append(Skipped(name, _class_name(module), result))
        for child_name, child in list(module._modules.items()):  # named_children() gives a shared child once
            new = child if child is None else visit(child, f"{name}.{child_name}" if name else child_name)
            if new is not child:
                setattr(module, child_name, new)
        return module

    report.model = visit(model, "")
    return report


def restore(model: nn.Module, report: Report) -> nn.Module:
    """Put the original blocks back into a converted model, in place, with the layers as they are now.

    Args:
        model: ``report.model``.
        report: what :func:`convert` returned.

    Returns:
        The model, or the original block if that is what was converted.

    Raises:
        ValueError: a block of the report is not where it was put.

    Example:
        >>> import torch
        >>> from dnl_ext.integrations import convert, restore
        >>> report = convert(torch.nn.TransformerEncoderLayer(16, 2, dropout=0.0), multihead=True)
        >>> type(restore(report.model, report).self_attn)
        <class 'torch.nn.modules.activation.MultiheadAttention'>
    """
    for change in report.converted:
        try:
            block = model.get_submodule(change.name)
        except AttributeError:
            block = None
        if not is_ours(block):
            raise ValueError(f"model: expected the converted model of this report, with a block at {change.name!r}")
    for change in report.converted:
        block = model.get_submodule(change.name)
        if not is_ours(block):  # restored under another of its names
            continue
        layers = _take_layers(change.original, block, block)
        for _, module in _outside(change.original, layers):  # the layers have modes of their own: frozen norms
            module.training = block.training
        if not change.name:
            return change.original
        for other in report.converted:
            if other.original is change.original:
                model.set_submodule(other.name, change.original)
    return model


#: What holds hooks of a module.
_HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _replacement(original: nn.Module, recipe: Recipe, backend: Backend) -> nn.Module:
    """The block that `recipe` describes, with the layers of `original`."""
    try:
        with torch.device("meta"):
            block = recipe.make(**recipe.arguments, backend=backend)
    except ValueError as error:
        raise CannotConvert(str(error)) from error
    block.train(original.training)
    try:
        shared = _take_layers(block, original, block)
    except AttributeError as error:
        raise CannotConvert(f"expected the layers of {recipe.target}: {error}") from error
    for name in original._modules:  # an optimizer knows parameters by their order
        if name in block._modules:
            block._modules[name] = block._modules.pop(name)
    keys, expected = list(block.state_dict()), list(original.state_dict())
    if keys != expected:
        raise CannotConvert(
            f"expected the state dict of {recipe.target}, differs in {sorted(set(keys) ^ set(expected)) or 'its order'}"
        )
    for name, module in _outside(original, shared):
        where = name or "the block itself"
        if any(vars(module).get(hooks) for hooks in _HOOKS):
            raise CannotConvert(f"a hook is registered on {where}, which would be lost")
        if "forward" in vars(module):
            raise CannotConvert(f"{where} has a forward of its own, which would be lost")
    return block


def _take_layers(target: nn.Module, source: nn.Module, block: nn.Module) -> list[nn.Module]:
    """Put into `target` the layers and parameters of `source`, at the names that `block` has, and return the layers.

    A layer is what has parameters or buffers of its own. All are read from `source` before any is written, so that an
    AttributeError leaves `target` as it was.
    """
    names = [n for n, m in block.named_modules() if n and (_has_any(m._parameters) or _has_any(m._buffers))]
    layers = {name: source.get_submodule(name) for name in names}
    for name, parameter in block._parameters.items():
        if parameter is not None and source._parameters.get(name) is None:
            raise AttributeError(f"{type(source).__name__} has no parameter `{name}`")
    for name, layer in layers.items():
        target.set_submodule(name, layer)
    for name, parameter in source._parameters.items():
        if parameter is not None or name in target._parameters:
            target.register_parameter(name, parameter)
    return list(layers.values())


def _outside(block: nn.Module, layers: Sequence[nn.Module]) -> list[tuple[str, nn.Module]]:
    """Names and modules of a block that are not in its layers."""
    inside = {id(module) for layer in layers for module in layer.modules()}
    return [(name, module) for name, module in block.named_modules() if id(module) not in inside]


def _has_any(tensors: Mapping[str, torch.Tensor | None]) -> bool:
    return any(tensor is not None for tensor in tensors.values())
