"""One at a time, first come first served: the lock under which a service uses its models.

Calls run on the thread of their connection, so handing over costs nothing; what is in line is a
ticket. The first in line runs, and whoever leaves wakes the next.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from luna_mp.errors import Broken

if TYPE_CHECKING:
    import torch

__all__ = ("Call", "SingleFlight", "Ticket")

LOOK_SECONDS = 0.1  # between two looks at whether a waiting client is still there
REMEMBERED = 256  # finished calls that `status` lists


class Call(Protocol):
    """What a worker needs to know of the request under way."""

    client: str
    method: str
    after: Any
    """Set by the worker: the event behind the work that it queued on a GPU."""

    def hold(self, context: AbstractContextManager[Any]) -> None:
        """Enter it now, and leave it once the reply is packed, or sent; once in a call."""

    def place(self, step: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run the last step of the result where the client may share its memory."""

    def is_abandoned(self) -> bool:
        """True once nobody waits for the result."""

    def wait_for_room(self) -> None:
        """Return once the client may be given more memory of the GPU. Raises `OutOfMemory`."""

    def has_room(self) -> bool:
        """Whether it may be, now."""


@dataclass
class Ticket:
    """One call in line; times are of the monotonic clock, in seconds."""

    client: str
    method: str
    arrived: float = field(default_factory=time.monotonic)
    started: float = 0.0
    finished: float = 0.0
    #: set when its turn has come; who is first at once has none
    comes: threading.Event | None = None

    def to_data(self) -> dict[str, Any]:
        return {
            "client": self.client,
            "method": self.method,
            "arrived": self.arrived,
            "started": self.started,
            "finished": self.finished,
        }


@dataclass
class _Totals:
    """Of one method, since the service started."""

    calls: int = 0
    run_seconds: float = 0.0
    wait_seconds: float = 0.0


class SingleFlight:
    """A lock that is fair, that a caller can leave while it waits, and that keeps the figures."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._line: deque[Ticket] = deque()
        self._recent: deque[Ticket] = deque(maxlen=REMEMBERED)
        self._totals: defaultdict[str, _Totals] = defaultdict(_Totals)
        self._dropped = 0

    def __repr__(self) -> str:
        served = sum(total.calls for total in self._totals.values())
        return f"<SingleFlight {len(self._line)} in line, {served} served>"

    @contextmanager
    def turn(self, call: Call) -> Iterator[None]:
        """Wait for all that came before, then hold the lock.

        Raises `Broken`, without having run, when the client leaves or its deadline passes first.
        """
        ticket = self.enter(call)
        try:
            yield
        finally:
            self.leave(ticket)

    def enter(self, call: Call) -> Ticket:
        """The first half of `turn`; the ticket is for `leave`."""
        ticket = self._line_up(call)
        try:
            while ticket.comes is not None and not ticket.comes.wait(LOOK_SECONDS):
                self._check(call)
            self._check(call)
        except BaseException:
            self.leave(ticket)
            raise
        ticket.started = time.monotonic()
        return ticket

    def _line_up(self, call: Call) -> Ticket:
        ticket = Ticket(call.client, call.method)
        with self._mutex:
            if self._line:
                ticket.comes = threading.Event()
            self._line.append(ticket)
        return ticket

    def _check(self, call: Call) -> None:
        if call.is_abandoned():
            raise Broken(f"{call.method} was dropped before it ran: nobody waits for it any more")

    def step_back(self, ticket: Ticket) -> None:
        """Leave without having run, to come again."""
        with self._mutex:
            self._remove(ticket)

    def _remove(self, ticket: Ticket) -> None:
        self._line.remove(ticket)
        if self._line and (comes := self._line[0].comes) is not None:
            comes.set()

    def leave(self, ticket: Ticket) -> None:
        """The second half of `turn`."""
        with self._mutex:
            self._remove(ticket)
            if not ticket.started:
                self._dropped += 1
                return
            ticket.finished = time.monotonic()
            self._recent.append(ticket)
            total = self._totals[ticket.method]
            total.calls += 1
            total.run_seconds += ticket.finished - ticket.started
            total.wait_seconds += ticket.started - ticket.arrived

    def to_data(self) -> dict[str, Any]:
        """Figures for `status`; seconds, and the calls in line with the one that runs first."""
        now = time.monotonic()
        with self._mutex:
            line = list(self._line)
            return {
                "now": now,
                "line": [{**t.to_data(), "waiting": now - t.arrived} for t in line],
                "depth": max(len(line) - 1, 0),
                "dropped": self._dropped,
                "methods": {name: asdict(total) for name, total in self._totals.items()},
                "recent": [ticket.to_data() for ticket in self._recent],
            }
