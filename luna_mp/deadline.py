"""A point in time after which nobody waits any more."""

from __future__ import annotations

import time
from collections.abc import Callable

from luna_mp.errors import TimedOut

__all__ = ("Deadline", "Patience", "nap")

CHECK_SECONDS = 0.1  # between two questions whether a wait is still wanted
LONGEST = 1e6  # seconds; more is as good as for ever, and too much for the system's own clocks
SHORTEST_NAP = 10e-6  # seconds, which Linux makes some 60 µs of
LONGEST_NAP = 1e-3
# Of what was waited so far. Less takes more of a core for the first second; to wait for a GPU of
# one's own, as torch does, takes a whole one.
NAP_SHARE = 1 / 16000


class Deadline:
    """`seconds` from its making; `what` is the text of the error when it has passed.

    `check` is asked all the while, and raises when the wait is not wanted any more.
    """

    __slots__ = ("_asked", "_at", "_check", "seconds", "what")

    def __init__(
        self, seconds: float, what: str, check: Callable[[], object] | None = None
    ) -> None:
        self.seconds = seconds
        self.what = what
        self._check = check
        self._at = time.monotonic() + min(seconds, LONGEST)
        self._asked = 0.0

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

    def pause(self) -> float:
        """Seconds to wait at most before asking again; raises `TimedOut`, or what `check` does."""
        left = self.remaining()
        if self._check is None:
            return left
        # Who naps for microseconds asks often.
        if (now := time.monotonic()) - self._asked >= CHECK_SECONDS:
            self._asked = now
            self._check()
        return min(left, CHECK_SECONDS)

    def progress(self) -> None:
        """Some of what was waited for is done; the rest has the same end."""

    def error(self) -> TimedOut:
        return TimedOut(f"{self.what} took longer than {self.seconds:g} s")


class Patience(Deadline):
    """A deadline for the next bit of progress, however long the whole takes."""

    __slots__ = ()

    def progress(self) -> None:
        self._at = time.monotonic() + self.seconds


def nap(waited: float) -> None:
    """Sleep for a small part of the seconds that were waited so far."""
    time.sleep(min(max(SHORTEST_NAP, NAP_SHARE * waited), LONGEST_NAP))
