"""Import mmcv-lite, mmsegmentation, mmdetection, mmaction2, torchvision and timm without their compiled parts.

The integrations need none of those parts: mmcv's compiled operators (mmcv-lite has none), torchvision's (its wheel
from PyPI loads only beside a CUDA build of torch), and one localizer that mmaction2's wheel leaves out. Stand-ins for
them are put where an import looks, and raise when they are called.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch


class _Missing(types.ModuleType):
    """A module that has every function, each of which raises."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args, **kwargs):
            raise NotImplementedError(f"{self.__name__}.{name} is compiled code that is not installed here")

        return missing


def _stand_in(name, **attributes):
    if name not in sys.modules:
        module = _Missing(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        for key, value in attributes.items():
            setattr(module, key, value)
        sys.modules[name] = module


def _import_torchvision():
    """torchvision registers shape functions for its compiled operators as it is imported: declare those it lacks."""
    while True:
        try:
            return importlib.import_module("torchvision")
        except ModuleNotFoundError:
            return None
        except RuntimeError as error:
            if not str(error).startswith("operator torchvision::"):
                raise
            torch.library.define(str(error).split()[1], "(Tensor x) -> Tensor")
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]


def importorskip(name):
    """The module `name`, a part of one of the packages, or skip."""
    _import_torchvision()
    package = name.split(".")[0]
    pytest.importorskip(package, reason=f"needs {package}: make test-integrations")
    if importlib.util.find_spec("mmcv") is not None and importlib.util.find_spec("mmcv._ext") is None:
        _stand_in("mmcv._ext")
    drn, root = "mmaction.models.localizers.drn", importlib.util.find_spec(package).submodule_search_locations
    if name.startswith("mmaction") and not Path(root[0], "models", "localizers", "drn").exists():
        _stand_in(drn)
        _stand_in(f"{drn}.drn", DRN=type("DRN", (), {}))
    return importlib.import_module(name)
