"""The caller's side: find the services of this user, or those at an address, and connect."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from luna_mp import runtime
from luna_mp.config import ROLES, Role
from luna_mp.deadline import Deadline
from luna_mp.endpoint import Address, Endpoint
from luna_mp.errors import BadConfig, Unavailable
from luna_mp.proxies import CONNECT_SECONDS, ClipProxy, Proxy, VaeProxy
from luna_mp.wire.probe import Importer

__all__ = ("Luna", "connect", "open_endpoint")


class Luna:
    """A client of a CLIP service, a VAE service or both. Threads may share it; close it."""

    def __init__(self, endpoints: dict[Role, Endpoint]) -> None:
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

    @property
    def ids(self) -> dict[str, str]:
        """The names under which the services know this client, as in `status`."""
        return {role: endpoint.client_id for role, endpoint in self._endpoints.items()}

    def status(self, role: Role, timeout: float = CONNECT_SECONDS) -> dict[str, Any]:
        """What one service runs, for whom and how much: plain data."""
        return Proxy(self._endpoint(role)).status(timeout)

    def stop(self, role: Role, timeout: float = CONNECT_SECONDS) -> None:
        """Ask a service of this machine to stop; its `serve` ends too."""
        self._endpoint(role).call("stop", (), {}, timeout)

    def close(self) -> None:
        """Close every connection; tensors that were received stay valid."""
        for endpoint in self._endpoints.values():
            endpoint.close()

    def _endpoint(self, role: Role) -> Endpoint:
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
    named: dict[Role, str | None] = {"clip": clip, "vae": vae}
    is_named = any(named.values())
    luna = Luna({})
    missing = ""
    deadline = Deadline(timeout, "connecting to luna-mp")
    options = (authkey, authkey_file, runtime_dir, gpu)
    for role in ROLES:
        if is_named and not named[role]:
            continue
        try:
            luna._endpoints[role] = open_endpoint(role, named[role], deadline, *options)
        except Unavailable as exc:
            missing = missing or str(exc)
            if is_named:
                luna.close()
                raise
        except BaseException:  # also an interrupt leaves no connection open
            luna.close()
            raise
    if missing and not luna.carriers:
        raise Unavailable(missing)
    return luna


def open_endpoint(
    role: Role,
    address: str | None = None,
    deadline: Deadline | None = None,
    authkey: bytes | str | None = None,
    authkey_file: str = "",
    runtime_dir: str = "",
    gpu: bool = True,
) -> Endpoint:
    """One service, connected; everything else as for `connect`."""
    directory = runtime.runtime_dir(runtime_dir)
    key = runtime.parse_key(authkey) if authkey else runtime.authkey(authkey_file, directory)
    importer = _importer() if gpu and torch.cuda.is_available() else None
    endpoint = Endpoint(role, _locator(role, address, directory), key, importer)
    try:
        endpoint.open(deadline or Deadline(CONNECT_SECONDS, f"connecting to the {role} service"))
    except BaseException:  # also an interrupt leaves no connection open
        endpoint.close()
        raise
    return endpoint


def _importer() -> Importer:
    from luna_mp.wire.cuda_client import Importer as CudaImporter

    return CudaImporter()


def _locator(role: Role, address: str | None, directory: Path) -> Callable[[], Address]:
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
