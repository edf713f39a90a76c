"""A network of any package from the name of a function that makes it, with its weights from a file."""

import ast
import importlib
import os
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from ..segmentation.errors import InputError, described

#: Where checkpoints of common training tools keep the weights.
NESTED = ("state_dict", "model_state_dict", "model")


def build_model(factory: str, arguments: Sequence[str] = (), weights: str | Path | None = None) -> nn.Module:
    """Make a network by the name of a factory, in evaluation mode.

    The factory's module is looked for in the current folder too. Like any import, this runs its code.

    Args:
        factory: "package.module:factory", of a function or class that returns an nn.Module, or of an nn.Module.
        arguments: "name=value" of each argument of the factory; a value that is no Python literal is a string.
        weights: file of a state dict, or of a dict that holds one as state_dict, model_state_dict or model, written by
            ``torch.save``; or one of safetensors. No code in it is run. None leaves what the factory set.

    Returns:
        The nn.Module, on the CPU or where the factory put it.

    Raises:
        InputError: something is not there, fails, or does not fit.

    Example:
        >>> from dnl_ext.diagnosis import build_model
        >>> build_model("torch.nn:MultiheadAttention", ["embed_dim=8", "num_heads=2"]).num_heads
        2
    """
    module_name, colon, attribute = factory.partition(":")
    if not (module_name and colon and attribute):
        raise InputError(f"--model: expected package.module:factory, such as timm:create_model, got {factory}")
    options = dict(parse_argument(text) for text in arguments)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # importing runs any code
        raise InputError(f"--model {factory}: cannot import {module_name}: {described(error)}") from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise InputError(f"--model {factory}: {module_name} has no {attribute}")
        found = getattr(found, name)
    model = found
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise InputError(f"--model {factory}: expected a function or class, got {type(found).__name__}")
        try:
            model = found(**options)
        except Exception as error:  # as above
            shown = ", ".join(f"{name}={value!r}" for name, value in options.items())
            raise InputError(f"--model {factory}: {attribute}({shown}) fails: {described(error)}") from error
    elif options:
        raise InputError(f"--model-arg: {factory} is a network already, which takes no arguments")
    if not isinstance(model, nn.Module):
        raise InputError(f"--model {factory}: expected an nn.Module, {attribute} made a {type(model).__name__}")
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


def parse_argument(text: str) -> tuple[str, Any]:
    """("depth", 12) from "depth=12". Raises InputError."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise InputError(f"--model-arg: expected NAME=VALUE, such as image_size=384, got {text}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Put the weights of a file in place of a network's own, each name once and none left. Raises InputError."""
    state = read_weights(path)
    own = model.state_dict()
    lacking = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    other = [name for name in own if name in state and own[name].shape != state[name].shape]
    if lacking or unknown or other:
        parts = [("lacks", lacking), ("has also", unknown), ("has in another shape", other)]
        listed = "; ".join(f"{verb} {some(names)}" for verb, names in parts if names)
        raise InputError(f"--weights {path}: expected the state dict of {type(model).__name__}, which {listed}")
    for name, tensor in own.items():
        device = state[name].device if tensor.is_meta else tensor.device
        state[name] = state[name].to(device, tensor.dtype)
    del own
    # Assigned, so that no second copy of them is made: of a mapped file only what is read is in memory.
    model.load_state_dict(state, assign=True)


def some(names: Sequence[str]) -> str:
    """The first three names of many."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} others"


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict of a file. Raises InputError."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"--weights: file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            state: Any = importlib.import_module("safetensors.torch").load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except ModuleNotFoundError:
        raise InputError(f"--weights {path}: needs safetensors: pip install safetensors") from None
    except Exception as error:  # torch, zipfile and pickle raise many kinds for a damaged file
        raise InputError(f"--weights: cannot read {path}: {described(error)}") from error
    if isinstance(state, Mapping):
        state = next((state[name] for name in NESTED if isinstance(state.get(name), Mapping)), state)
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"--weights {path}: expected a state dict, a dict of tensors by name")
    state = dict(state)
    consume_prefix_in_state_dict_if_present(state, "module.")  # of DataParallel
    return state
