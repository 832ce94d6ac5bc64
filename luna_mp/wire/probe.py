"""A real round trip decides the carrier of a connection.

    client → service   {"prepare": name}
    client → service   {"probe": name, "tensor": random bytes, by that carrier}
    service → client   {"tensor": the same bytes inverted, by that carrier}
    client → service   {"use": name or "inline", "reason": why not the faster one}

What fails leaves the connection on `inline`, with the reason kept for people to read.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from luna_mp.deadline import Deadline
from luna_mp.errors import Rejected
from luna_mp.wire import shm
from luna_mp.wire.carrier import Carrier
from luna_mp.wire.channel import INLINE_BELOW, Channel

__all__ = ("answer", "choose")

logger = logging.getLogger(__name__)

PROBE_BYTES = INLINE_BELOW  # just enough not to be sent inline for being small
SECONDS = 5.0


def choose(channel: Channel) -> str:
    """Agree with the service on the fastest carrier that works; returns why not a faster one."""
    reason = "" if channel.stream.is_local else "the service is reached over TCP"
    if not reason and not shm.is_supported():
        reason = "shm: this system has neither memfd nor named sections"
    if not reason:
        reason = _try(channel, shm.ShmCarrier())
    deadline = Deadline(SECONDS, f"agreeing on a carrier with {channel.stream.peer}")
    channel.send({"use": channel.carrier, "reason": reason}, deadline)
    channel.recv(deadline)
    return reason


def _try(channel: Channel, carrier: Carrier) -> str:
    """Probe a carrier and use it; on failure demote and return the reason."""
    deadline = Deadline(SECONDS, f"the probe of {carrier.name}")
    sent = torch.randint(0, 256, (PROBE_BYTES,), dtype=torch.uint8)
    channel.send({"prepare": carrier.name}, deadline)
    problem = str(channel.recv(deadline).get("error", ""))
    if not problem:
        channel.use(carrier)
        channel.send({"probe": carrier.name, "tensor": sent}, deadline)
        reply = channel.recv(deadline)
        if "error" in reply:
            problem = str(reply["error"])
        elif not torch.equal(reply["tensor"], ~sent):
            problem = "other bytes came back than were sent"
    if problem:
        channel.demote()
        logger.info("%s: %s does not work: %s", channel.stream.peer, carrier.name, problem)
        return f"{carrier.name}: {problem}"
    return ""


def answer(channel: Channel, request: dict[str, Any], pin: bool) -> dict[str, Any]:
    """The service's reply to a message that is no call; `pin`: shared memory for CUDA copies."""
    match request:
        case {"prepare": "shm"} if channel.stream.is_local:
            channel.use(shm.ShmCarrier(pin))
        case {"probe": str(), "tensor": torch.Tensor() as tensor}:
            return {"tensor": ~tensor}
        case {"use": str(name), "reason": str()}:
            if name == "inline":
                channel.demote()
        case _:
            raise Rejected(f"a message is neither call nor probe: {sorted(map(str, request))}")
    return {}
