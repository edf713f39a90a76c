"""Checks an installed CUDA build of dnl_ext where there is no GPU: it loads, and every operator has a CUDA kernel."""

import sys

import torch

import dnl_ext  # noqa: F401  (registers the operators)
from dnl_ext import _C

OPERATORS = [
    "mean_subtract",
    "whiten_forward",
    "whiten_backward",
    "softmax",
    "softmax_backward",
    "unary_forward",
    "unary_backward",
    "pairwise_forward",
    "pairwise_backward",
    "pairwise_part_forward",
    "pairwise_part_backward",
]

missing = [
    f"{name} on {key}"
    for name in OPERATORS
    for key in ("CPU", "CUDA")
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"dnl_ext::{name}", key)
]
info = _C.build_info()
print(f"dnl_ext built for CUDA archs {info['cuda_archs']} with torch {info['torch']}, loaded into {torch.__version__}")
if not info["cuda"] or missing:
    sys.exit(f"CUDA build incomplete: {', '.join(missing) or 'built without CUDA'}")
print(f"{len(OPERATORS)} operators registered on CPU and CUDA")
