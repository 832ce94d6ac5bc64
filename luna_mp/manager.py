"""The managers: what listens, which calls it admits, and who may make them.

`multiprocessing.managers` gives the frame: a serializer registered in `listener_client`, a
`BaseManager` for each kind of address and its `Server`. What the stock classes do between is
replaced, since there no wait has an end, each TCP connection costs 44 ms, a dead connection is kept
for each thread, a remote traceback is lost, and every peer may read any referent or stop the
server. Here a connection is authenticated, counted and bounded; it reaches one worker by the names
that the service exposed to this manager, and nothing else.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import threading
import time
from functools import partial
from multiprocessing import managers
from typing import Any

import torch

from luna_mp.calls import Calls, Exposed, OnFault
from luna_mp.errors import LunaError
from luna_mp.sessions import Sessions
from luna_mp.wire import handshake, probe, stream
from luna_mp.wire.channel import Channel
from luna_mp.wire.stream import Stream

__all__ = ("LocalManager", "Manager", "RemoteManager", "Server")

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
MAX_HANDSHAKES = 64  # strangers at once; each has five seconds
THREAD_SECONDS = 2.0  # for the threads of connections to end once those are closed
ACCEPT_SECONDS = 0.5  # between two looks at whether to stop


class _Listener:
    """What `managers.Server` makes to listen; it accepts streams nobody has authenticated yet."""

    def __init__(self, address: str | tuple[str, int], backlog: int) -> None:
        self._socket = stream.listen(address)
        self._waker, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        for sock in (self._socket, self._woken):
            self._selector.register(sock, selectors.EVENT_READ)
        self._socket.setblocking(False)
        self._path = address if isinstance(address, str) else ""
        bound = self._socket.getsockname()
        self.address = address if isinstance(address, str) else (bound[0], bound[1])

    def accept(self) -> Stream | None:
        """The next connection, or None when there was none for a while. Raises `OSError`."""
        self._selector.select(ACCEPT_SECONDS)
        try:
            sock, peer = self._socket.accept()
        except BlockingIOError:
            return None
        return Stream(sock, stream.place_of(peer[:2]) if peer else "a local client")

    def wake(self) -> None:
        """End a wait in `accept` at once, from another thread."""
        self._waker.send(b"x")

    def close(self) -> None:
        if self._path and os.path.exists(self._path):
            os.unlink(self._path)
        self._selector.close()
        for sock in (self._socket, self._waker, self._woken):
            sock.close()


def _no_client(*_args: object, **_kwargs: object) -> None:
    raise LunaError("use luna_mp.connect: the stock proxies of multiprocessing have no deadline")


managers.listener_client["luna"] = (_Listener, _no_client)  # type: ignore[attr-defined]


class Server(managers.Server):
    """Serves one worker at one address; a daemon thread for each connection, which runs its calls.

    `serve_forever` returns after `stop`. Owns its listener and its connections.
    """

    listener: _Listener
    address: str | tuple[str, int]
    # The stock server lets any peer read a referent, create, count and shut down.
    public: list[str] = []
    fallback_mapping: dict[str, Any] = {}

    def __init__(
        self,
        name: str,
        exposed: Exposed,
        address: str | tuple[str, int],
        authkey: bytes,
        sessions: Sessions,
        max_message: int,
        exporter: Any,
        on_fault: OnFault,
    ) -> None:
        super().__init__({}, address, authkey, "luna")
        self.name = name
        self._key = bytes(authkey)
        self._exposed = exposed
        self._sessions = sessions
        self._max_message = max_message
        self._exporter = exporter
        self._on_fault = on_fault
        self._identity = handshake.identity("", max_message, name)
        self._stop = threading.Event()
        #: connections, until they are closed; and all threads that may not have ended yet
        self._threads: dict[threading.Thread, Stream] = {}
        self._started: list[threading.Thread] = []
        self._busy: set[threading.Thread] = set()
        self._handshakes = 0
        self._idle = threading.Condition()

    def __repr__(self) -> str:
        return f"<Server {self.name} at {self.place}, {len(self._threads)} connections>"

    @property
    def place(self) -> str:
        """The address, as `connect` takes it."""
        return stream.place_of(self.address)

    def serve_forever(self) -> None:
        """Accept until `stop`."""
        while not self._stop.is_set():
            try:
                accepted = self.listener.accept()
            except OSError as exc:
                # Descriptors are used up: those that are open go on, and some will close.
                logger.warning("%r cannot accept: %s", self, exc)
                self._stop.wait(ACCEPT_SECONDS)
                continue
            if accepted is not None:
                self._admit(accepted)
        self.listener.close()

    def admit_nobody(self) -> None:
        """Take no more connections; those that are open end with the call under way."""
        with self._idle:
            if not self._stop.is_set():
                # In this order: from then on the listener may be closed at any time.
                self.listener.wake()
                self._stop.set()

    def stop(self, grace: float) -> bool:
        """Admit nobody more; give running calls `grace` seconds, then close every connection.

        Requests that come meanwhile are turned away. Returns whether all its threads have ended.
        """
        self.admit_nobody()
        with self._idle:
            self._idle.wait_for(lambda: not self._busy, timeout=grace)
            left = [
                (thread in self._busy, open_stream) for thread, open_stream in self._threads.items()
            ]
            started = self._started
        for is_busy, open_stream in left:
            open_stream.wake() if is_busy else open_stream.end_input()
        end = time.monotonic() + THREAD_SECONDS
        for thread in started:
            thread.join(max(end - time.monotonic(), 0.0))
        return not any(thread.is_alive() for thread in started)

    def _admit(self, accepted: Stream) -> None:
        thread = threading.Thread(
            target=self._handle, args=(accepted,), name=f"{self.name} connection", daemon=True
        )
        with self._idle:
            if self._stop.is_set():
                return accepted.close()
            full = len(self._threads) >= MAX_CONNECTIONS or self._handshakes >= MAX_HANDSHAKES
            if not full:
                self._threads[thread] = accepted
                self._handshakes += 1
                full = not self._start(thread)
        if full:
            logger.warning("%r is full: a connection was refused", self)
            handshake.refuse(accepted, f"this service has its {MAX_CONNECTIONS} connections")

    def _start(self, thread: threading.Thread) -> bool:
        """False where the system gives no more threads."""
        try:
            thread.start()
        except RuntimeError as exc:
            logger.warning("%r: %s", self, exc)
            self._handshakes -= 1
            del self._threads[thread]
            return False
        self._started = [*filter(threading.Thread.is_alive, self._started), thread]
        return True

    def _handle(self, accepted: Stream) -> None:
        """Own one connection from the handshake to its end."""
        thread = threading.current_thread()
        try:
            with Channel(accepted, self._max_message) as channel:
                identity = self._authenticate(accepted)
                session = self._sessions.join(identity, accepted.peer)
                try:
                    answerer = probe.Answerer(channel, identity, self._exporter)
                    self._serve(
                        Calls(
                            self.name,
                            self._exposed,
                            channel,
                            session,
                            self._sessions,
                            answerer,
                            self._on_fault,
                        )
                    )
                finally:
                    self._sessions.leave(session)
        except LunaError as exc:
            logger.info("%r: %s", self, exc)
        finally:
            with self._idle:
                # Only now: a request that came since must be seen to be unread, not cut off.
                self._busy.discard(thread)
                self._threads.pop(thread, None)
                self._idle.notify_all()

    def _authenticate(self, accepted: Stream) -> handshake.Identity:
        try:
            return handshake.answer(accepted, self._key, self._identity)
        finally:
            with self._idle:
                self._handshakes -= 1

    @torch.inference_mode()  # for all calls: to enter it takes a good part of what a call does
    def _serve(self, calls: Calls) -> None:
        thread = threading.current_thread()
        while not self._stop.is_set():
            request = calls.next()
            if request is None:
                return
            if not self._begins(thread):
                return calls.turn_away()
            calls.answer(request)
            # Inputs go after the reply left: letting go of CUDA memory waits for the GPU.
            del request
            if not self._stop.is_set():
                self._busy.discard(thread)

    def _begins(self, thread: threading.Thread) -> bool:
        """Note that it is busy, unless this ends; what is noted is given its grace."""
        with self._idle:
            if self._stop.is_set():
                return False
            self._busy.add(thread)
            return True


class Manager(managers.BaseManager):
    """A `BaseManager` whose server is ours; `get_server` is all that a service needs of it."""

    def __init__(
        self,
        name: str,
        exposed: Exposed,
        address: str | tuple[str, int],
        authkey: bytes,
        sessions: Sessions,
        max_message: int,
        exporter: Any = None,
        on_fault: OnFault = lambda fault: None,
    ) -> None:
        """`exporter`: the process's `wire.cuda.Exporter`, where the worker is on a GPU.

        `on_fault` is called on a connection's thread; the process is expected to end soon.
        """
        super().__init__(address, authkey, serializer="luna")
        self._server = partial(
            Server, name, exposed, address, authkey, sessions, max_message, exporter, on_fault
        )

    def get_server(self) -> Server:
        """The server, listening. Raises `LunaError` where the address cannot be had."""
        return self._server()


class LocalManager(Manager):
    """For this user on this machine: a Unix socket in a directory that only the user can enter."""

    def get_server(self) -> Server:
        """Like the base's; a socket file that a killed service left behind is replaced."""
        path = self.address
        if isinstance(path, str) and os.path.exists(path) and not stream.is_answered(path):
            os.unlink(path)
        return super().get_server()


class RemoteManager(Manager):
    """For other hosts: TCP, tensors as bytes beside the message."""
