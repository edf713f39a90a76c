"""The registry of the plug-ins: scope ``dnl_ext`` under mmengine's root, so that ``type="dnl_ext.DNLHead"`` finds it."""

import importlib


def require(package, name):
    """Import a part of a framework, or raise ImportError that names the package to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name} does not import ({error}); dnl_ext.integrations.{name.split('.')[0]} needs it: pip install {package}"
        ) from error


MODELS = require("mmengine", "mmengine.registry").Registry(
    "model", parent=require("mmengine", "mmengine.registry").MODELS, scope="dnl_ext"
)
