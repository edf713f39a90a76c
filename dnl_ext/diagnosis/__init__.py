"""``dnl-ext diagnose --model``: every attention head of any PyTorch network, over images, as tables and pictures.

The figures are those of :func:`dnl_ext.analysis.measure_model`, which takes networks of any input. Here is what a
network of images needs beside it: to be built by name with its weights, images as it expects them, and a report.
"""

from .images import ImageInputs
from .model import build_model
from .pictures import draw_heads
from .report import diagnose_model

__all__ = ["ImageInputs", "build_model", "diagnose_model", "draw_heads"]
