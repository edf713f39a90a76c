"""What stands in for the compiled module dnl_ext._C where the kernels are left out: what `_C.pyi` says of a build."""

from typing import Any

import torch


def tf32_allowed() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def build_info() -> dict[str, Any]:
    return {
        "torch": "none",
        "cuda_archs": "",
        "cuda_left_out": "nothing was compiled",
        "cuda": False,
        "compiler": "none",
    }


def cpu_capability() -> str:
    return "none"


def amx_state() -> str:
    return "not used: no kernels"


def cpu_capabilities() -> list[tuple[str, bool]]:
    return []


def cuda_paths() -> list[str]:
    return []


def set_path_query(query: Any, /) -> None:
    """There is no operator that would ask."""
