"""Bytes over one socket, each operation under a deadline. OS errors are translated here only."""

from __future__ import annotations

import array
import errno
import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from luna_mp.deadline import Deadline, nap
from luna_mp.errors import Broken, LunaError, TimedOut, Unavailable

__all__ = ("Buffer", "NeverRead", "Stream", "connect", "is_answered", "listen", "place_of")

MAX_FDS = 16  # descriptors that one header may bring
BACKLOG = 128
KEEPALIVE_IDLE = 30  # seconds of silence after which TCP asks whether the peer is still there
ASK_SECONDS = 1.0  # to see who listens
CONNECT_RETRY = 0.01  # seconds; Linux answers EAGAIN while the backlog of a Unix socket is full

# A sleeping thread takes some 50 µs to wake, on virtual machines more; what comes soon is awaited
# awake. Longer than this nobody spins: a client for its answer, a service for the next request,
# shorter since it has other threads to run.
CLIENT_SPIN = 1e-3  # seconds; a cached encoding is there by then
CLIENT_DOZE = 1.0  # seconds after that, of naps, from which a thread wakes sooner than from poll
SERVICE_SPIN = 500e-6  # a client that calls in a row is back by then
READ_AHEAD = 8192  # bytes; more than a message without tensors has
MAX_PARTS = 64  # of one system call
REFUSED = (errno.EPIPE, errno.ECONNRESET)
FDS_SPACE = socket.CMSG_SPACE(MAX_FDS * 4) if hasattr(socket, "CMSG_SPACE") else 0
TRUNCATED = int(getattr(socket, "MSG_CTRUNC", 0))

Buffer = bytes | bytearray | memoryview


class NeverRead(Broken):
    """Raised when the peer ended with what was sent still unread: to send it again is safe."""


def _translated(exc: OSError, peer: str, deadline: Deadline) -> LunaError:
    """The one table from what the OS raises to what a caller can act on."""
    match exc:
        case TimeoutError():
            return deadline.error()
        case FileNotFoundError() | ConnectionRefusedError():
            return Unavailable(f"no service answers at {peer} ({exc.strerror})")
        case PermissionError():
            return Unavailable(f"{peer} may not be opened by this user ({exc.strerror})")
        case ConnectionResetError() | BrokenPipeError():
            return NeverRead(
                f"{peer} ended, or gave up, before it read the message ({exc.strerror})"
            )
    return Broken(f"the connection to {peer} broke: {exc.strerror or exc}")


class Stream:
    """Owns one connected socket. Not for two threads at once.

    After any error other than a time limit before the first byte, the two ends no longer agree on
    where a message starts: close it.
    """

    def __init__(
        self, sock: socket.socket, peer: str, spin: float = SERVICE_SPIN, doze: float = 0.0
    ) -> None:
        self._sock = sock
        self._spin = spin
        self._doze = doze
        #: done over and over by a thread that waits for a header: a matter of microseconds
        self.meanwhile: Callable[[], object] | None = None
        self.peer = peer
        self.is_local = sock.family == getattr(socket, "AF_UNIX", None)
        self._fds: list[int] = []
        self._error: OSError | None = None
        sock.setblocking(False)
        # One read brings a small message whole; what it brings of the rest waits here.
        self._buffer = memoryview(bytearray(READ_AHEAD))
        self._ahead = self._buffer[:0]
        self._poll = select.poll() if hasattr(select, "poll") else None
        # Of its own, since each call asks twice whether there is something to read.
        self._poll_input = select.poll() if hasattr(select, "poll") else None
        for poll in (self._poll, self._poll_input):
            if poll is not None:
                poll.register(sock, select.POLLIN)
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
        """Send all parts, of bytes, in order; `fds` travel with the first (Unix sockets only)."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        left = list(parts)
        while left:
            sent = self._wait_for(self._send, (left, ancillary), deadline)
            deadline.progress()
            ancillary = []
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = memoryview(left[0])[sent:]

    def send_at_once(self, data: bytes, deadline: Deadline) -> bool:
        """Send it if the socket takes it now; `deadline` is for the rest where it takes a part."""
        try:
            sent = self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as exc:
            raise _translated(exc, self.peer, deadline) from exc
        if sent < len(data):
            self.send([memoryview(data)[sent:]], deadline)
        return True

    def read(self, size: int, deadline: Deadline) -> Buffer:
        """So many bytes, valid until the next header is read; raises `Broken` as `recv_into`."""
        if size <= len(self._ahead):
            here, self._ahead = self._ahead[:size], self._ahead[size:]
            return here
        target = bytearray(size)
        self.recv_into(target, deadline)
        return target

    def recv_into(
        self, target: bytearray | memoryview, deadline: Deadline, is_soon: bool = False
    ) -> None:
        """Fill it, at first awake if more `is_soon` there; raises `Broken` if the peer closes."""
        view = memoryview(target)
        ahead = min(len(self._ahead), view.nbytes)
        if ahead:
            view[:ahead] = self._ahead[:ahead]
            self._ahead = self._ahead[ahead:]
            view = view[ahead:]
        spin = self._spin if is_soon else 0.0
        while view.nbytes:
            try:
                view = view[self._wait_for(self._sock.recv_into, (view,), deadline, spin) :]
            except NeverRead as exc:
                raise self._cut_off() from exc
            deadline.progress()

    def recv_header(self, size: int, deadline: Deadline) -> memoryview:
        """Read the `size` bytes that open a message, and keep the descriptors that come along.

        They are valid until the next header is read.
        """
        if self._error is not None:
            raise _translated(self._error, self.peer, deadline) from self._error
        if have := len(self._ahead):
            self._buffer[:have] = bytes(self._ahead)
        while have < size:
            try:
                have += self._wait_for(
                    self._recv_with_fds, (self._buffer[have:],), deadline, self._spin, self._doze
                )
            except Broken as exc:
                if have:
                    raise self._cut_off() from exc
                # By TCP, what is sent to a peer that has just closed is refused after its end came.
                if self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) in REFUSED:
                    raise NeverRead(f"{self.peer} had closed before the message came") from exc
                raise
        self._ahead = self._buffer[size:have]
        return self._buffer[:size]

    def _cut_off(self) -> Broken:
        return Broken(f"{self.peer} ended in the middle of a message")

    def _wait_for(
        self,
        operation: Callable[..., int],
        arguments: tuple[Any, ...],
        deadline: Deadline,
        spin: float = 0.0,
        doze: float = 0.0,
    ) -> int:
        """Do it, within the deadline; zero bytes mean that the peer has closed."""
        start = time.perf_counter() if spin else 0.0
        while True:
            try:
                count = operation(*arguments)
            except (BlockingIOError, InterruptedError):
                waited = time.perf_counter() - start
                if spin and self.meanwhile is not None:
                    self.meanwhile()
                if spin and waited < spin:
                    continue
                if waited < spin + doze:
                    deadline.pause()
                    nap(waited)
                else:
                    self._block(is_sending=operation == self._send, deadline=deadline)
                continue
            except OSError as exc:
                raise _translated(exc, self.peer, deadline) from exc
            if not count:
                raise Broken(f"{self.peer} closed the connection")
            return count

    def _block(self, is_sending: bool, deadline: Deadline) -> None:
        """Sleep until the socket is ready, or for a while. Raises `TimedOut`."""
        left = deadline.pause()
        if self._poll is not None:
            self._poll.modify(self._sock, select.POLLOUT if is_sending else select.POLLIN)
            self._poll.poll(1e3 * left)
        else:
            mine = [self._sock]
            select.select([] if is_sending else mine, mine if is_sending else [], [], left)

    def _send(self, parts: list[Buffer], ancillary: list[tuple[int, int, Any]]) -> int:
        if len(parts) == 1 and not ancillary or not hasattr(self._sock, "sendmsg"):
            return self._sock.send(parts[0])
        return self._sock.sendmsg(parts[:MAX_PARTS], ancillary)

    def _recv_with_fds(self, view: memoryview) -> int:
        if not self.is_local:
            return self._sock.recv_into(view)
        count, ancillary, flags, _ = self._sock.recvmsg_into([view], FDS_SPACE)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self._fds += fds
        if flags & TRUNCATED:
            raise OSError(f"more than {MAX_FDS} descriptors came with one message")
        return count

    @property
    def ahead(self) -> int:
        """Bytes that have come already, and are read without a wait."""
        return len(self._ahead)

    def take_fds(self) -> list[int]:
        """Descriptors that came since the last call; the caller owns and closes them."""
        fds, self._fds = self._fds, []
        return fds

    @property
    def peer_has_gone(self) -> bool:
        """True once the peer has closed; also true of bytes that nobody asked for."""
        return self.is_readable(0.0)

    def is_readable(self, seconds: float) -> bool:
        """Wait so long for bytes, or for the peer to close; whether there is either."""
        if self._sock.fileno() < 0 or self._ahead:
            return True
        if self._poll_input is not None:
            return bool(self._poll_input.poll(1e3 * seconds))
        return bool(select.select([self._sock], [], [], seconds)[0])

    def has_closed_within(self, seconds: float) -> bool:
        """Wait so long for the peer to close, whatever it sent before."""
        hang_up = getattr(select, "POLLRDHUP", 0)
        if not hang_up or self._poll is None:
            return self.is_readable(seconds) and self.has_closed
        self._poll.modify(self._sock, hang_up)
        return bool(self._poll.poll(1e3 * seconds))

    @property
    def has_closed(self) -> bool:
        """True once the peer has closed and nothing that it sent is left to be read."""
        if self._sock.fileno() < 0:
            return True
        try:
            return not self._ahead and not self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError as exc:
            # The system tells it once; the next read is to tell it too. A fresh one: what the
            # frames hold that this came through would be held for as long as it.
            self._error = type(exc)(*exc.args)
            return True

    def wake(self) -> None:
        """End, from another thread, whatever the owner waits for on this stream."""
        self._shut(socket.SHUT_RDWR)

    def end_input(self) -> None:
        """Likewise, but what has come can still be read, and be answered."""
        self._shut(socket.SHUT_RD)

    def _shut(self, how: int) -> None:
        try:
            self._sock.shutdown(how)
        except OSError:
            pass  # it is closed or was never connected, so nobody waits on it

    def close(self) -> None:
        for fd in self.take_fds():
            os.close(fd)
        self._sock.close()


def place_of(address: str | tuple[str, int]) -> str:
    """A Unix socket's path, or (host, port), as people read and type it."""
    if isinstance(address, str):
        return address
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def connect(address: str | tuple[str, int], deadline: Deadline) -> Stream:
    """Connect to a Unix socket's path or to (host, port); raises `Unavailable`."""
    peer = place_of(address)
    try:
        if isinstance(address, str):
            sock = _connect_unix(address, deadline)
        else:
            sock = socket.create_connection(address, deadline.remaining())
        return Stream(sock, peer, CLIENT_SPIN, CLIENT_DOZE)
    except OSError as exc:
        raise _unreachable(exc, peer, deadline) from exc


def is_answered(path: str) -> bool:
    """Whether anybody listens on a Unix socket's path, which a killed service leaves behind."""
    try:
        connect(path, Deadline(ASK_SECONDS, f"asking who is at {path}")).close()
    except Unavailable:
        return False
    except TimedOut:
        pass  # who listens has more in line than it accepts
    return True


def _unreachable(exc: OSError, peer: str, deadline: Deadline) -> LunaError:
    error = _translated(exc, peer, deadline)
    if type(error) is Broken:
        # Nothing broke: there is no such host, or no way to it.
        return Unavailable(f"{peer} cannot be reached ({exc.strerror or exc})")
    return error


def _connect_unix(path: str, deadline: Deadline) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        while True:
            sock.settimeout(deadline.remaining())
            try:
                sock.connect(path)
                return sock
            except BlockingIOError:
                time.sleep(min(CONNECT_RETRY, deadline.remaining()))
    except BaseException:
        sock.close()
        raise


def listen(address: str | tuple[str, int]) -> socket.socket:
    """Listen on a Unix socket's path (0600) or on (host, port); raises `LunaError`."""
    try:
        if isinstance(address, str):
            return _listen_unix(address)
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        return socket.create_server(address, family=family, backlog=BACKLOG)
    except OSError as exc:
        remedy = ""
        if exc.errno == errno.EADDRINUSE:
            remedy = (
                "; if a service runs already (`luna-mp status`), use that, or name another port"
            )
        raise LunaError(
            f"cannot listen at {place_of(address)}: {exc.strerror or exc}{remedy}"
        ) from exc


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
