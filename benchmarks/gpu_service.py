"""The service that `benchmarks.gpu` measures: `python -m benchmarks.gpu_service SOCKET FOLDER`.

A real server with a real VaeWorker over the autoencoder in that folder. Beside the worker's calls
it answers some that only measure. It prints a line when it is ready.
"""

from __future__ import annotations

import sys
import threading
import time
from multiprocessing.connection import Listener
from typing import Any

import torch
import torch.multiprocessing  # teaches connections to send tensors

from luna_mp.config import ServiceConfig
from luna_mp.manager import LocalManager
from luna_mp.models import ModelSpec, load_vae
from luna_mp.models.library import Library
from luna_mp.sessions import Sessions
from luna_mp.wire.cuda import Exporter
from luna_mp.workers.vae import VaeWorker

KEY = bytes(32)


class Measured:
    """The worker's own calls, and what only measures. Times are of the monotonic clock."""

    def __init__(self, path: str, folder: str) -> None:
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
        spec = ModelSpec((folder,), dtype="float16")
        library = Library(lambda wanted: load_vae(wanted, str(device)), spec, (), 1, device)
        self.worker = VaeWorker(library)
        self.vae = library.default
        self.made: dict[tuple[int, ...], torch.Tensor] = {}
        self.floors: list[tuple[float, float]] = []
        share = torch.cuda.get_device_properties(device).total_memory // 4
        own = (self.floor, self.parts, self.in_process, self.empty, self.resident, self.take)
        exposed = {call.__name__: call for call in (*own, self.peak, self.throughput)}
        self.server = LocalManager(
            "vae",
            {**self.worker.calls(), **exposed},
            path,
            KEY,
            Sessions(),
            ServiceConfig.max_message,
            Exporter(device, share),
        ).get_server()

    def floor(self, call: Any, latent: torch.Tensor) -> None:
        """A decode that returns nothing."""
        begun = time.perf_counter()
        self.worker.decode(call, latent)
        torch.cuda.synchronize()
        self.floors.append((begun, time.perf_counter()))

    def parts(self, call: Any) -> list[tuple[float, float]]:
        """When each call of `floor` began here and was done, since this was last asked."""
        floors, self.floors = self.floors, []
        return floors

    def in_process(self, call: Any, latent: torch.Tensor, to_host: bool) -> float:
        """Milliseconds of a decode here, with the copy to pinned memory or without.

        Of a latent in ordinary memory: that which came is pinned, and no caller's own is.
        """
        latent = latent.clone()
        torch.cuda.synchronize()
        start = time.perf_counter()
        image = self.vae.decode(latent)
        if to_host:
            image = torch.empty_like(image, device="cpu", pin_memory=True).copy_(image)
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    def empty(self, call: Any, *shape: int) -> torch.Tensor:
        """A result that took no work to make."""
        self.worker.take(call, None)
        return call.place(lambda: torch.empty(shape, device="cuda"))

    def resident(self, call: Any, *shape: int) -> torch.Tensor:
        """A tensor of the service's own, which a client gets a copy of."""
        self.worker.take(call, None)
        if shape not in self.made:
            self.made[shape] = torch.rand(shape, device="cuda")
        return self.made[shape]

    def take(self, call: Any, tensor: torch.Tensor) -> None:
        """An argument that the service's GPU reads."""
        self.worker.take(call, None)
        tensor.to("cuda")
        torch.cuda.synchronize()

    def peak(self, call: Any) -> int:
        """Bytes that were taken at most since the last time this was asked."""
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak

    def throughput(self, call: Any, latent: torch.Tensor, times: int) -> float:
        """Milliseconds for each of several decodes back to back."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            self.vae.decode(latent)
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start) / times


def pipe(listener: Listener) -> None:
    """Answer a shape with a tensor by torch.multiprocessing alone: no locks, leases or limits."""
    with listener.accept() as connection:
        while True:
            try:
                shape = connection.recv()
            except EOFError:
                return
            connection.send(torch.empty(shape, device="cuda"))


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    server = Measured(*sys.argv[1:]).server
    listener = Listener(f"{sys.argv[1]}.pipe", authkey=KEY)
    threading.Thread(target=pipe, args=(listener,), daemon=True).start()
    threading.Timer(0.0, lambda: say("ready")).start()
    server.serve_forever()
