"""Who is connected to a service: one session for each client, over all its connections."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

from luna_mp.wire.handshake import Identity

__all__ = ("Session", "Sessions")

MAX_PAST = 32  # clients that left, kept for `status`


@dataclass
class Session:
    """One client. Counters are changed under the book's lock."""

    identity: Identity
    #: "local", or where a TCP client came from
    origin: str
    carrier: str = "inline"
    reason: str = ""
    connections: int = 0
    calls: int = 0
    failures: int = 0
    since: float = field(default_factory=time.time)
    last_call: float = 0.0

    def to_data(self) -> dict[str, Any]:
        return {
            "client": self.identity.client_id,
            "pid": self.identity.pid,
            "origin": self.origin,
            "carrier": self.carrier,
            "reason": self.reason,
            "connections": self.connections,
            "calls": self.calls,
            "failures": self.failures,
            "since": self.since,
            "last_call": self.last_call,
        }


class Sessions:
    """The book of one service, shared by its local and its remote server."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, Session] = {}
        self._past: list[Session] = []

    def __repr__(self) -> str:
        return f"<Sessions {len(self._open)} open>"

    def join(self, identity: Identity, origin: str) -> Session:
        """Count one more connection of a client."""
        with self._lock:
            session = self._open.get(identity.client_id)
            if session is None:
                session = self._open[identity.client_id] = Session(identity, origin)
            session.connections += 1
            return session

    def leave(self, session: Session) -> None:
        """Count one connection less; without any the client has left."""
        with self._lock:
            session.connections -= 1
            if not session.connections:
                del self._open[session.identity.client_id]
                self._past = [*self._past, session][-MAX_PAST:]

    def count(self, session: Session, failed: bool) -> None:
        with self._lock:
            session.calls += 1
            session.failures += failed
            session.last_call = time.time()

    def agree(self, session: Session, carrier: str, reason: str) -> None:
        """Note the carrier that the client's probe decided on, and why not a faster one."""
        with self._lock:
            session.carrier, session.reason = carrier, reason

    def to_data(self) -> dict[str, Any]:
        with self._lock:
            return {
                "clients": [session.to_data() for session in self._open.values()],
                "past_clients": [session.to_data() for session in self._past],
            }
