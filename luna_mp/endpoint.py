"""One service as one client sees it: a pool of connections that open, fail and open again."""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from luna_mp.config import Role, ServiceConfig
from luna_mp.deadline import Deadline
from luna_mp.errors import Broken, LunaError, Rejected, RemoteTraceback, Unavailable, revive
from luna_mp.wire import handshake, probe, stream
from luna_mp.wire.carrier import CarrierFailed
from luna_mp.wire.channel import Channel
from luna_mp.wire.leases import Owner

__all__ = ("Address", "Endpoint")

logger = logging.getLogger(__name__)

#: how long a call waits for a service that was there before and is being restarted
RECONNECT_SECONDS = 60.0
RETRY_SECONDS = (0.02, 1.0)  # between two attempts, at first and at most
MAX_CONNECTIONS = 16  # of one client to one service; more threads than that wait
MAX_IDLE = 4
GONE_SECONDS = 1.0  # in which a process that was killed is seen to have closed its sockets
WATCH_SECONDS = 0.5  # between two looks at what is kept of a service whose GPU is shared

Address = str | tuple[str, int]


class Endpoint:
    """One service as one client sees it: a pool of connections, each used by one call at a time.

    `locate` is asked again for each connection, since a service may come back elsewhere.
    """

    def __init__(
        self,
        role: Role,
        locate: Callable[[], Address],
        key: bytes,
        importer: probe.Importer | None = None,
    ) -> None:
        """`importer`: a `cuda_client.Importer`, where this process has a GPU and may use it."""
        self.role = role
        self.carrier = ""
        self.reason = ""
        self._locate = locate
        self._key = key
        self.client_id = uuid.uuid4().hex
        self._max_message = ServiceConfig.max_message
        self._importer = importer
        #: of the last connection
        self._service: Owner | None = None
        #: why the GPU of that service is not shared any more, after that failed in mid-life
        self._avoided = ""
        self._lock = threading.Lock()
        # Not a semaphore, which is slower, and which an interrupt can leave locked.
        self._slots: SimpleQueue[None] = SimpleQueue()
        for _ in range(MAX_CONNECTIONS):
            self._slots.put(None)
        self._idle: list[Channel] = []
        self._pid = os.getpid()
        self._was_there = False
        self._is_closed = False
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name=f"{role} watcher", daemon=True)

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else f"{self.carrier}, {len(self._idle)} idle"
        return f"<Endpoint {self.role}: {state}>"

    def call(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        seconds: float,
        device: str = "",
        check: Callable[[], object] | None = None,
    ) -> Any:
        """Make one call; `device` "cpu" wants its tensors there.

        `check` is asked while the call waits; what it raises withdraws the call.
        Raises `LunaError`; any other call is unaffected by its failure.
        """
        deadline = Deadline(seconds, f"{self.role}.{method}", check)
        self._take_slot(deadline)
        request: dict[str, Any] = {"method": method, "args": args, "kwargs": kwargs}
        if device == "cpu":
            request["to_host"] = True
        try:
            reply = self._insist(request, deadline)
        finally:
            self._slots.put(None)
        if "error" in reply:
            raise _revived(reply, deadline)
        return reply["result"]

    def _take_slot(self, deadline: Deadline) -> None:
        while True:
            try:
                return self._slots.get(timeout=deadline.pause())
            except Empty:
                continue

    def _insist(self, request: dict[str, Any], deadline: Deadline) -> dict[str, Any]:
        """Exchange, and once more after each of two failures that the next try need not meet."""
        met: list[type[Broken]] = []
        while True:
            try:
                return _if_carried(self._exchange(request, deadline))
            except (stream.NeverRead, CarrierFailed) as exc:
                if type(exc) in met:
                    raise
                met.append(type(exc))
                if isinstance(exc, CarrierFailed):
                    logger.warning("%s: %s; tensors go by shared memory now", self.role, exc)
                    with self._lock:
                        self._avoided = str(exc)
                # Else the service was ending as the call came in; the next try waits for another.
                self._close_idle()

    def open(self, deadline: Deadline) -> None:
        """Make sure that the service answers. Raises `LunaError`."""
        self._give_back(self._take(deadline))

    def check(self, deadline: Deadline) -> None:
        """Like `open`, without waiting for a service that may be restarted."""
        self._give_back(self._alive() or self._open(deadline))

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
        self._close_idle()
        self._closing.set()
        if self._watcher.ident is not None:
            self._watcher.join()

    def _watch(self) -> None:
        """Let go of memory that nobody uses: what a process maps keeps the VRAM of another taken.

        That is of connections whose service died, and of those that do not need it now.
        """
        while not self._closing.wait(WATCH_SECONDS):
            if self._importer is not None:
                self._importer.rest()
            with self._lock:
                gone = [channel for channel in self._idle if channel.stream.peer_has_gone]
                self._idle = [channel for channel in self._idle if channel not in gone]
            for channel in gone:
                channel.close()

    def _close_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for channel in idle:
            channel.close()

    def _exchange(self, request: dict[str, Any], deadline: Deadline) -> dict[str, Any]:
        channel = self._take(deadline)
        request["timeout"] = deadline.remaining()
        try:
            channel.send(request, deadline)
        except Rejected:
            self._give_back(channel)
            raise
        except BaseException:  # also an interrupt, which may leave half a message sent
            channel.close()
            raise
        try:
            reply = channel.recv(deadline, to_host="to_host" in request)
        except stream.NeverRead:
            channel.close()
            raise
        except Broken as exc:
            # What cannot be opened since its service has died is no fault of the carrier.
            has_failed = isinstance(exc, CarrierFailed)
            has_failed = has_failed and not channel.stream.has_closed_within(GONE_SECONDS)
            channel.close()
            if has_failed:
                raise
            raise Broken(
                f"the {self.role} service was lost during {request['method']} ({exc}); "
                "if it is restarted, the next call finds it again"
            ) from exc
        except BaseException:
            # Closing is what tells the service that nobody waits for this call any more.
            channel.close()
            raise
        self._give_back(channel)
        return reply

    def _take(self, deadline: Deadline) -> Channel:
        """An idle connection that is still alive, or a new one."""
        return self._alive() or self._reconnect(deadline)

    def _alive(self) -> Channel | None:
        while channel := self._pop():
            if not channel.stream.peer_has_gone:
                return channel
            channel.close()
        return None

    def _pop(self) -> Channel | None:
        with self._lock:
            if self._is_closed:
                raise Unavailable(f"this client of the {self.role} service was closed")
            if self._pid != os.getpid():
                # A fork shares its parent's sockets; what it reads there is the parent's.
                self._idle, self._pid = [], os.getpid()
                self.client_id = uuid.uuid4().hex
            return self._idle.pop() if self._idle else None

    def _give_back(self, channel: Channel) -> None:
        with self._lock:
            # One that was in use when the GPU failed another call is not to be used again.
            is_avoided = channel.carrier == "cuda" and self._avoided
            if not self._is_closed and not is_avoided and len(self._idle) < MAX_IDLE:
                self._idle.append(channel)
                return
        channel.close()

    def _reconnect(self, deadline: Deadline) -> Channel:
        """Open a connection; a service that was there before is given time to come back."""
        patience = Deadline(RECONNECT_SECONDS, f"waiting for the {self.role} service")
        pause, longest = RETRY_SECONDS
        while True:
            try:
                channel = self._open(deadline)
            except (Unavailable, Broken):
                if not self._was_there or patience.has_passed or deadline.has_passed:
                    raise
                time.sleep(min(pause, deadline.pause()))
                pause = min(2 * pause, longest)
            else:
                self._was_there = True
                return channel

    def _open(self, deadline: Deadline) -> Channel:
        connected = stream.connect(self._locate(), deadline)
        channel = Channel(connected, self._max_message)
        try:
            mine = handshake.identity(self.client_id, self._max_message)
            theirs = handshake.greet(connected, self._key, mine)
            channel.max_message = min(self._max_message, theirs.max_message)
            if theirs.role != self.role:
                raise Rejected(
                    f"{connected.peer} is the {theirs.role} service and the {self.role} service is "
                    "wanted: are the two addresses swapped?"
                )
            avoided = self._avoided_of(Owner(theirs.pid, theirs.born))
            self.reason = probe.choose(channel, theirs, self._importer, avoided)
        except BaseException:  # also an interrupt leaves no connection open
            channel.close()
            raise
        self.carrier = channel.carrier
        with self._lock:
            if self.carrier == "cuda" and self._watcher.ident is None and not self._is_closed:
                self._watcher.start()
        return channel

    def _avoided_of(self, service: Owner) -> str:
        """Why its GPU is not to be shared; what failed with another service need not fail now."""
        with self._lock:
            if service != self._service:
                self._service, self._avoided = service, ""
            return self._avoided


def _if_carried(reply: dict[str, Any]) -> dict[str, Any]:
    """Raises `CarrierFailed` where the service had a result that it could not hand over."""
    if reply.get("kind") == CarrierFailed.__name__:
        raise CarrierFailed(reply["error"]) from RemoteTraceback(reply["traceback"])
    return reply


def _revived(reply: dict[str, Any], deadline: Deadline) -> LunaError:
    error = revive(reply["kind"], reply["error"], reply["traceback"])
    if isinstance(error, Broken) and deadline.has_passed:
        # On a busy machine the service may drop the call before this end sees that.
        late = deadline.error()
        late.__cause__ = error
        return late
    return error
