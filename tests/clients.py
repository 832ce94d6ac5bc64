"""What tests run in client processes: `python -m tests.clients NAME ARGUMENT…`.

Each finds the services by LUNA_MP_RUNTIME_DIR, like any worker.
"""

from __future__ import annotations

import itertools
import json
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

import luna_mp
from tests.same import bits

LATENTS = 3  # that a bystander knows


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
    """One long decode, once it is told to `go`."""
    with luna_mp.connect() as luna:
        say("ready")
        sys.stdin.readline()
        luna.vae.decode(torch.zeros(3, 4, 64, 64))


def hold() -> None:
    """Hold a result in shared memory until killed."""
    with luna_mp.connect() as luna:
        image = luna.vae.decode(torch.zeros(1, 4, 32, 32))
        say(f"holding {image.numel()}")
        sys.stdin.read()


class Known(NamedTuple):
    """A latent, its image and that image's latent, as they were before anybody died."""

    latent: torch.Tensor
    image: torch.Tensor
    #: the image on the host
    copy: torch.Tensor
    again: torch.Tensor


def bystander(edge: str, seed: str) -> None:
    """Work from one line of standard input to the next, and say how it went; at first, by what."""
    lines = open(0, "rb", buffering=0, closefd=False)  # unbuffered, so that `select` sees them all
    generator = torch.Generator().manual_seed(int(seed))
    known = []
    with luna_mp.connect() as luna:
        # Several, so that a result that lies where another one lay is not like it.
        for _ in range(LATENTS):
            latent = torch.randn(1, 4, int(edge), int(edge), generator=generator)
            image = luna.vae.decode(latent)
            again = luna.vae.encode(image).clone()
            known.append(Known(latent, image.clone(), image.to("cpu", copy=True), again))
        say(json.dumps(luna.carriers))
        while lines.readline():
            say(json.dumps(compare(luna.vae, known)))
            lines.readline()


def compare(vae: luna_mp.VaeProxy, known: list[Known]) -> dict[str, Any]:
    """Decode and encode until standard input has a line; `longest`: seconds for one result.

    A result is compared when it comes, and again while the next ones come.
    """
    calls, mismatches, longest = 0, 0, 0.0
    held: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=6)
    while not select.select([0], [], [], 0)[0]:
        expected = known[calls // 3 % len(known)]
        times = [time.monotonic()]
        image = vae.decode(expected.latent)
        times.append(time.monotonic())
        copy = vae.decode(expected.latent, device="cpu")
        times.append(time.monotonic())
        again = vae.encode(image)
        times.append(time.monotonic())
        longest = max(longest, *(end - start for start, end in itertools.pairwise(times)))
        held += [(image, expected.image), (copy, expected.copy), (again, expected.again)]
        mismatches += sum(not torch.equal(bits(got), bits(right)) for got, right in held)
        calls += 3
    return {"calls": calls, "mismatches": mismatches, "longest": longest}


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


def go(process: subprocess.Popen[str]) -> None:
    """Let a client that says when it is ready begin, once it does."""
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()


if __name__ == "__main__":
    calls: dict[str, Any] = globals()
    calls[sys.argv[1]](*sys.argv[2:])
