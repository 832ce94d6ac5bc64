"""What the CLIP and the VAE worker have in common: a library of models under one fair lock."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Generic

import torch

from luna_mp.errors import Rejected
from luna_mp.models.library import Key, Library, M
from luna_mp.workers import memory
from luna_mp.workers.queue import Call, SingleFlight

__all__ = ("Worker",)


class Worker(Generic[M]):
    """Every exposed method takes the call first; results are data and tensors.

    Arguments were made, and methods are called, in `torch.inference_mode()`.
    """

    def __init__(self, library: Library[M]) -> None:
        self.library = library
        self.flight = SingleFlight()

    @property
    def device(self) -> torch.device:
        return self.library.device

    @cached_property
    def stream(self) -> torch.cuda.Stream | None:
        """The one that every call queues its work on, where that is on a GPU."""
        return torch.cuda.default_stream(self.device) if self.device.type == "cuda" else None

    def calls(self) -> dict[str, Callable[..., Any]]:
        """The methods that every authenticated client may call."""
        return {"load": self.load, "ping": self.ping, "status": self.status}

    def ping(self, call: Call) -> None:
        """Nothing, as fast as the wire can: to see who is there, and what a call costs."""

    def load(self, call: Call, model: dict[str, Any]) -> dict[str, Any]:
        """Load a model from an allowed directory ahead of its first use."""
        _, loaded = self.take(call, model, gives_tensors=False)
        return {"dtype": str(loaded.dtype), "bytes": loaded.weight_bytes()}

    def unload(self, call: Call, model: dict[str, Any]) -> bool:
        """Let go of a model that a client loaded; False when it was not there."""
        with self.flight.turn(call):
            was_there = self.library.unload(model)
            memory.free(self.device)
            return was_there

    def status(self, call: Call) -> dict[str, Any]:
        """Queue, models and memory; waits for nobody."""
        return {
            "device": str(self.device),
            "queue": self.flight.to_data(),
            "models": self.library.to_data(),
            "memory": memory.used(self.device),
        }

    def take(
        self, call: Call, wanted: dict[str, Any] | None, gives_tensors: bool = True
    ) -> tuple[Key, M]:
        """The model, with its turn, which the call holds until its reply is packed.

        Raises `OutOfMemory` for a call that `gives_tensors` to a client which holds too many.
        """
        if wanted is not None and not isinstance(wanted, dict):
            raise Rejected(f"a model is named by a dict with paths, not by {wanted!r:.100}")
        call.hold(_Turn(self, call, gives_tensors))
        return self.library.get(wanted)


class _Turn:
    """The lock, and the device, which belongs to this thread."""

    def __init__(self, worker: Worker[Any], call: Call, gives_tensors: bool) -> None:
        self._worker = worker
        self._call = call
        self._gives_tensors = gives_tensors

    def __enter__(self) -> None:
        if (stream := self._worker.stream) is not None:
            torch.cuda.set_device(stream.device_index)
        flight, call = self._worker.flight, self._call
        while True:
            # Outside the lock: who holds too much keeps nobody else waiting.
            if self._gives_tensors:
                call.wait_for_room()
            self._ticket = flight.enter(call)
            # Meanwhile another call of the same client may have taken the room.
            if not self._gives_tensors or call.has_room():
                return
            flight.step_back(self._ticket)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None and self._worker.stream is not None:
                memory.drop_workspaces()
                # Before the next in line queues its own: this work alone is waited for.
                self._call.after = self._worker.stream.record_event()
        finally:
            self._worker.flight.leave(self._ticket)
