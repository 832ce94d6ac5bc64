"""Services from inside Python: for notebooks, scripts and tests."""

from __future__ import annotations

import logging
import threading
from dataclasses import fields
from types import TracebackType
from typing import Any

from luna_mp.client import Luna, connect
from luna_mp.config import ROLES, ServeConfig, ServiceConfig, Settings, resolve
from luna_mp.errors import BadConfig, LunaError
from luna_mp.supervisor import Supervisor

__all__ = ("Serving", "serve")

logger = logging.getLogger(__name__)

STOP_SECONDS = 60.0
_COMMON = ("boot_timeout", "service_type", "runtime_dir", "authkey_file", "grace", "log_level")
_OWN = {field.name for field in fields(ServiceConfig)} - {"role", *_COMMON}


class Serving:
    """Running services. Owns their supervisor and the thread that looks after them."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._supervisor = Supervisor(config)
        self._should_stop = threading.Event()
        # A daemon: a script that forgets `stop` may still end, and its services end with it.
        self._thread = threading.Thread(
            target=self._look_after, name="luna-mp supervisor", daemon=True
        )

    def __repr__(self) -> str:
        return f"<Serving {self._supervisor!r}>"

    def __enter__(self) -> Serving:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def ready(self) -> dict[str, dict[str, Any]]:
        """By role, what the service runs: pid, device, socket, host, port, models."""
        return self._supervisor.ready

    def connect(self, **options: Any) -> Luna:
        """A client of these services, by their local sockets; options are those of `connect`."""
        first = self._config.services[0]
        named = {
            role: ready["socket"] or f"{ready['host']}:{ready['port']}"
            for role, ready in self.ready.items()
        }
        keys = {"authkey_file": first.authkey_file, "runtime_dir": first.runtime_dir}
        return connect(**{**keys, **named, **options})

    def start(self) -> None:
        """Returns when all are ready. Raises `BootFailed`."""
        self._supervisor.start()
        self._thread.start()

    def stop(self) -> None:
        """End the services and wait for them; safe to call twice."""
        self._should_stop.set()
        if self._thread.ident is not None:
            self._thread.join(STOP_SECONDS)
        self._supervisor.stop()

    def _look_after(self) -> None:
        try:
            self._supervisor.run(self._should_stop.is_set)
        except LunaError as exc:
            logger.error("%s", exc)
        # One that cannot be kept alive, or was asked to stop, ends the other too.
        self._supervisor.stop()


def serve(clip: str | None = None, vae: str | None = None, **options: Any) -> Serving:
    """Start services in processes of their own and look after them from a thread.

    `clip`, `vae`  a device each: "auto", "cpu", "cuda", "cuda:N" or a GPU's UUID; neither: both
    options        the fields of `ServiceConfig`, for one service with its role before
                   (`vae_models=…`, `clip_port=0`), without it for both (`runtime_dir=…`)

    Ports are free ones unless given. Use it in a with statement, or call `stop`. Raises `BadConfig`
    and `BootFailed`.
    """
    said = Settings()
    for role, device in zip(ROLES, (clip, vae), strict=True):
        if device is not None:
            said.table(role)["device"] = device
    for name, value in options.items():
        _note(said, name, value)
    serving = Serving(resolve(said, default_ports=dict.fromkeys(ROLES, 0)))
    serving.start()
    return serving


def _note(said: Settings, name: str, value: Any) -> None:
    role, _, own = name.partition("_")
    if name in _COMMON:
        said.common[name] = value
    elif role in ROLES and own in _OWN:
        said.table(role)[own] = value
    elif name in _OWN:
        said.common[name] = value
    else:
        raise BadConfig(f"serve() takes no option {name!r}: see ServiceConfig for what there is")
