"""What the plug-ins share. Their registry has the scope of ``type="dnl_ext.DNLHead"``, under mmengine's root."""

import importlib
from typing import Any


def require(package: str, name: str) -> Any:
    """Import a part of a framework, or raise ImportError that names the package to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} does not import: {error}. To install it: pip install {package}") from error


_registry = require("mmengine", "mmengine.registry")
MODELS = _registry.Registry("model", parent=_registry.MODELS, scope="dnl_ext")
