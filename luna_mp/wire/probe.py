"""A real round trip decides the carrier of a connection. The client leads:

    {"prepare": name, …}                       the service makes its end of the carrier
    {"probe": name, "tensor": random bytes}    by that carrier; the answer brings them inverted
    {"use": name, "reason": why not faster}    what was agreed on

and for `cuda`, where tensors start at the service:

    {"propose": "cuda", "gpus": UUIDs}         the answer names the GPU that both see
    {"prepare": "cuda"}                        the answer brings random bytes, on the GPU
    {"confirm": what the client read there, "tensor": the same tensor, inverted on the GPU}

What fails leaves the connection on the next slower carrier, with the reason kept for people.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch

from luna_mp.deadline import Deadline
from luna_mp.errors import LunaError, Rejected
from luna_mp.wire import shm
from luna_mp.wire.carrier import Carrier, CarrierFailed
from luna_mp.wire.channel import INLINE_BELOW, Channel
from luna_mp.wire.handshake import Identity
from luna_mp.wire.leases import Owner

__all__ = ("Answerer", "Importer", "choose")

logger = logging.getLogger(__name__)

PROBE_BYTES = INLINE_BELOW  # just enough not to be sent inline for being small
SECONDS = 10.0  # the first time a process opens the GPU takes some


class Importer(Protocol):
    """The GPUs that a client may use; `cuda_client.Importer` is one."""

    def uuids(self) -> list[str]:
        """Of those that this process computes on."""

    def carrier(self, uuid: str, service: Owner, host: shm.ShmCarrier) -> Carrier:
        """The client's end of one connection, beside `host`. Raises `RuntimeError`."""

    def rest(self) -> None:
        """Called now and then: let go of what is kept for calls that do not come."""


class _Refused(LunaError):
    """Raised with what the service says against a carrier, or what it answered wrong."""


def choose(
    channel: Channel, service: Identity, importer: Importer | None = None, avoided: str = ""
) -> str:
    """Agree with the service on the fastest carrier that works; returns why not a faster one.

    `importer`: None where this process has no GPU or may not use it; `avoided`: why `cuda` is not
    to be tried.
    """
    reason = "" if channel.stream.is_local else "the service is reached over TCP"
    if not reason and not shm.is_supported():
        reason = "shm: this system has no memfd"
    if not reason:
        host = shm.ShmCarrier(pin_sent=importer is not None)
        reason = _attempt(channel, "shm", partial(_try_shm, channel, host))
    if not reason and importer is not None:
        owner = Owner(service.pid, service.born)
        probe = partial(_try_cuda, channel, importer, owner, host)
        reason = avoided or _attempt(channel, "cuda", probe)
    _ask(channel, {"use": channel.carrier, "reason": reason})
    if reason:
        logger.debug("%s: %s, because %s", channel.stream.peer, channel.carrier, reason)
    return reason


def _attempt(channel: Channel, name: str, probe: Callable[[], None]) -> str:
    """Go on without a carrier that fails its probe; returns the reason, or "" where it works."""
    try:
        probe()
    except (_Refused, CarrierFailed, RuntimeError) as exc:
        channel.demote(name)
        return str(CarrierFailed.by(name, exc))
    return ""


def _ask(channel: Channel, question: dict[str, Any]) -> dict[str, Any]:
    deadline = Deadline(SECONDS, f"agreeing on a carrier with {channel.stream.peer}")
    channel.send(question, deadline)
    reply = channel.recv(deadline)
    if "error" in reply:
        raise _Refused(str(reply["error"]))
    return reply


def _try_shm(channel: Channel, host: shm.ShmCarrier) -> None:
    """Use shared memory if bytes survive it."""
    _ask(channel, {"prepare": "shm"})
    channel.use(host)
    sent = torch.randint(0, 256, (PROBE_BYTES,), dtype=torch.uint8)
    reply = _ask(channel, {"probe": "shm", "tensor": sent})
    if not torch.equal(reply["tensor"], ~sent):
        raise _Refused("other bytes came back than were sent")


def _try_cuda(channel: Channel, importer: Importer, service: Owner, host: shm.ShmCarrier) -> None:
    """Use the service's GPU if both ends see the same bytes there."""
    offer = _ask(channel, {"propose": "cuda", "gpus": importer.uuids()})
    channel.use(importer.carrier(offer["gpu"], service, host))
    tensor = _ask(channel, {"prepare": "cuda"})["tensor"]
    read = tensor.to("cpu", copy=True)
    tensor.bitwise_not_()
    _ask(channel, {"confirm": read, "tensor": tensor})


class Answerer:
    """The service's side of one connection: replies to what is no call.

    `exporter` is the process's `cuda.Exporter`, or None where the service has no GPU to share.
    """

    def __init__(self, channel: Channel, peer: Identity, exporter: Any) -> None:
        self._channel = channel
        self._owner = Owner(peer.pid, peer.born)
        self._exporter = exporter
        self._host: shm.ShmCarrier | None = None
        self._secret = torch.empty(0, dtype=torch.uint8)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Raises `Rejected` for what is neither call nor probe, or cannot be agreed to."""
        channel = self._channel
        match request:
            case {"prepare": "shm"} if channel.stream.is_local and self._host is None:
                has_gpu = self._exporter is not None
                self._host = shm.ShmCarrier(pin_sent=has_gpu, pin_received=has_gpu)
                channel.use(self._host)
            case {"probe": str(), "tensor": torch.Tensor() as tensor}:
                return {"tensor": ~tensor}
            case {"propose": "cuda", "gpus": list(gpus)} if channel.stream.is_local:
                return {"gpu": self._shared_gpu(gpus)}
            case {"prepare": "cuda"} if self._may_share_gpu and self._host is not None:
                return {"tensor": self._challenge(self._host)}
            case {"confirm": torch.Tensor() as read, "tensor": torch.Tensor() as written}:
                self._judge(read, written)
            case {"use": str(name), "reason": str()}:
                for slower in {"cuda", "shm"} - {name}:
                    if name == "inline" or slower == "cuda":
                        channel.demote(slower)
            case _:
                raise Rejected(f"a message is neither call nor probe: {sorted(map(str, request))}")
        return {}

    def beside(self) -> AbstractContextManager[object]:
        """Work of the GPU that is queued within waits for no call's."""
        return nullcontext() if self._exporter is None else self._exporter.beside()

    def wait_for_room(self, deadline: Deadline) -> None:
        """Return once this client holds less than its share. Raises `OutOfMemory`."""
        if self._channel.carrier == "cuda":
            self._exporter.book.wait_for_room(self._owner, deadline)

    def has_room(self) -> bool:
        """Whether it does, now."""
        if self._channel.carrier != "cuda":
            return True
        has_room: bool = self._exporter.book.has_room(self._owner)
        return has_room

    def place(self, step: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run the last step of a result where this client may share its memory."""
        if self._channel.carrier != "cuda":
            return step()
        placed: torch.Tensor = self._exporter.place(step)
        return placed

    def _shared_gpu(self, gpus: list[Any]) -> str:
        if self._exporter is None:
            raise Rejected("the service has no GPU whose memory it can share")
        uuid: str = self._exporter.uuid
        if uuid not in gpus:
            here = ", ".join(map(str, gpus))
            raise Rejected(f"the service is on GPU {uuid}, and this process computes on {here}")
        # What it holds would be taken from it at once.
        if self._owner.is_gone():
            raise Rejected(
                f"the service sees no process {self._owner.pid} that is this one: run both in one "
                "PID namespace (docker run --pid=host)"
            )
        return uuid

    @property
    def _may_share_gpu(self) -> bool:
        return self._exporter is not None and not self._secret.numel()

    def _challenge(self, host: shm.ShmCarrier) -> torch.Tensor:
        self._channel.use(self._exporter.carrier(self._owner, host))
        # What a client drops before its next call takes as long to free as that call to arrive.
        self._channel.stream.meanwhile = self._exporter.book.collect
        self._secret = torch.randint(0, 256, (PROBE_BYTES,), dtype=torch.uint8)
        return self._secret.to(self._exporter.device)

    def _judge(self, read: torch.Tensor, written: torch.Tensor) -> None:
        if not torch.equal(read.cpu(), self._secret):
            raise LunaError("the client read other bytes than were written")
        if not torch.equal(written.cpu(), ~self._secret):
            raise LunaError("what the client wrote did not arrive")
