"""Messages over one connection: a header, the pickled part, then whatever carriers put beside it.

    | pickled bytes: u32 | inline bytes: u64 | pickled part … | inline part … |

Descriptors of new shared segments travel with the header.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch

from luna_mp.deadline import Deadline
from luna_mp.errors import Rejected
from luna_mp.wire import codec
from luna_mp.wire.carrier import Carrier, Fence, Incoming, NoRoom, Outgoing, Token
from luna_mp.wire.inline import InlineCarrier
from luna_mp.wire.stream import Stream

__all__ = ("Channel",)

logger = logging.getLogger(__name__)

HEADER = struct.Struct("!IQ")
MAX_PICKLED = 64 << 20  # bytes; a prompt of ten thousand words takes a tenth of one MiB
INLINE_BELOW = 32 << 10  # bytes; smaller tensors cost less beside the message than in a segment
MESSAGE_SECONDS = 60.0  # for a message to arrive once its first byte has


class Channel:
    """Owns a stream and its carriers. One thread at a time; closed after any half-done message."""

    def __init__(self, stream: Stream, max_message: int) -> None:
        self.stream = stream
        self.max_message = max_message
        self._inline = InlineCarrier()
        self._carriers: dict[str, Carrier] = {"inline": self._inline}
        # The fastest first; inline, which takes everything, is the last resort.
        self._order: list[Carrier] = []

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
        self._order = [carrier for carrier in self._order if carrier.name != name]

    def settle(self, after: Fence | None) -> None:
        """What was received is in use until the work behind `after` is done."""
        for carrier in self._order:
            carrier.settle(after)

    def send(
        self,
        message: Mapping[str, Any],
        deadline: Deadline,
        after: Fence | None = None,
        to_host: bool = False,
    ) -> None:
        """Send one message. `Unsendable` and `Rejected` leave the channel as it was.

        `after`: the event behind the work that makes the tensors; `to_host`: none stays on a GPU.
        """
        out = Outgoing(after=after, to_host=to_host)
        try:
            pickled = codec.dumps(message, lambda tensor: self._pack(tensor, out))
            inline = sum(part.nbytes for part in out.parts)
            self._check_size(pickled.nbytes, inline)
        except BaseException:
            for undo in reversed(out.undo):
                undo()
            raise
        header = HEADER.pack(pickled.nbytes, inline)
        self.stream.send([header, pickled, *out.parts], deadline, out.fds)

    def recv(self, deadline: Deadline) -> dict[str, Any]:
        """Receive one message; `deadline` is for its beginning. Close the channel on any error."""
        header = self.stream.recv_header(HEADER.size, deadline)
        pickled_size, inline_size = HEADER.unpack(header)
        self._check_size(pickled_size, inline_size)
        arrival = Deadline(MESSAGE_SECONDS, f"the rest of a message from {self.stream.peer}")
        pickled = bytearray(pickled_size)
        self.stream.recv_into(pickled, arrival)
        body = _Body(self.stream, inline_size, arrival)
        fds = self.stream.take_fds()
        source = Incoming(body.read_into, lambda: _next_fd(fds), self.max_message)
        try:
            message = codec.loads(pickled, lambda token: self._unpack(token, source))
        finally:
            for fd in fds:
                os.close(fd)
        if body.left or not isinstance(message, dict):
            raise Rejected(f"a message from {self.stream.peer} is malformed")
        return message

    def close(self) -> None:
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
            raise Rejected(f"a tensor came by a carrier that was not agreed on: {token!r:.200}")
        return self._carriers[token[0]].unpack(token[1:], source)

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


class _Body:
    """The inline part of one message, read piece by piece straight into its tensors."""

    def __init__(self, stream: Stream, size: int, deadline: Deadline) -> None:
        self._stream = stream
        self._deadline = deadline
        self.left = size

    def read_into(self, target: memoryview) -> None:
        if target.nbytes > self.left:
            raise Rejected(f"a tensor of {target.nbytes} bytes, but only {self.left} bytes follow")
        self.left -= target.nbytes
        self._stream.recv_into(target, self._deadline)


def _next_fd(fds: list[int]) -> int:
    if not fds:
        raise Rejected("a shared segment came without its descriptor")
    return fds.pop(0)
