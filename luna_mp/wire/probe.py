"""A real round trip decides the carrier of a connection. The client leads:

    {"prepare": name, …}                       the service makes its end of the carrier
    {"probe": name, "tensor": random bytes}    by that carrier; the answer brings them inverted
    {"use": name, "reason": why not faster}    what was agreed on

and for `cuda`, where tensors start at the service:

    {"prepare": "cuda", "gpus": UUIDs}         the answer brings random bytes, on the GPU
    {"confirm": what the client read there, "tensor": the same tensor, inverted on the GPU}

What fails leaves the connection on the next slower carrier, with the reason kept for people.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from luna_mp.deadline import Deadline
from luna_mp.errors import LunaError, Rejected
from luna_mp.wire import shm
from luna_mp.wire.carrier import Carrier, CarrierFailed
from luna_mp.wire.channel import INLINE_BELOW, Channel
from luna_mp.wire.handshake import Identity
from luna_mp.wire.leases import Owner

__all__ = ("Answerer", "choose")

logger = logging.getLogger(__name__)

PROBE_BYTES = INLINE_BELOW  # just enough not to be sent inline for being small
SECONDS = 10.0  # the first time a process opens the GPU takes some


def choose(channel: Channel, service: Identity, wants_gpu: bool = False, avoided: str = "") -> str:
    """Agree with the service on the fastest carrier that works; returns why not a faster one.

    `wants_gpu`: this process has a GPU and may use it; `avoided`: why `cuda` is not to be tried.
    """
    reason = "" if channel.stream.is_local else "the service is reached over TCP"
    if not reason and not shm.is_supported():
        reason = "shm: this system has neither memfd nor named sections"
    if not reason:
        reason = _try_shm(channel, pin=wants_gpu)
    if not reason and wants_gpu:
        reason = avoided or _try_cuda(channel, Owner(service.pid, service.created))
    _ask(channel, {"use": channel.carrier, "reason": reason})
    if reason:
        logger.debug("%s: %s, because %s", channel.stream.peer, channel.carrier, reason)
    return reason


def _ask(channel: Channel, question: dict[str, Any]) -> dict[str, Any]:
    deadline = Deadline(SECONDS, f"agreeing on a carrier with {channel.stream.peer}")
    channel.send(question, deadline)
    return channel.recv(deadline)


def _try_shm(channel: Channel, pin: bool) -> str:
    """Use shared memory if bytes survive it; else the reason why not."""
    problem = str(_ask(channel, {"prepare": "shm"}).get("error", ""))
    if not problem:
        channel.use(shm.ShmCarrier(pin))
        sent = torch.randint(0, 256, (PROBE_BYTES,), dtype=torch.uint8)
        reply = _ask(channel, {"probe": "shm", "tensor": sent})
        problem = str(reply.get("error", ""))
        if not problem and not torch.equal(reply["tensor"], ~sent):
            problem = "other bytes came back than were sent"
    if problem:
        channel.demote("shm")
    return f"shm: {problem}" if problem else ""


def _try_cuda(channel: Channel, service: Owner) -> str:
    """Use the service's GPU if both ends see the same bytes there; else the reason why not."""
    from luna_mp.wire import cuda

    gpus = [cuda.uuid_of(index) for index in range(torch.cuda.device_count())]
    offer = _ask(channel, {"propose": "cuda", "gpus": gpus})
    if "error" in offer:
        return f"cuda: {offer['error']}"
    try:
        carrier: Carrier = cuda.ImportingCarrier(gpus.index(offer["gpu"]), service)
        channel.use(carrier)
        tensor = _ask(channel, {"prepare": "cuda"})["tensor"]
        read = tensor.cpu()
        tensor.bitwise_not_()
        reply = _ask(channel, {"confirm": read, "tensor": tensor})
        problem = str(reply.get("error", ""))
    except CarrierFailed as exc:
        problem = str(exc)
    except RuntimeError as exc:
        problem = f"cuda: {str(exc).splitlines()[0]}"
    if problem:
        channel.demote("cuda")
    return problem


class Answerer:
    """The service's side of one connection: replies to what is no call.

    `exporter` is the process's `cuda.Exporter`, or None where the service has no GPU to share.
    """

    def __init__(self, channel: Channel, peer: Identity, exporter: Any) -> None:
        self._channel = channel
        self._owner = Owner(peer.pid, peer.created)
        self._exporter = exporter
        self._secret = torch.empty(0, dtype=torch.uint8)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Raises `Rejected` for what is neither call nor probe, or cannot be agreed to."""
        channel = self._channel
        match request:
            case {"prepare": "shm"} if channel.stream.is_local:
                channel.use(shm.ShmCarrier(pin=self._exporter is not None))
            case {"probe": str(), "tensor": torch.Tensor() as tensor}:
                return {"tensor": ~tensor}
            case {"propose": "cuda", "gpus": list(gpus)} if channel.stream.is_local:
                return {"gpu": self._shared_gpu(gpus)}
            case {"prepare": "cuda"} if self._exporter is not None and channel.stream.is_local:
                return {"tensor": self._challenge()}
            case {"confirm": torch.Tensor() as read, "tensor": torch.Tensor() as written}:
                self._judge(read, written)
            case {"use": str(name), "reason": str()}:
                for slower in {"cuda", "shm"} - {name}:
                    if name == "inline" or slower == "cuda":
                        channel.demote(slower)
            case _:
                raise Rejected(f"a message is neither call nor probe: {sorted(map(str, request))}")
        return {}

    def wait_for_room(self, deadline: Deadline) -> None:
        """Return once this client holds less than its share. Raises `OutOfMemory`."""
        if self._channel.carrier == "cuda":
            self._exporter.book.wait_for_room(self._owner, deadline)

    def _shared_gpu(self, gpus: list[Any]) -> str:
        if self._exporter is None:
            raise Rejected("the service has no GPU whose memory it can share")
        uuid: str = self._exporter.uuid
        if uuid not in gpus:
            raise Rejected(f"the service is on GPU {uuid}, which this process does not see")
        return uuid

    def _challenge(self) -> torch.Tensor:
        from luna_mp.wire.cuda import ExportingCarrier

        self._channel.use(ExportingCarrier(self._exporter, self._owner))
        self._secret = torch.randint(0, 256, (PROBE_BYTES,), dtype=torch.uint8)
        return self._secret.to(self._exporter.device)

    def _judge(self, read: torch.Tensor, written: torch.Tensor) -> None:
        if not torch.equal(read.cpu(), self._secret):
            raise LunaError("cuda: the client read other bytes than were written")
        if not torch.equal(written.cpu(), ~self._secret):
            raise LunaError("cuda: what the client wrote did not arrive")
