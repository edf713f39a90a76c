"""Types of the compiled module, csrc/bindings.cpp."""

from collections.abc import Callable
from typing import Any

def route_errors(route: str, /) -> None: ...
def tf32_allowed() -> bool: ...
def build_info() -> dict[str, Any]: ...
def cpu_capability() -> str: ...
def amx_state() -> str: ...
def cpu_capabilities() -> list[tuple[str, bool]]: ...
def cpu_peak(capability: str, dtype: str, threads: int, /) -> float: ...
def whiten_names() -> list[str]: ...
def pairwise_workspace(
    dtype: str,
    batches: int,
    queries: int,
    keys: int,
    width: int,
    channels: int,
    whiten: bool,
    unary: bool,
    threads: int,
    /,
) -> tuple[int, int]: ...
def cuda_plan(
    dtype: str,
    batches: int,
    queries: int,
    keys: int,
    width: int,
    channels: int,
    *,
    query_channel_first: bool = False,
    key_channel_first: bool = False,
    value_channel_first: bool = False,
    backward: bool = False,
    capability: int = 80,
    multiprocessors: int = 108,
    shared_bytes: int = 0,
    tf32: bool | None = None,
    path: str = "",
    advised: str = "",
    hopper_built: bool | None = None,
) -> dict[str, Any]: ...
def cuda_paths() -> list[str]: ...
def set_path_query(query: Callable[..., tuple[str, bool]], /) -> None: ...
def forget_paths() -> None: ...
def force_path(path: str, /) -> None: ...
def pairwise_compute_type(dtype: str, /) -> str: ...
