"""Types of tensors that the operators do not know: packages above this one register a handler for each of them here.

A handler is an object that has functions of :mod:`dnl_ext.ops` under their names, for tensors of one type. Each takes
all its arguments by position and returns None where the operators are to compute as usual. It is loaded when the first
such tensor is seen, since that may take seconds, and may tell torch how the operators act on tensors of that type.
"""

from collections.abc import Callable
from typing import Any

_handlers: list[tuple[Callable[[Any], bool], Callable[[], Any]]] = []


def register_handler(matches: Callable[[Any], bool], load: Callable[[], Any]) -> None:
    """From now on, tensors for which `matches(tensor)` is true are the business of what `load()` returns."""
    _handlers.append((matches, load))


def handler_of(x: Any) -> Any:
    """The handler of tensor `x`, loaded; None for a plain tensor."""
    for matches, load in _handlers:
        if matches(x):
            return load()
    return None
