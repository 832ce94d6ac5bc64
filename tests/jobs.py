"""Services that are none, for the supervisor's tests: `python -m tests.jobs`, nothing heavy.

What one does is named by the `type` of the settings that it is sent.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

CHOSEN_PORT = 43210  # what the fake says when it is to take any free port


def say(**message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def boot(config: dict[str, Any]) -> None:
    """Serve until standard input ends; SIGUSR1 stands for a client that asks for an end."""
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(0))
    env = {name: os.environ.get(name) for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")}
    port = config["port"] or CHOSEN_PORT
    ready = {"role": config["role"], "port": port, "asked": config["port"], "env": env}
    say(ready={**ready, "pid": os.getpid(), "session": os.getsid(0)})
    sys.stdin.read()


def stubborn(config: dict[str, Any]) -> None:
    """Serve, and hear neither the end of standard input nor SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say(ready={"role": config["role"], "port": 1, "pid": os.getpid()})
    while True:
        time.sleep(60)


def fail(_config: dict[str, Any]) -> None:
    say(failed="the model is not there")
    sys.exit(3)


def wordless(_config: dict[str, Any]) -> None:
    os._exit(7)


def crash(_config: dict[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(_config: dict[str, Any]) -> None:
    while True:
        time.sleep(60)


def boot_once(config: dict[str, Any]) -> None:
    """Serve the first time and fail each time after; the marker is named by `comfyui`."""
    try:
        os.close(os.open(config["comfyui"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        fail(config)
    boot(config)


if __name__ == "__main__":
    settings = json.loads(sys.stdin.readline())
    globals()[settings["type"]](settings)
