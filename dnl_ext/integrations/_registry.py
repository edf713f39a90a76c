"""The registry of the plug-ins: scope ``dnl_ext`` under mmengine's root, so that ``type="dnl_ext.DNLHead"`` works."""

import importlib


def require(package, name):
    """Import a part of a framework, or raise ImportError that names the package to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} does not import: {error}. To install it: pip install {package}") from error


_registry = require("mmengine", "mmengine.registry")
MODELS = _registry.Registry("model", parent=_registry.MODELS, scope="dnl_ext")
