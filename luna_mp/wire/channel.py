"""Messages over one connection: a header, the pickled part, then whatever carriers put beside it.

    | pickled bytes: u32 | inline bytes: u64 | pickled part … | inline part … |

Descriptors of new shared segments travel with the header.
"""

from __future__ import annotations

import logging
import os
import reprlib
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple

import torch

from luna_mp.deadline import Deadline, Patience, nap
from luna_mp.errors import Broken, Rejected, TimedOut
from luna_mp.wire import codec
from luna_mp.wire.carrier import Carrier, Fence, Incoming, NoRoom, Outgoing, Token, take_back
from luna_mp.wire.inline import InlineCarrier
from luna_mp.wire.stream import CLIENT_SPIN, NeverRead, Stream

__all__ = ("Channel", "Packed")

logger = logging.getLogger(__name__)

HEADER = struct.Struct("!IQ")
MAX_PICKLED = 64 << 20  # bytes; a prompt of ten thousand words takes a tenth of one MiB
INLINE_BELOW = 32 << 10  # bytes; smaller tensors cost less beside the message than in a segment
AT_ONCE = 4 << 10  # bytes; so many a Unix socket takes whole or not at all, however small it is
TURNED_AWAY = "turned away"  # the one key of a message that stands for a closed connection
SKIPPED_AT_ONCE = 1 << 20  # bytes of a message that is refused
MESSAGE_SECONDS = 60.0  # for more of a message to arrive once its first byte has


class Channel:
    """Owns a stream and its carriers. One thread at a time; closed after any half-done message."""

    def __init__(self, stream: Stream, max_message: int) -> None:
        self.stream = stream
        self.max_message = max_message
        self._writer = codec.Writer()
        self._inline = InlineCarrier()
        self._carriers: dict[str, Carrier] = {"inline": self._inline}
        # The fastest first; inline, which takes everything, is the last resort.
        self._order: list[Carrier] = []
        #: what gives back what carriers took for the last message, should it never be read
        self._sent: list[Callable[[], None]] = []
        self._refused: _Body | None = None
        self._more = f"more of a message from {stream.peer}"

    def __repr__(self) -> str:
        return f"<Channel {self.stream!r} by {self.carrier}>"

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def carrier(self) -> str:
        """Name of the fastest carrier in use; small tensors of the host go inline all the same."""
        return self._order[0].name if self._order else "inline"

    def use(self, carrier: Carrier) -> None:
        """Prefer `carrier` from now on, and understand what comes by it."""
        self._carriers[carrier.name] = carrier
        self._order.insert(0, carrier)

    def demote(self, name: str) -> None:
        """Send no more by that carrier; what is still under way by it is understood."""
        for carrier in [each for each in self._order if each.name == name]:
            self._order.remove(carrier)
            carrier.give_up()

    def settle(self, after: Fence | None) -> None:
        """What was received is in use until the work behind `after` is done."""
        for carrier in self._order:
            carrier.settle(after)

    def pack(
        self, message: Mapping[str, Any], is_leaving: bool = False, to_host: bool = False
    ) -> Packed:
        """Make one message ready. `Unsendable` and `Rejected` leave the channel as it was.

        Tensors of a GPU are sent as they will be when the work queued so far is done; that is
        waited for here if the message `is_leaving`, else when it is completed. Those of the host
        may be read until an `is_leaving` message is sent. `to_host`: the peer wants them in the
        memory of the host.
        """
        out = Outgoing(is_leaving, to_host)
        try:
            pickled = self._writer.dumps(message, lambda tensor: self._pack(tensor, out))
            sizes = (len(pickled), sum([part.nbytes for part in out.parts]))
            self._check_size(*sizes)
        except BaseException:  # also an interrupt leaves nothing taken
            out.take_back()
            raise
        return Packed(message, HEADER.pack(*sizes) + pickled, out)

    def send_at_once(self, packed: Packed, deadline: Deadline) -> bool:
        """Send a message if it can leave now, with nothing to wait for or to settle first."""
        out = packed.out
        # Of what a socket takes a part of only, the rest would be waited for in the turn.
        is_small = self.stream.is_local and len(packed.data) <= AT_ONCE
        if not is_small or out.before or out.parts or out.fds:
            return False
        if any(carrier.is_in_use for carrier in self._order):
            return False
        return self._send(packed, deadline, at_once=True)

    def send_packed(self, packed: Packed, deadline: Deadline) -> None:
        """Send a completed message; it is sent, or never, before the next is packed."""
        self._send(packed, deadline)

    def _send(self, packed: Packed, deadline: Deadline, at_once: bool = False) -> bool:
        out = packed.out
        try:
            if out.late:
                self.stream.send([packed.data], deadline, out.fds)
                for step in out.late:
                    step()
                self.stream.send(out.parts, deadline)
            elif out.parts or out.fds or not self.stream.send_at_once(packed.data, deadline):
                if at_once:
                    return False
                self.stream.send([packed.data, *out.parts], deadline, out.fds)
        except BaseException:  # also an interrupt leaves nothing taken
            out.take_back()
            raise
        self._sent = out.undo
        return True

    def send(self, message: Mapping[str, Any], deadline: Deadline) -> None:
        """Pack, complete and send one message."""
        packed = self.pack(message, is_leaving=True)
        packed.complete()
        self._send(packed, deadline)

    def turn_away(self, why: str, deadline: Deadline) -> None:
        """Tell the peer that its message is as good as never read; its `recv` says `NeverRead`."""
        self.send({TURNED_AWAY: why}, deadline)

    def recv(self, deadline: Deadline, to_host: bool = False) -> dict[str, Any]:
        """Receive one message, with its tensors in the memory of the host if `to_host`.

        `deadline` is for all of it, and for work of a GPU that its tensors come from. Close the
        channel on any error.
        """
        try:
            header = self.stream.recv_header(HEADER.size, deadline)
        except NeverRead:
            take_back(self._sent)
            raise
        pickled_size, inline_size = HEADER.unpack(header)
        self._check_size(pickled_size, inline_size)
        arrival = deadline
        if pickled_size + inline_size > self.stream.ahead:
            arrival = Patience(MESSAGE_SECONDS, self._more, deadline.pause)
        pickled = self.stream.read(pickled_size, arrival)
        body = _Body(self.stream, inline_size, deadline, arrival, self.max_message, to_host)
        try:
            message = codec.loads(pickled, lambda token: self._unpack(token, body), self._discard)
        except _Withdrawn as withdrawn:
            raise withdrawn.taken() from None
        except Rejected:
            self._refused = body
            raise
        finally:
            body.close()
        if body.left or not isinstance(message, dict):
            raise Rejected(f"a message from {self.stream.peer} is malformed")
        if TURNED_AWAY in message:
            raise NeverRead(f"{self.stream.peer}: {message[TURNED_AWAY]}")
        return message

    def skip(self) -> None:
        """Take the rest of a message that `recv` refused: who still sends it reads no answer."""
        if self._refused is not None:
            # The refusal is what there is to tell, if to anybody.
            with suppress(Broken, TimedOut):
                self._refused.skip()

    def close(self) -> None:
        self._sent = []
        for carrier in self._carriers.values():
            carrier.close()
        self.stream.close()

    def _pack(self, tensor: torch.Tensor, out: Outgoing) -> Token:
        is_small = tensor.numel() * tensor.itemsize < INLINE_BELOW and not tensor.is_cuda
        for carrier in () if is_small else self._order:
            try:
                return (carrier.name, *carrier.pack(tensor, out))
            except NoRoom as exc:
                logger.debug("%s: %s", carrier.name, exc)
        return ("inline", *self._inline.pack(tensor, out))

    def _unpack(self, token: Any, source: Incoming) -> torch.Tensor:
        if not (isinstance(token, tuple) and token and token[0] in self._carriers):
            raise Rejected(
                f"a tensor came by a carrier that was not agreed on: {reprlib.repr(token)}"
            )
        return self._carriers[token[0]].unpack(token[1:], source)

    def _discard(self, token: Any) -> None:
        self._carriers[token[0]].discard(token[1:])

    def _check_size(self, pickled: int, inline: int) -> None:
        if pickled > MAX_PICKLED:
            raise Rejected(
                f"a message has {pickled} bytes besides its tensors; the limit is {MAX_PICKLED}"
            )
        if inline > self.max_message:
            raise Rejected(
                f"a message has {inline} bytes of tensors; the limit is {self.max_message} "
                "(max_message): send fewer images or frames at a time"
            )


class _Withdrawn(BaseException):
    """Raised from the caller's own error past all that would take that for one of a tensor."""

    def taken(self) -> BaseException:
        """That error, once: two that hold each other would keep all that either has passed."""
        why, self.__cause__ = self.__cause__, None
        assert why is not None, "it was taken before"
        return why


class Packed(NamedTuple):
    """A message that can be sent once it is complete."""

    message: Mapping[str, Any]
    #: the header and the pickled part
    data: bytes
    out: Outgoing

    def complete(self) -> None:
        """Wait for what is still on its way into it, such as copies off a GPU."""
        try:
            for step in self.out.before:
                step()
        except BaseException:  # also an interrupt leaves nothing taken
            self.out.take_back()
            raise


class _Body:
    """What came with one message; its inline part is read piece by piece straight into tensors."""

    __slots__ = ("_arrival", "_deadline", "_fds", "_here", "_stream", "left", "limit", "to_host")

    def __init__(
        self,
        stream: Stream,
        size: int,
        deadline: Deadline,
        arrival: Deadline,
        limit: int,
        to_host: bool,
    ) -> None:
        """`deadline` is for the peer's GPU, `arrival` for the `size` bytes of the inline part."""
        self.left = size
        self.limit = limit
        self.to_host = to_host
        self._stream = stream
        self._deadline = deadline
        self._arrival = arrival
        self._here = memoryview(b"")
        self._fds = stream.take_fds()

    def read_into(self, target: memoryview, is_soon: bool = False) -> None:
        size = target.nbytes
        if size > self.left:
            raise Rejected(f"a tensor of {size} bytes, but only {self.left} bytes follow")
        self.left -= size
        if self._here:
            target[:], self._here = self._here[:size], self._here[size:]
        else:
            self._stream.recv_into(target, self._arrival, is_soon)

    def skip(self) -> None:
        """Read all that is left, and keep nothing of it."""
        space = memoryview(bytearray(min(self.left, SKIPPED_AT_ONCE)))
        while self.left:
            self.read_into(space[: self.left])

    def take_fd(self) -> int:
        if not self._fds:
            raise Rejected("a shared segment came without its descriptor")
        return self._fds.pop(0)

    def wait(self, is_done: Callable[[], bool]) -> None:
        if is_done():
            return
        if self.left and not self._here:
            # With all of it here the peer's next word can only be that its GPU failed.
            self._here = memoryview(self._stream.read(self.left, self._arrival))
        start = time.perf_counter()
        while not is_done():
            self._ask()
            if self._stream.is_readable(0.0) and not is_done():
                raise Broken(f"{self._stream.peer} ended before its GPU was done")
            if (waited := time.perf_counter() - start) > CLIENT_SPIN:
                nap(waited)

    def _ask(self) -> None:
        """Whether the wait is still wanted. What the caller's own check raises stays what it is."""
        try:
            self._deadline.pause()
        except TimedOut:
            raise
        except BaseException as exc:
            raise _Withdrawn from exc

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
