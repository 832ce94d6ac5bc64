"""One service process: load the models, open both managers, serve until told to stop.

Run as `python -m luna_mp.service` by the supervisor. Standard input brings the `ServiceConfig` as
one line of JSON and then stays open: its end means that the owner is gone or wants an end, so no
service outlives its supervisor. Standard output carries one line of JSON, `{"ready": …}` or
`{"failed": text}`.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, cast

import psutil
import torch

from luna_mp import runtime
from luna_mp.config import ServiceConfig
from luna_mp.errors import LunaError
from luna_mp.manager import LocalManager, Manager, RemoteManager, Server
from luna_mp.models.base import ModelSpec
from luna_mp.models.library import Library
from luna_mp.processes import born
from luna_mp.sessions import Sessions
from luna_mp.wire import stream
from luna_mp.workers.clip import ClipWorker
from luna_mp.workers.comfyui import ComfyClipCalls, ComfyVaeCalls
from luna_mp.workers.queue import Call
from luna_mp.workers.vae import VaeWorker
from luna_mp.workers.worker import Worker

__all__ = ("Service", "main")

logger = logging.getLogger(__name__)

STARTUP_FAILURE = 3  # exit status: the supervisor gives up instead of trying again
GPU_FAULT = 4  # exit status: the supervisor starts another process, which can use the GPU again
FAULT_SECONDS = 0.5  # for replies to leave once the GPU is lost; no call can succeed any more
STOP_SECONDS = 0.5  # between two looks at whether to stop, for signals on Windows

Build = Callable[[ServiceConfig], Worker[Any]]


class Service:
    """Joins one worker to its two managers. Owns both servers, their threads and the record."""

    def __init__(self, config: ServiceConfig, build: Build) -> None:
        """Load the models with `build`. Raises `LunaError`; nothing listens yet."""
        self._config = config
        self._directory = runtime.runtime_dir(config.runtime_dir)
        self._key = runtime.authkey(config.authkey_file, self._directory)
        # A port that is taken is told at once, not after minutes of loading.
        stream.listen((config.host, config.port)).close()
        self.is_stopping = threading.Event()
        self.has_lost_gpu = False
        self._started = time.time()
        self._sessions = Sessions()
        self._worker = build(config)
        self._exporter = _exporter(self._worker.device, config.max_leased)
        self._servers: list[Server] = []
        self._threads: list[threading.Thread] = []
        self._port = config.port

    def __repr__(self) -> str:
        return f"<Service {self._config.role} on {self._worker.device}: {self._servers}>"

    def start(self) -> dict[str, Any]:
        """Listen; returns what `ready` says, which is also the instance's record."""
        calls = {**self._worker.calls(), **_comfyui_calls(self._worker), "status": self._status}
        remote = self._serve(RemoteManager, (self._config.host, self._config.port), calls)
        host, port = cast("tuple[str, int]", remote.address)
        self._port = port
        path = ""
        if hasattr(socket, "AF_UNIX"):
            path = str(runtime.socket_path(self._directory, self._config.role, port))
            control = {"stop": self._stop, "unload": self._worker.unload}
            self._serve(LocalManager, path, {**calls, **control})
        record = runtime.Record(
            role=self._config.role,
            pid=os.getpid(),
            born=born(os.getpid()),
            socket=path,
            host=host,
            port=port,
            started=self._started,
        )
        runtime.write_record(self._directory, record)
        models = self._worker.library.to_data()
        return {**asdict(record), "device": str(self._worker.device), "models": models}

    def close(self, grace: float) -> bool:
        """End both servers; calls under way get `grace` seconds. Whether all threads have ended."""
        end = time.monotonic() + grace
        runtime.remove_record(self._directory, self._config.role, self._port)
        for server in self._servers:
            server.admit_nobody()
        have_ended = [server.stop(max(end - time.monotonic(), 0.0)) for server in self._servers]
        for thread in self._threads:
            thread.join()
        if self._exporter is not None:
            self._exporter.close()
        return all(have_ended)

    def _serve(self, manager: type[Manager], address: Any, calls: dict[str, Any]) -> Server:
        config = self._config
        server = manager(
            config.role,
            calls,
            address,
            self._key,
            self._sessions,
            config.max_message,
            self._exporter,
            self._give_up,
        ).get_server()
        thread = threading.Thread(target=server.serve_forever, name=repr(server), daemon=True)
        thread.start()
        self._servers.append(server)
        self._threads.append(thread)
        return server

    def _status(self, call: Call) -> dict[str, Any]:
        return {
            "role": self._config.role,
            "pid": os.getpid(),
            "uptime": time.time() - self._started,
            "addresses": [server.place for server in self._servers],
            "rss": psutil.Process().memory_info().rss,
            **self._worker.status(call),
            **self._sessions.to_data(),
            "leases": self._exporter.book.to_data() if self._exporter else {},
        }

    def _stop(self, call: Call) -> None:
        logger.info("client %s asked for an end", call.client[:8])
        self.is_stopping.set()

    def _give_up(self, fault: BaseException) -> None:
        """Ask for an end that is no success. From here on clients wait for the next process."""
        logger.critical("the GPU is lost to this process, which ends", exc_info=fault)
        self.has_lost_gpu = True
        for server in self._servers:
            server.admit_nobody()
        self.is_stopping.set()


def _build(config: ServiceConfig) -> Worker[Any]:
    """The worker, with its default model loaded if it has one.

    Raises `BadModel`, `BadConfig`, `OutOfMemory`.
    """
    from luna_mp.devices import claim
    from luna_mp.models import load_clip, load_vae

    device = claim(config.device)
    if config.comfyui:
        from luna_mp.models.comfy_import import import_comfy

        import_comfy(config.comfyui, device, config.comfyui_flags)
    # ComfyUI's loaders name files; nobody wants the demo model beside them.
    is_bare = config.comfyui and not config.models
    default = None if is_bare else ModelSpec(config.models, config.type, config.dtype)
    options = (default, config.allow, config.max_models, device)
    if config.role == "clip":
        clips = Library(lambda spec: load_clip(spec, str(device), config.comfyui), *options)
        return ClipWorker(clips, config.cache_bytes)
    return VaeWorker(Library(lambda spec: load_vae(spec, str(device), config.comfyui), *options))


def _comfyui_calls(worker: Worker[Any]) -> dict[str, Callable[..., Any]]:
    if isinstance(worker, ClipWorker):
        return ComfyClipCalls(worker).calls()
    return ComfyVaeCalls(cast("VaeWorker", worker)).calls()


def _exporter(device: torch.device, most: int) -> Any:
    """What hands out results on the GPU, or None where it cannot; `most`: 0 for a quarter."""
    if device.type != "cuda" or sys.platform == "win32":
        return None
    from luna_mp.wire.cuda import Exporter

    return Exporter(device, most or torch.cuda.get_device_properties(device).total_memory // 4)


def main(build: Build = _build) -> int:
    """Serve until standard input ends, a signal comes or a client asks; returns the exit status.

    `build` makes the worker with its models.
    """
    say = _private_stdout()
    config = ServiceConfig.from_json(sys.stdin.buffer.readline().decode())
    logging.basicConfig(
        level=config.log_level,
        format=f"%(asctime)s {config.role} %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    try:
        service = Service(config, build)
        ready = service.start()
    except Exception as exc:  # whatever a loader raises is the reason why there is no service
        logger.debug("start failed", exc_info=True)
        say({"failed": str(exc) if isinstance(exc, LunaError) else f"{type(exc).__name__}: {exc}"})
        return STARTUP_FAILURE
    say({"ready": ready})
    logger.info("%r is ready after %.1f s", service, time.time() - ready["started"])
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: service.is_stopping.set())
    threading.Thread(target=_watch_owner, args=(service.is_stopping,), daemon=True).start()
    while not service.is_stopping.wait(STOP_SECONDS):
        pass
    have_ended = service.close(FAULT_SECONDS if service.has_lost_gpu else config.grace)
    if service.has_lost_gpu:
        # Nothing that lies on the GPU can be let go of; to try may hang.
        os._exit(GPU_FAULT)
    logger.info("%s service has stopped", config.role)
    if not have_ended:
        # The interpreter's end would tear a thread out of torch's code, which aborts the process.
        os._exit(0)
    return 0


def _private_stdout() -> Callable[[dict[str, Any]], None]:
    """Keep standard output for our own line; what libraries print goes to standard error."""
    private = os.dup(1)
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        os.write(private, json.dumps(message).encode() + b"\n")
        os.close(private)

    return say


def _watch_owner(is_stopping: threading.Event) -> None:
    while os.read(0, 4096):
        pass
    is_stopping.set()


if __name__ == "__main__":
    sys.exit(main())
