"""Memory that tensors lie over: what is to be done once none of them uses it any more."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable

__all__ = ("when_over",)

Loan = tuple[weakref.ref[object], Callable[[], object]]

_open: dict[int, Loan] = {}
#: in a forked process, which lets go of nothing for its parent
_of_parent: list[Loan] = []


def when_over(memory: object, step: Callable[[], object]) -> Callable[[], bool]:
    """Call `step` once nothing refers to `memory`, and keep till then what `step` refers to.

    Returns what tells whether that has come. For each result of a service: `weakref.finalize` takes
    several times as long.
    """
    loan = weakref.ref(memory, _close)
    _open[id(loan)] = (loan, step)
    return lambda: loan() is None


def _close(loan: weakref.ref[object]) -> None:
    if found := _open.pop(id(loan), None):
        _, step = found
        step()


def _leave_to_parent() -> None:
    _of_parent.extend(_open.values())
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
