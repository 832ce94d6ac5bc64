"""Who is there: mutual proof of one key, then both ends say what they are.

    client → server   {"luna": version, "nonce": Nc}
    server → client   {"luna": version, "nonce": Ns, "proof": H(key, "server", Nc, Ns)}
    client → server   {"identity": …, "proof": H(key, "client", Nc, Ns, identity)}
    server → client   {"identity": …, "proof": H(key, "welcome", Nc, Ns, identity)}
                      or {"refused": text}

H is HMAC-SHA256. Each proof names its role and both nonces, so an answer that one client gives is
worth nothing to another: who does not hold the key cannot pass by relaying between two clients.
Each message is a length (u16) and JSON; nothing of a stranger's is ever unpickled.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import secrets
import struct
import sys
import uuid
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, NoReturn

import psutil

from luna_mp.deadline import Deadline
from luna_mp.errors import Broken, LunaError, Rejected, WrongKey, WrongVersion
from luna_mp.processes import born
from luna_mp.wire.stream import Stream

__all__ = ("PROTOCOL", "Identity", "answer", "greet", "identity", "refuse")

logger = logging.getLogger(__name__)

PROTOCOL = 8
LENGTH = struct.Struct("!H")
NONCE_BYTES = 32
TEXTS = ("client_id", "boot_id", "platform", "torch", "allocator", "role")
SECONDS = 5.0  # for the whole handshake
REFUSAL_SECONDS = 0.2


@dataclass(frozen=True)
class Identity:
    """What each end tells the other once the key is proven."""

    client_id: str
    pid: int
    #: as `processes.born` says it: pids are used again, this pair is not
    born: float
    boot_id: str
    platform: str
    torch: str
    #: UUIDs of the GPUs that this process has opened; asking never opens one
    gpus: tuple[str, ...]
    #: torch's CUDA allocator, or "" where CUDA is not in use
    allocator: str
    #: most bytes of one message that this end takes
    max_message: int
    #: of a service, what it serves: "clip" or "vae"
    role: str = ""

    @classmethod
    def from_data(cls, data: Any) -> Identity:
        try:
            numbers = {name: int(data[name]) for name in ("pid", "max_message")}
            texts = {name: str(data[name]) for name in TEXTS}
            typed = {**numbers, **texts, "born": float(data["born"])}
            found = cls(**{**data, **typed, "gpus": tuple(map(str, data["gpus"]))})
            if found.pid <= 0 or found.max_message <= 0:
                raise ValueError("a number that is not above zero")
            return found
        except (TypeError, KeyError, ValueError, OverflowError) as exc:
            raise Rejected(f"an identity is malformed: {data!r:.200}") from exc


def identity(client_id: str, max_message: int, role: str = "") -> Identity:
    """Describe this process; `client_id` is made up when not given."""
    import torch

    gpus: tuple[str, ...] = ()
    allocator = ""
    if torch.cuda.is_initialized():
        count = torch.cuda.device_count()
        gpus = tuple(str(torch.cuda.get_device_properties(i).uuid) for i in range(count))
        allocator = torch.cuda.get_allocator_backend()
    return Identity(
        client_id=client_id or uuid.uuid4().hex,
        pid=os.getpid(),
        born=born(os.getpid()),
        boot_id=_boot_id(),
        platform=sys.platform,
        torch=torch.__version__,
        gpus=gpus,
        allocator=allocator,
        max_message=max_message,
        role=role,
    )


def greet(stream: Stream, key: bytes, mine: Identity) -> Identity:
    """The client's side. Raises `WrongKey`, `WrongVersion`, `Rejected`, `TimedOut`, `Broken`."""
    deadline = Deadline(SECONDS, f"the handshake with {stream.peer}")
    nonce = secrets.token_hex(NONCE_BYTES)
    try:
        _send(stream, {"luna": PROTOCOL, "nonce": nonce}, deadline)
    except Broken as exc:
        logger.debug("%s; perhaps it said why", exc)
    reply = _recv(stream, deadline)
    _check_version(reply.get("luna"), stream.peer)
    nonces = (nonce, str(reply.get("nonce")))
    if not _is_proof(reply.get("proof"), key, "server", *nonces):
        raise WrongKey(f"{stream.peer} does not hold this client's authkey: check {KEY_SOURCES}")
    said = json.dumps(asdict(mine))
    proof = _proof(key, "client", *nonces, said)
    _send(stream, {"identity": said, "proof": proof}, deadline)
    reply = _recv(stream, deadline)
    theirs = str(reply.get("identity"))
    if not _is_proof(reply.get("proof"), key, "welcome", *nonces, theirs):
        raise WrongKey(f"{stream.peer} could not prove the authkey to the end")
    return Identity.from_data(json.loads(theirs))


def answer(stream: Stream, key: bytes, mine: Identity) -> Identity:
    """The server's side. A peer that fails is told no more than it needs to correct itself."""
    deadline = Deadline(SECONDS, f"the handshake with {stream.peer}")
    try:
        return _answer(stream, key, mine, deadline)
    except (WrongKey, WrongVersion, Rejected) as exc:
        refusal = {"luna": PROTOCOL, "refused": str(exc), "kind": type(exc).__name__}
        _send(stream, refusal, deadline)
        raise
    except Broken as exc:
        raise Broken(f"{exc} during the handshake: it may hold another authkey") from exc


def refuse(stream: Stream, why: str) -> None:
    """Turn a stranger away, and close; it may already have gone, and nobody waits for it."""
    deadline = Deadline(REFUSAL_SECONDS, "a refusal")
    try:
        _send(stream, {"luna": PROTOCOL, "refused": why}, deadline)
        # To close with the stranger's greeting unread would reset the connection, reason and all.
        _recv(stream, deadline)
    except LunaError as exc:
        logger.debug("%s left before it was refused: %s", stream.peer, exc)
    finally:
        stream.close()


def _answer(stream: Stream, key: bytes, mine: Identity, deadline: Deadline) -> Identity:
    hello = _recv(stream, deadline)
    _check_version(hello.get("luna"), "the client")
    nonces = (str(hello.get("nonce")), secrets.token_hex(NONCE_BYTES))
    if len(nonces[0]) != 2 * NONCE_BYTES:
        raise Rejected(f"a nonce of {len(nonces[0])} characters; it takes {2 * NONCE_BYTES}")
    proof = _proof(key, "server", *nonces)
    _send(stream, {"luna": PROTOCOL, "nonce": nonces[1], "proof": proof}, deadline)
    reply = _recv(stream, deadline)
    theirs = str(reply.get("identity"))
    if not _is_proof(reply.get("proof"), key, "client", *nonces, theirs):
        raise WrongKey(f"the client does not hold this service's authkey: check {KEY_SOURCES}")
    peer = Identity.from_data(json.loads(theirs))
    said = json.dumps(asdict(mine))
    welcome = {"identity": said, "proof": _proof(key, "welcome", *nonces, said)}
    _send(stream, welcome, deadline)
    return peer


KEY_SOURCES = "authkey=, LUNA_MP_AUTHKEY, the authkey file, or the runtime directory"


def _check_version(theirs: object, peer: str) -> None:
    if theirs != PROTOCOL:
        raise WrongVersion(
            f"{peer} speaks version {theirs!r:.40} of luna-mp's protocol and this end version "
            f"{PROTOCOL}: install the same luna-mp at both ends"
        )


def _proof(key: bytes, *said: str) -> str:
    return hmac.new(key, json.dumps(["luna-mp", *said]).encode(), hashlib.sha256).hexdigest()


def _is_proof(claimed: object, key: bytes, *said: str) -> bool:
    return isinstance(claimed, str) and hmac.compare_digest(
        claimed.encode(), _proof(key, *said).encode()
    )


def _send(stream: Stream, message: dict[str, Any], deadline: Deadline) -> None:
    data = json.dumps(message).encode()
    stream.send([LENGTH.pack(len(data)), data], deadline)


def _recv(stream: Stream, deadline: Deadline) -> dict[str, Any]:
    size = LENGTH.unpack(stream.read(LENGTH.size, deadline))[0]
    data = bytes(stream.read(size, deadline))
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise Rejected(f"{stream.peer} does not speak luna-mp's protocol") from exc
    if not isinstance(message, dict):
        raise Rejected(f"{stream.peer} does not speak luna-mp's protocol")
    if "refused" in message:
        _raise_refusal(message)
    return message


def _raise_refusal(message: dict[str, Any]) -> NoReturn:
    kinds = {"WrongKey": WrongKey, "WrongVersion": WrongVersion}
    kind = kinds.get(str(message.get("kind")), Rejected)
    raise kind(f"refused by the service: {message['refused']!s:.500}")


@cache
def _boot_id() -> str:
    """Tells two boots, and so two hosts, apart; containers of one host share it."""
    if sys.platform == "linux":
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    return f"{uuid.getnode():x}-{psutil.boot_time():.0f}"
