"""Memory that tensors lie over: what is to be done once none of them uses it any more."""

from __future__ import annotations

import weakref
from collections.abc import Callable

__all__ = ("when_over",)

_open: dict[int, tuple[weakref.ref[object], Callable[[], object]]] = {}


def when_over(memory: object, step: Callable[[], object]) -> None:
    """Call `step` once nothing refers to `memory`, and keep till then what `step` refers to.

    For each result of a service: `weakref.finalize` takes several times as long.
    """
    loan = weakref.ref(memory, _close)
    _open[id(loan)] = (loan, step)


def _close(loan: weakref.ref[object]) -> None:
    _, step = _open.pop(id(loan))
    step()
