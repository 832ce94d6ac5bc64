"""Two channels over a real socket pair, for tests that need no process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from luna_mp.deadline import Deadline
from luna_mp.wire.carrier import Carrier
from luna_mp.wire.channel import Channel
from luna_mp.wire.stream import Stream

LIMIT = 1 << 28


def soon() -> Deadline:
    return Deadline(10, "the test")


@contextmanager
def channels(*carriers: type[Carrier], limit: int = LIMIT) -> Iterator[tuple[Channel, Channel]]:
    """Both ends of one connection, using the carriers given."""
    ends = [
        Channel(Stream(sock, name), limit)
        for sock, name in zip(socket.socketpair(), ("left", "right"), strict=True)
    ]
    for end in ends:
        for carrier in carriers:
            end.use(carrier())
    try:
        yield ends[0], ends[1]
    finally:
        for end in ends:
            end.close()


def crossed(left: Channel, right: Channel, value: Any) -> Any:
    """What arrives on the right of what is sent on the left."""
    sender = threading.Thread(target=left.send, args=({"value": value}, soon()))
    sender.start()
    try:
        return right.recv(soon())["value"]
    finally:
        sender.join()
