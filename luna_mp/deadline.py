"""A point in time after which nobody waits any more."""

from __future__ import annotations

import time

from luna_mp.errors import TimedOut

__all__ = ("Deadline",)


class Deadline:
    """`seconds` from its making; `what` is the text of the error when it has passed."""

    __slots__ = ("_at", "seconds", "what")

    def __init__(self, seconds: float, what: str) -> None:
        self.seconds = seconds
        self.what = what
        self._at = time.monotonic() + seconds

    def __repr__(self) -> str:
        return f"<Deadline {self.what}: {self._at - time.monotonic():.3f} s left>"

    @property
    def has_passed(self) -> bool:
        return time.monotonic() >= self._at

    def remaining(self) -> float:
        """Seconds left, always above zero; raises `TimedOut` when there are none."""
        left = self._at - time.monotonic()
        if left <= 0:
            raise self.error()
        return left

    def error(self) -> TimedOut:
        return TimedOut(f"{self.what} took longer than {self.seconds:g} s")
