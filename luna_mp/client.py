"""The caller's side: find the services, prove the key, agree on a carrier, call, reconnect."""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from luna_mp import runtime
from luna_mp.config import ROLES, Role, ServiceConfig
from luna_mp.deadline import Deadline
from luna_mp.errors import BadConfig, Broken, LunaError, Rejected, Unavailable, revive
from luna_mp.models.base import Conditioning
from luna_mp.wire import handshake, probe, stream
from luna_mp.wire.carrier import CarrierFailed
from luna_mp.wire.channel import Channel

__all__ = ("ClipProxy", "Luna", "VaeProxy", "connect")

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
CALL_SECONDS = 600.0
#: how long a call waits for a service that was there before and is being restarted
RECONNECT_SECONDS = 60.0
RETRY_SECONDS = (0.02, 1.0)  # between two attempts, at first and at most
MAX_CONNECTIONS = 16  # of one client to one service; more threads than that wait
MAX_IDLE = 4
WATCH_SECONDS = 0.5  # between two looks at whether the service is there, while its GPU is shared

Address = str | tuple[str, int]


class _Endpoint:
    """One service as one client sees it: a pool of connections, each used by one call at a time.

    `locate` is asked again for each connection, since a service may come back elsewhere.
    """

    def __init__(
        self, role: Role, locate: Callable[[], Address], key: bytes, wants_gpu: bool = False
    ) -> None:
        self.role = role
        self.carrier = ""
        self.reason = ""
        self._locate = locate
        self._key = key
        self._client_id = uuid.uuid4().hex
        self._max_message = ServiceConfig.max_message
        self._wants_gpu = wants_gpu
        #: why the GPU is not shared any more, after that failed in mid-life
        self._avoided = ""
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._idle: list[Channel] = []
        self._pid = os.getpid()
        self._was_there = False
        self._is_closed = False
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name=f"{role} watcher", daemon=True)

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else f"{self.carrier}, {len(self._idle)} idle"
        return f"<Endpoint {self.role}: {state}>"

    def call(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        seconds: float,
        device: str = "",
    ) -> Any:
        """Make one call; `device` "cpu" wants its tensors there.

        Raises `LunaError`; any other call is unaffected by its failure.
        """
        deadline = Deadline(seconds, f"{self.role}.{method}")
        if not self._slots.acquire(timeout=deadline.remaining()):
            deadline.remaining()
        request = {"method": method, "args": args, "kwargs": kwargs, "device": device}
        try:
            reply = self._exchange(request, deadline)
        except stream.NeverRead:
            # The service was ending as the call came in; the call waits for its successor.
            reply = self._exchange(request, deadline)
        except CarrierFailed as exc:
            logger.warning("%s: %s; tensors go by shared memory from now on", self.role, exc)
            self._avoid(str(exc))
            reply = self._exchange(request, deadline)
        finally:
            self._slots.release()
        if "error" in reply:
            raise revive(reply["kind"], reply["error"], reply["traceback"])
        return reply["result"]

    def open(self, deadline: Deadline) -> None:
        """Make sure that the service answers. Raises `LunaError`."""
        self._give_back(self._take(deadline))

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for channel in idle:
            channel.close()
        self._closing.set()
        if self._watcher.ident is not None:
            self._watcher.join()

    def _watch(self) -> None:
        """Close connections whose service died: what they map would keep its VRAM taken."""
        while not self._closing.wait(WATCH_SECONDS):
            with self._lock:
                gone = [channel for channel in self._idle if channel.stream.peer_has_gone]
                self._idle = [channel for channel in self._idle if channel not in gone]
            for channel in gone:
                channel.close()

    def _avoid(self, reason: str) -> None:
        """Share the GPU no more; connections that do are closed."""
        with self._lock:
            self._avoided = reason
            idle, self._idle = self._idle, []
        for channel in idle:
            channel.close()

    def _exchange(self, request: dict[str, Any], deadline: Deadline) -> dict[str, Any]:
        channel = self._take(deadline)
        request["timeout"] = deadline.remaining()
        try:
            channel.send(request, deadline)
        except Rejected:
            self._give_back(channel)
            raise
        except BaseException:
            channel.close()
            raise
        try:
            reply = channel.recv(deadline)
        except (CarrierFailed, stream.NeverRead):
            channel.close()
            raise
        except Broken as exc:
            channel.close()
            raise Broken(
                f"the {self.role} service was lost during {request['method']} ({exc}); "
                "if it is restarted, the next call finds it again"
            ) from exc
        except BaseException:
            # Closing is what tells the service that nobody waits for this call any more.
            channel.close()
            raise
        self._give_back(channel)
        return reply

    def _take(self, deadline: Deadline) -> Channel:
        """An idle connection that is still alive, or a new one."""
        with self._lock:
            if self._is_closed:
                raise Unavailable(f"this client of the {self.role} service was closed")
            if self._pid != os.getpid():
                # A fork shares its parent's sockets; what it reads there is the parent's.
                self._idle, self._pid = [], os.getpid()
                self._client_id = uuid.uuid4().hex
        while channel := self._pop():
            if not channel.stream.peer_has_gone:
                return channel
            channel.close()
        return self._reconnect(deadline)

    def _pop(self) -> Channel | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _give_back(self, channel: Channel) -> None:
        with self._lock:
            if not self._is_closed and len(self._idle) < MAX_IDLE:
                self._idle.append(channel)
                return
        channel.close()

    def _reconnect(self, deadline: Deadline) -> Channel:
        """Open a connection; a service that was there before is given time to come back."""
        patience = Deadline(RECONNECT_SECONDS, f"waiting for the {self.role} service")
        pause, longest = RETRY_SECONDS
        while True:
            try:
                channel = self._open(deadline)
            except (Unavailable, Broken):
                if not self._was_there or patience.has_passed or deadline.has_passed:
                    raise
                time.sleep(min(pause, deadline.remaining()))
                pause = min(2 * pause, longest)
            else:
                self._was_there = True
                return channel

    def _open(self, deadline: Deadline) -> Channel:
        connected = stream.connect(self._locate(), deadline)
        channel = Channel(connected, self._max_message)
        try:
            mine = handshake.identity(self._client_id, self._max_message)
            theirs = handshake.greet(connected, self._key, mine)
            channel.max_message = min(self._max_message, theirs.max_message)
            self.reason = probe.choose(channel, theirs, self._wants_gpu, self._avoided)
        except BaseException:
            channel.close()
            raise
        self.carrier = channel.carrier
        with self._lock:
            if self.carrier == "cuda" and self._watcher.ident is None and not self._is_closed:
                self._watcher.start()
        return channel


class _Proxy:
    """Stands in for a model: the service's default one, or the one that `load` named."""

    def __init__(self, endpoint: _Endpoint, model: dict[str, Any] | None = None) -> None:
        self._endpoint = endpoint
        self._model = model

    def __repr__(self) -> str:
        name = ", ".join(self._model["paths"]) if self._model else "default"
        return f"<{type(self).__name__} {name} by {self._endpoint.carrier}>"

    def _call(
        self, method: str, *args: Any, timeout: float, device: str = "", **kwargs: Any
    ) -> Any:
        if self._model is not None:
            # By description, not by handle: a restarted service loads it again by itself.
            kwargs["model"] = self._model
        return self._endpoint.call(method, args, kwargs, timeout, device)

    def _described(self, path: Any, type: str, dtype: str, source: str) -> dict[str, Any]:
        paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
        return {
            "paths": [os.fspath(p) for p in paths],
            "type": type,
            "dtype": dtype,
            "source": source,
        }

    def status(self, timeout: float = CONNECT_SECONDS) -> dict[str, Any]:
        """What the service runs, for whom and how much: plain data."""
        status: dict[str, Any] = self._endpoint.call("status", (), {}, timeout)
        return status


class VaeProxy(_Proxy):
    """A VAE in another process. Tensors come and go on the CPU unless a carrier can do better."""

    def decode(
        self,
        latent: torch.Tensor,
        *,
        tiled: bool = False,
        device: str = "",
        timeout: float = CALL_SECONDS,
    ) -> torch.Tensor:
        """Image, float32 [B, H, W, C] 0..1, for a latent as the autoencoder takes it, unscaled.

        `tiled` decodes in overlapping tiles; so does the service once when memory is short.
        `device="cpu"` wants the image on the CPU; otherwise it stays on the service's GPU where
        that is shared (see `Luna.carriers`).
        Raises `Rejected` for a latent that the model cannot take, `OutOfMemory`, `RemoteFailure`,
        `TimedOut` after `timeout` seconds, `Broken` and `Unavailable`.
        """
        image: torch.Tensor = self._call(
            "decode", latent, tiled=tiled, device=device, timeout=timeout
        )
        return image

    def encode(
        self,
        image: torch.Tensor,
        *,
        tiled: bool = False,
        device: str = "",
        timeout: float = CALL_SECONDS,
    ) -> torch.Tensor:
        """Mode of the posterior, unscaled, in the model's dtype, for an image [B, H, W, C] 0..1.

        Raises what `decode` raises.
        """
        latent: torch.Tensor = self._call(
            "encode", image, tiled=tiled, device=device, timeout=timeout
        )
        return latent

    def load(
        self,
        path: Any,
        *,
        type: str = "auto",
        dtype: str = "auto",
        source: str = "auto",
        timeout: float = CALL_SECONDS,
    ) -> VaeProxy:
        """A proxy for another VAE, from a folder or file that the service may load from.

        Raises `BadModel` where there is none or where `serve --allow` does not reach.
        """
        model = self._described(path, type, dtype, source)
        self._endpoint.call("load", (), {"model": model}, timeout)
        return VaeProxy(self._endpoint, model)


class ClipProxy(_Proxy):
    """Text encoders in another process."""

    def encode(self, text: str, *, device: str = "", timeout: float = CALL_SECONDS) -> Conditioning:
        """Conditioning of a prompt: cond [1, tokens, width], pooled or None, extras.

        Raises `Rejected` for what is not a prompt, and what `VaeProxy.decode` raises.
        """
        conditioning = Conditioning(*self._call("encode", text, device=device, timeout=timeout))
        if dropped := conditioning.extras.get("truncated"):
            logger.warning("the prompt is longer than the model reads: %s tokens cut", dropped)
        return conditioning

    def tokenize(self, text: str, *, timeout: float = CALL_SECONDS) -> dict[str, list[int]]:
        """Token ids of a prompt for each encoder."""
        tokens: dict[str, list[int]] = self._call("tokenize", text, timeout=timeout)
        return tokens

    def load(
        self,
        path: Any,
        *,
        type: str = "auto",
        dtype: str = "auto",
        source: str = "auto",
        timeout: float = CALL_SECONDS,
    ) -> ClipProxy:
        """A proxy for another text encoder: one folder, or one to four files.

        Raises `BadModel` where there is none or where `serve --allow` does not reach.
        """
        model = self._described(path, type, dtype, source)
        self._endpoint.call("load", (), {"model": model}, timeout)
        return ClipProxy(self._endpoint, model)


class Luna:
    """A client of a CLIP service, a VAE service or both. Threads may share it; close it."""

    def __init__(self, endpoints: dict[Role, _Endpoint]) -> None:
        self._endpoints = endpoints

    def __repr__(self) -> str:
        return f"<Luna {self.carriers}>"

    def __enter__(self) -> Luna:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def clip(self) -> ClipProxy:
        """The CLIP service's default model; raises `Unavailable` where it was not found."""
        return ClipProxy(self._endpoint("clip"))

    @property
    def vae(self) -> VaeProxy:
        """The VAE service's default model; raises `Unavailable` where it was not found."""
        return VaeProxy(self._endpoint("vae"))

    @property
    def carriers(self) -> dict[str, str]:
        """How tensors travel, by service: "cuda", "shm" or "inline"."""
        return {role: endpoint.carrier for role, endpoint in self._endpoints.items()}

    @property
    def reasons(self) -> dict[str, str]:
        """Why no faster carrier is in use, by service; "" where the fastest is."""
        return {role: endpoint.reason for role, endpoint in self._endpoints.items()}

    def status(self, role: Role, timeout: float = CONNECT_SECONDS) -> dict[str, Any]:
        """What one service runs, for whom and how much: plain data."""
        return _Proxy(self._endpoint(role)).status(timeout)

    def stop(self, role: Role, timeout: float = CONNECT_SECONDS) -> None:
        """Ask a service of this machine to stop; its `serve` ends too."""
        self._endpoint(role).call("stop", (), {}, timeout)

    def unload(self, role: Role, proxy: VaeProxy | ClipProxy, timeout: float = 60.0) -> bool:
        """Ask a local service to let go of a model that `load` brought; False: it was not there."""
        was_there: bool = self._endpoint(role).call("unload", (proxy._model,), {}, timeout)
        return was_there

    def close(self) -> None:
        """Close every connection; tensors that were received stay valid."""
        for endpoint in self._endpoints.values():
            endpoint.close()

    def _endpoint(self, role: Role) -> _Endpoint:
        if role not in self._endpoints:
            raise Unavailable(
                f"no {role} service was found at connect: start one with `luna-mp serve --{role}`, "
                f"or name its address: connect({role}=…)"
            )
        return self._endpoints[role]


def connect(
    *,
    clip: str | None = None,
    vae: str | None = None,
    authkey: bytes | str | None = None,
    authkey_file: str = "",
    runtime_dir: str = "",
    gpu: bool = True,
    timeout: float = CONNECT_SECONDS,
) -> Luna:
    """Connect to this user's services on this machine, or to those at the addresses given.

    `clip`, `vae`  "host:port", or the path of a service's socket; with neither, both are looked for
    `authkey`      the services' key: bytes, or text as in LUNA_MP_AUTHKEY
    `gpu`          use the services' GPU memory, which opens the GPU in this process; False: never
    `timeout`      seconds for the whole; each later call has its own

    Raises `Unavailable` where nothing answers, `WrongKey`, `WrongVersion`, `TimedOut`, `BadConfig`.
    """
    directory = runtime.runtime_dir(runtime_dir)
    key = runtime.parse_key(authkey) if authkey else runtime.authkey(authkey_file, directory)
    named: dict[Role, str | None] = {"clip": clip, "vae": vae}
    is_named = any(named.values())
    wants_gpu = gpu and torch.cuda.is_available()
    luna = Luna({})
    missing: LunaError | None = None
    deadline = Deadline(timeout, "connecting to luna-mp")
    for role in ROLES:
        address = named[role]
        if is_named and not address:
            continue
        endpoint = _Endpoint(role, _locator(role, address, directory), key, wants_gpu)
        try:
            endpoint.open(deadline)
        except Unavailable as exc:
            missing = missing or exc
            if is_named:
                luna.close()
                raise
        except BaseException:
            luna.close()
            raise
        else:
            luna._endpoints[role] = endpoint
    if missing and not luna.carriers:
        raise missing
    return luna


def _locator(role: Role, address: str | None, directory: Any) -> Callable[[], Address]:
    if address is None:
        return lambda: runtime.find(directory, role).address
    parsed = _parse(address)
    return lambda: parsed


def _parse(address: str) -> Address:
    if os.sep in address:
        return address
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise BadConfig(f"address {address!r} is neither host:port nor the path of a socket")
    return host.strip("[]"), int(port)
