"""One process for each service: start, wait until ready, restart with back-off, stop.

Three deaths are told apart. A service that fails to start the first time ends the whole, with its
own words. One that dies later is started again, slower each time. One that ends by itself with
status 0 was asked to, and all end with it.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from luna_mp.config import ServeConfig, ServiceConfig
from luna_mp.deadline import Deadline
from luna_mp.errors import BootFailed, TimedOut
from luna_mp.spawning import command
from luna_mp.wire.leftovers import remove_leftovers

__all__ = ("Supervisor",)

logger = logging.getLogger(__name__)

COMMAND = command("luna_mp.service")
LOOK_SECONDS = 0.2  # between two looks at the services
BACKOFF_SECONDS = (0.5, 30.0)  # before a restart: at first, and at most
HEALTHY_SECONDS = 60.0  # after which earlier deaths no longer count
MAX_DEATHS = 10  # in a row
KILL_SECONDS = 5.0  # between asking the system to end a process and killing it


class _Child:
    """One service and its process. Owned by the supervisor's thread."""

    def __init__(self, config: ServiceConfig, command: Sequence[str]) -> None:
        self.config = config
        self.ready: dict[str, Any] = {}
        self.deaths = 0
        self.restart_at = 0.0
        self.boot_deadline = Deadline(0.0, f"starting {config.role}")
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._said: queue.Queue[bytes] = queue.Queue()
        self._reader: threading.Thread | None = None
        self._ready_at = 0.0

    def __repr__(self) -> str:
        if self._process is None:
            return f"<Child {self.config.role} stopped>"
        state = "READY" if self.ready else "starting"
        return f"<Child {self.config.role} pid {self._process.pid} {state}, {self.deaths} deaths>"

    @property
    def status(self) -> int | None:
        """Exit status once the process has ended, else None."""
        return None if self._process is None else self._process.poll()

    def spawn(self, boot_seconds: float) -> None:
        """Start the process and hand it its settings; `hear` takes its answer."""
        self.ready = {}
        self.restart_at = 0.0
        self.boot_deadline = Deadline(boot_seconds, f"starting {self.config.role}")
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
            # A Ctrl-C at the terminal is for the supervisor, which ends its services in order.
            start_new_session=sys.platform != "win32",
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._reader = threading.Thread(
            target=_read_line, args=(self._process.stdout.fileno(), self._said), daemon=True
        )
        self._reader.start()
        try:
            self._process.stdin.write(self.config.to_json().encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            logger.debug("%r ended before it read its settings", self)  # `hear` says why

    def hear(self, seconds: float) -> bool:
        """Wait for the service's answer; False if there was none yet.

        Raises `BootFailed` with the service's own words, or when its time to start is over.
        """
        role = self.config.role
        try:
            line = self._said.get(timeout=seconds)
        except queue.Empty:
            if not self.boot_deadline.has_passed:
                return False
            self.end(Deadline(KILL_SECONDS, f"the end of {role}"))
            raise BootFailed(
                f"the {role} service was not ready within {self.boot_deadline.seconds:g} s "
                "(--boot-timeout)"
            ) from None
        message = json.loads(line) if line else {}
        if "ready" not in message:
            self.end(Deadline(KILL_SECONDS, f"the end of {role}"))
            why = message.get("failed") or f"it ended without a word ({_exit(self.status)})"
            raise BootFailed(f"the {role} service did not start: {why}")
        self.ready = message["ready"]
        self._ready_at = time.monotonic()
        # A port that the system chose stays the service's own through its restarts.
        self.config = replace(self.config, port=int(self.ready["port"]))
        return True

    def plan_restart(self) -> None:
        """Note a death. Raises `BootFailed` after too many in a row."""
        if self.ready and time.monotonic() - self._ready_at > HEALTHY_SECONDS:
            self.deaths = 0
        self.deaths += 1
        if self.deaths >= MAX_DEATHS:
            raise BootFailed(f"the {self.config.role} service died {MAX_DEATHS} times in a row")
        first, most = BACKOFF_SECONDS
        pause = min(first * 2 ** (self.deaths - 1), most)
        self.restart_at = time.monotonic() + pause
        logger.warning(
            "the %s service died (%s), starting it again in %.1f s",
            self.config.role,
            _exit(self.status),
            pause,
        )
        self.end(Deadline(KILL_SECONDS, "the end of a dead service"))

    def ask_to_end(self) -> None:
        """Close the service's standard input, which it takes as the wish of its owner."""
        if self._process is not None and self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                pass  # it has ended already, with settings still unread
            if not self.ready:
                # It loads its models: it does not listen yet, and nobody's call is lost.
                self._process.terminate()

    def end(self, deadline: Deadline) -> None:
        """Wait for the process, then end it, then kill it; reap it and close its pipes."""
        process = self._process
        if process is None:
            return
        self.ask_to_end()
        for patience, harder in (
            (deadline, process.terminate),
            (Deadline(KILL_SECONDS, "a polite end"), process.kill),
        ):
            try:
                process.wait(patience.remaining())
                break
            except (subprocess.TimeoutExpired, TimedOut):
                logger.warning("%r does not end by itself", self)
                harder()
        process.wait(KILL_SECONDS)
        if self._reader is not None:
            self._reader.join(KILL_SECONDS)
        assert process.stdout is not None
        process.stdout.close()
        remove_leftovers(process.pid)
        self._said = queue.Queue()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()


class Supervisor:
    """Owns the services' processes. `start`, then `run`, then `stop`; or a with statement."""

    def __init__(self, config: ServeConfig, command: Sequence[str] = COMMAND) -> None:
        self._config = config
        self._children = [_Child(service, command) for service in config.services]

    def __repr__(self) -> str:
        return f"<Supervisor {self._children}>"

    def __enter__(self) -> Supervisor:
        self.start()
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
        """What each service said when it was ready, by role."""
        return {child.config.role: child.ready for child in self._children}

    def start(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Start all services side by side and wait for them.

        False when `should_stop` came first; then, as when it raises `BootFailed`, none is left.
        """
        try:
            for child in self._children:
                child.spawn(self._config.boot_timeout)
            booting = self._children
            while booting:
                if should_stop():
                    self.stop()
                    return False
                # In turns, so that one that fails is heard while another still loads.
                booting = [c for c in booting if not c.hear(LOOK_SECONDS / len(booting))]
        except BaseException:  # also an interrupt leaves no service running
            self.stop()
            raise
        return True

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Look after the services until `should_stop`, or until a client asked one to stop.

        Raises `BootFailed` when one cannot be kept alive; `stop` is the caller's, always.
        """
        while not should_stop():
            time.sleep(LOOK_SECONDS)
            for child in self._children:
                if child.ready and child.status == 0:
                    logger.info("the %s service was asked to stop", child.config.role)
                    return
                self._look_after(child)

    def stop(self) -> None:
        """Ask all to end, wait for the calls under way, then insist. Safe to call twice."""
        for child in self._children:
            child.ask_to_end()
        deadline = Deadline(self._config.grace + KILL_SECONDS, "the end of the services")
        for child in self._children:
            child.end(deadline)

    def kill(self) -> None:
        """End all at once, without waiting for calls; `stop` reaps them."""
        for child in self._children:
            child.kill()

    def _look_after(self, child: _Child) -> None:
        if child.restart_at:
            if time.monotonic() >= child.restart_at:
                child.spawn(self._config.boot_timeout)
        elif not child.ready:
            try:
                child.hear(0.01)
            except BootFailed as exc:
                logger.error("%s", exc)
                child.plan_restart()
        elif child.status is not None:
            child.plan_restart()


def _read_line(fd: int, said: queue.Queue[bytes]) -> None:
    """Put the one line that a service says, or b"" when it ended without."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(fd, 65536)
        if not piece:
            line = b""
            break
        line += piece
    said.put(line)


def _environment() -> dict[str, str]:
    """Ours, with what a service needs: the native allocator, whose memory can be shared."""
    env = dict(os.environ)
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        env[name] = "backend:native"
    return env


def _exit(status: int | None) -> str:
    if status is None:
        return "still running"
    if status < 0:
        try:
            return f"signal {signal.Signals(-status).name}"
        except ValueError:
            return f"signal {-status}"  # real-time signals have no name
    return f"exit status {status}"
