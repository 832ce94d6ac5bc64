"""What GPU tests run in client processes: `python -m tests.gpu.clients NAME ARGUMENT…`.

The allocator is what the environment says, as in a worker of somebody else's.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from typing import Any

import torch

import luna_mp
from luna_mp import errors
from luna_mp.wire.carrier import Outgoing, Token
from luna_mp.wire.cuda_client import ImportingCarrier

EDGE = 32  # of the latents


def say(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def bits(tensor: torch.Tensor) -> str:
    """A fingerprint of values, dtype, shape and strides."""
    told = hashlib.sha256(f"{tensor.dtype} {tensor.shape} {tensor.stride()}".encode())
    told.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return told.hexdigest()


def latent(device: str = "cpu", edge: int = EDGE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(edge)
    return torch.randn(1, 4, edge, edge, generator=generator).to(device)


def _counted_by_name() -> list[int]:
    """Grows by each tensor that this process sends by the number of its lease."""
    sent: list[int] = []
    pack = ImportingCarrier.pack

    def counted(self: ImportingCarrier, tensor: torch.Tensor, out: Outgoing) -> Token:
        token = pack(self, tensor, out)
        sent.append(token[0])
        return token

    ImportingCarrier.pack = counted  # type: ignore[method-assign]
    return sent


def matrix(rounds: str = "3", edge: str = str(EDGE)) -> None:
    """Send and receive on CPU and GPU; say what came back by which carrier."""
    torch.zeros(1, device="cuda")
    by_name = _counted_by_name()
    with luna_mp.connect() as luna:
        by_name.clear()
        results: dict[str, Any] = {}
        for _ in range(int(rounds)):
            for sent in ("cpu", "cuda"):
                for wanted in ("", "cpu"):
                    image = luna.vae.decode(latent(sent, int(edge)), device=wanted)
                    again = luna.vae.encode(image)
                    same = luna.vae.decode(again)
                    view = luna.vae.decode(again[:, :, 8:24, 8:24])
                    results[f"{sent} to {wanted or 'gpu'}"] = [
                        [str(t.device), bits(t)] for t in (image, again, same, view)
                    ]
        say(
            by_name=len(by_name),
            backend=torch.cuda.get_allocator_backend(),
            carriers=luna.carriers,
            reasons=luna.reasons,
            results=results,
        )


def hold(megabytes: str) -> None:
    """Hold that much of results until killed; say when."""
    held = []
    with luna_mp.connect() as luna:
        while sum(t.numel() * 4 for t in held) < int(megabytes) << 20:
            held.append(luna.vae.decode(latent(edge=128)))
        torch.cuda.synchronize()
        say(held=len(held), carrier=luna.carriers["vae"])
        sys.stdin.read()


def asked() -> None:
    """A decode for each line of the input."""
    with luna_mp.connect() as luna:
        say(carrier=luna.carriers["vae"])
        for _ in sys.stdin:
            say(device=str(luna.vae.decode(latent()).device))


def elsewhere(device: str) -> None:
    """One decode by a process that computes on that GPU; whether it opened another."""
    torch.cuda.set_device(device)
    with luna_mp.connect() as luna:
        image = luna.vae.decode(latent())
        seen = range(torch.cuda.device_count())
        say(
            carriers=luna.carriers,
            reasons=luna.reasons,
            bits=bits(image),
            device=str(image.device),
            others=sum(
                torch._C._cuda_hasPrimaryContext(index)
                for index in seen
                if index != torch.device(device).index
            ),
        )


def late(device: str = "") -> None:
    """A call whose service is killed, another, and work of one's own on the stream of both."""
    zeros = torch.zeros(1, 4, 256, 256)
    with luna_mp.connect() as luna:
        say(carrier=luna.carriers["vae"])
        try:
            luna.vae.decode(zeros, device=device)
        except errors.LunaError as exc:
            say(error=type(exc).__name__, text=str(exc), ended=time.monotonic())
        again = luna.vae.decode(zeros, device=device)
        own = torch.ones(1, device="cuda").sum()
        say(sum=again.sum().item(), own=own.item(), carrier=luna.carriers["vae"])


if __name__ == "__main__":
    calls: dict[str, Any] = globals()
    calls[sys.argv[1]](*sys.argv[2:])
