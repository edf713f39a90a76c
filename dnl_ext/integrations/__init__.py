"""Blocks of this package in models of other frameworks: :func:`convert`, and plug-ins for their registries.

:func:`convert` replaces the non-local blocks of a model that exists; it needs torch alone. The plug-ins are modules to
import on demand, each of which needs its framework: :mod:`dnl_ext.integrations.mmseg`,
:mod:`dnl_ext.integrations.mmdet`, :mod:`dnl_ext.integrations.mmaction`. See ``docs/integrations.md``.
"""

from .conversion import Converted, Report, Skipped, convert, restore

__all__ = ["Converted", "Report", "Skipped", "convert", "restore"]
