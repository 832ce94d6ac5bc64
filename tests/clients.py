"""What tests run in client processes: `python -m tests.clients NAME ARGUMENT…`.

Each finds the services by LUNA_MP_RUNTIME_DIR, like any worker.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import luna_mp


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def decode_many(calls: str) -> None:
    """Decode as fast as it goes."""
    latent = torch.zeros(1, 4, 4, 4)
    with luna_mp.connect() as luna:
        for _ in range(int(calls)):
            luna.vae.decode(latent)


def decode_slowly() -> None:
    """One long decode; says when it is about to start."""
    with luna_mp.connect() as luna:
        say("ready")
        luna.vae.decode(torch.zeros(3, 4, 64, 64))


def hold() -> None:
    """Hold a result in shared memory until killed."""
    with luna_mp.connect() as luna:
        image = luna.vae.decode(torch.zeros(1, 4, 32, 32))
        say(f"holding {image.numel()}")
        sys.stdin.read()


@contextmanager
def client(name: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """One of the above in a process of its own; killed at the end if need be."""
    command = [sys.executable, "-m", "tests.clients", name, *map(str, arguments)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


if __name__ == "__main__":
    calls: dict[str, Any] = globals()
    calls[sys.argv[1]](*sys.argv[2:])
