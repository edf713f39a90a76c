"""The attention of trained networks: pictures of single images, and measurements over a data set.

The maps and figures themselves are those of :mod:`dnl_ext.analysis`, which takes any network.
"""

from .class_focus import Focus, focus, token_labels
from .diagnosis import DiagnoseSettings, diagnose
from .figure import Query, choose_queries
from .maps import MapRow, draw_maps, look
from .predictions import PredictionWriter

__all__ = [
    "DiagnoseSettings",
    "Focus",
    "MapRow",
    "PredictionWriter",
    "Query",
    "choose_queries",
    "diagnose",
    "draw_maps",
    "focus",
    "look",
    "token_labels",
]
