"""A service as ComfyUI's objects call it: with ComfyUI's own interrupt and out of memory."""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Mapping
from typing import Any

from comfy import model_management

from luna_mp.client import open_endpoint
from luna_mp.config import Role
from luna_mp.deadline import Deadline
from luna_mp.endpoint import Endpoint
from luna_mp.errors import OutOfMemory
from luna_mp.models.comfy_facts import differences

__all__ = ("RemoteModel", "Service", "service")

logger = logging.getLogger(__name__)

CHECK_SECONDS = 5.0  # for a service to say that it is there
CALL_SECONDS = 3600.0  # the user's own interrupt ends a call sooner


class Service:
    """One CLIP or VAE service. All of ComfyUI's objects share its connections."""

    def __init__(self, endpoint: Endpoint, name: str) -> None:
        self._endpoint = endpoint
        self.name = name

    def __repr__(self) -> str:
        return f"<Service {self.name} by {self._endpoint.carrier}>"

    @property
    def carrier(self) -> str:
        """How tensors travel, and why not faster."""
        reason = self._endpoint.reason
        return self._endpoint.carrier + (f", because {reason}" if reason else "")

    def check(self) -> None:
        """Raises `Unavailable` where the service does not answer at once."""
        self._endpoint.check(Deadline(CHECK_SECONDS, f"asking whether {self.name} is there"))

    def close(self) -> None:
        self._endpoint.close()

    def call(self, method: str, *args: Any, device: str = "") -> Any:
        """Make one call. Raises ComfyUI's own exceptions for an interrupt and for lack of memory.

        Of a full GPU this process may hold the rest in its cache, which the service cannot use.
        """
        try:
            return self._call(method, args, device)
        except OutOfMemory as exc:
            logger.warning("%s; once more with this process's cache emptied", exc)
        model_management.soft_empty_cache()
        try:
            return self._call(method, args, device)
        except OutOfMemory as exc:
            raise model_management.OOM_EXCEPTION(str(exc)) from exc

    def _call(self, method: str, args: tuple[Any, ...], device: str) -> Any:
        check = model_management.throw_exception_if_processing_interrupted
        return self._endpoint.call(method, args, {}, CALL_SECONDS, device, check)

    def model(self, spec: dict[str, Any] | None) -> RemoteModel:
        """A model of this service, None for its default one; it is loaded there if need be."""
        return RemoteModel(self, self.call("comfyui_describe", spec))


class RemoteModel:
    """One model in a service, as the service described it."""

    def __init__(self, service: Service, described: dict[str, Any]) -> None:
        self.service = service
        #: paths, type, dtype and source, all of them resolved
        self.spec: dict[str, Any] = described["model"]
        self._files: list[dict[str, Any]] = described["files"]
        #: name of the torch dtype that the model computes in
        self.dtype: str = described["dtype"]
        #: UUID of the GPU that it is on, or ""
        self.gpu: str = described["gpu"]
        self._version = described["version"]
        self._facts: Mapping[str, Any] = described["facts"]

    def __repr__(self) -> str:
        return f"<RemoteModel {', '.join(self.spec['paths'])} of {self.service!r}>"

    def call(self, method: str, *args: Any, device: str = "") -> Any:
        return self.service.call(method, *args, self.spec, self._version, device=device)

    def take_files(self) -> list[dict[str, Any]]:
        """What `luna_mp.models.skeleton.restore` takes, by file; once.

        A tokenizer among them lies in memory that the service has lent.
        """
        files, self._files = self._files, []
        return files

    def warn_of(self, facts: Mapping[str, Any]) -> list[str]:
        """Say in the log, before there is an image, what will show in its bits."""
        found = differences(facts, self._facts)
        for line in found:
            logger.warning("%s may give other bits than a local model: %s", self.service.name, line)
        return found


_services: dict[tuple[Role, str], Service] = {}
_lock = threading.Lock()


def service(role: Role, address: str = "", at_once: bool = False) -> Service:
    """The service at `address` ("": this user's on this machine), connected on the first call.

    One that was there before is given time to be restarted by its next call, or, `at_once`, none.
    Raises `Unavailable` where there is none, and what `luna_mp.connect` raises.
    """
    with _lock:
        found = _services.get((role, address))
        if found is None:
            endpoint = open_endpoint(role, address or None)
            found = Service(endpoint, f"{role} at {address or 'this machine'}")
            _services[role, address] = found
            return found
    if at_once:
        found.check()
    return found


@atexit.register
def _close_all() -> None:
    with _lock:
        while _services:
            _services.popitem()[1].close()
