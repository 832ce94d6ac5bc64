"""Bytes over one socket, each operation under a deadline. OS errors are translated here only."""

from __future__ import annotations

import array
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from luna_mp.deadline import Deadline
from luna_mp.errors import Broken, LunaError, Unavailable

__all__ = ("Stream", "connect", "listen")

MAX_FDS = 16  # descriptors that one header may bring
BACKLOG = 128
KEEPALIVE_IDLE = 30  # seconds of silence after which TCP asks whether the peer is still there
CONNECT_RETRY = 0.01  # seconds; Linux answers EAGAIN while the backlog of a Unix socket is full

Buffer = bytes | bytearray | memoryview


@contextmanager
def _translated(peer: str, deadline: Deadline) -> Iterator[None]:
    """The one table from what the OS raises to what a caller can act on."""
    try:
        yield
    except TimeoutError as exc:
        raise deadline.error() from exc
    except (FileNotFoundError, ConnectionRefusedError) as exc:
        raise Unavailable(f"no service answers at {peer} ({exc.strerror})") from exc
    except PermissionError as exc:
        raise Unavailable(f"{peer} may not be opened by this user ({exc.strerror})") from exc
    except EOFError as exc:
        raise Broken(f"{peer} closed the connection") from exc
    except OSError as exc:
        raise Broken(f"the connection to {peer} broke: {exc.strerror or exc}") from exc


class Stream:
    """Owns one connected socket. Not for two threads at once.

    After any error other than a time limit before the first byte, the two ends no longer agree on
    where a message starts: close it.
    """

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self._sock = sock
        self.peer = peer
        self.is_local = sock.family == getattr(socket, "AF_UNIX", None)
        self._fds: list[int] = []
        if not self.is_local:
            # Without it Nagle's algorithm holds each small reply for 40 ms.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_KEEPIDLE"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)

    def __repr__(self) -> str:
        state = "closed" if self._sock.fileno() < 0 else "open"
        return f"<Stream {self.peer} {state}>"

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, parts: Sequence[Buffer], deadline: Deadline, fds: Sequence[int] = ()) -> None:
        """Send all parts in order; `fds` travel with the first byte (Unix sockets only)."""
        views = [view for part in parts if (view := memoryview(part).cast("B")).nbytes]
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _packed(fds))] if fds else []
        with _translated(self.peer, deadline):
            while views:
                self._sock.settimeout(deadline.remaining())
                if hasattr(self._sock, "sendmsg"):
                    sent = self._sock.sendmsg(views[:64], ancillary)
                else:
                    sent = self._sock.send(views[0])
                ancillary = []
                while views and sent >= views[0].nbytes:
                    sent -= views.pop(0).nbytes
                if sent:
                    views[0] = views[0][sent:]

    def recv_into(self, target: Buffer, deadline: Deadline) -> None:
        """Fill `target`; raises `Broken` when the peer closes first."""
        view = memoryview(target).cast("B")
        with _translated(self.peer, deadline):
            while view.nbytes:
                self._sock.settimeout(deadline.remaining())
                got = self._sock.recv_into(view)
                if not got:
                    raise EOFError
                view = view[got:]

    def recv_header(self, size: int, deadline: Deadline) -> bytes:
        """Read the `size` bytes that open a message, and keep the descriptors that come along."""
        header = bytearray()
        with _translated(self.peer, deadline):
            while len(header) < size:
                self._sock.settimeout(deadline.remaining())
                got = self._recv_with_fds(size - len(header))
                if not got:
                    raise EOFError
                header += got
        return bytes(header)

    def _recv_with_fds(self, size: int) -> bytes:
        if not self.is_local:
            return self._sock.recv(size)
        data, fds, flags, _ = socket.recv_fds(self._sock, size, MAX_FDS)
        self._fds += fds
        if flags & socket.MSG_CTRUNC:
            raise OSError(f"more than {MAX_FDS} descriptors came with one message")
        return data

    def take_fds(self) -> list[int]:
        """Descriptors that came since the last call; the caller owns and closes them."""
        fds, self._fds = self._fds, []
        return fds

    @property
    def peer_has_gone(self) -> bool:
        """True once the peer has closed; also true of bytes that nobody asked for."""
        if self._sock.fileno() < 0:
            return True
        try:
            self._sock.settimeout(0)
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def wake(self) -> None:
        """End, from another thread, whatever the owner waits for on this stream."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is closed or was never connected, so nobody waits on it

    def close(self) -> None:
        for fd in self.take_fds():
            os.close(fd)
        self._sock.close()


def _packed(fds: Sequence[int]) -> bytes:
    return array.array("i", fds).tobytes()


def connect(address: str | tuple[str, int], deadline: Deadline) -> Stream:
    """Connect to a Unix socket's path or to (host, port); raises `Unavailable`."""
    peer = address if isinstance(address, str) else f"{address[0]}:{address[1]}"
    with _translated(peer, deadline):
        if not isinstance(address, str):
            return Stream(socket.create_connection(address, deadline.remaining()), peer)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _connect_unix(sock, address, deadline)
        except BaseException:
            sock.close()
            raise
        return Stream(sock, peer)


def _connect_unix(sock: socket.socket, path: str, deadline: Deadline) -> None:
    while True:
        sock.settimeout(deadline.remaining())
        try:
            return sock.connect(path)
        except BlockingIOError:
            time.sleep(min(CONNECT_RETRY, deadline.remaining()))


def listen(address: str | tuple[str, int]) -> socket.socket:
    """Listen on a Unix socket's path (0600) or on (host, port); raises `LunaError`."""
    try:
        if isinstance(address, str):
            return _listen_unix(address)
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        return socket.create_server(address, family=family, backlog=BACKLOG)
    except OSError as exc:
        where = address if isinstance(address, str) else f"{address[0]}:{address[1]}"
        raise LunaError(f"cannot listen at {where}: {exc.strerror or exc}") from exc


def _listen_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
        os.chmod(path, 0o600)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock
