"""Memory of another process by the CUDA runtime: what torch's own import does, under any allocator.

torch opens such memory through its allocator, and cudaMallocAsync, which ComfyUI selects on nearly
every card, cannot. The driver counts: to open a segment twice is to close it twice.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from luna_mp.wire import counters
from luna_mp.wire.layout import DTYPES, Layout
from luna_mp.wire.loans import when_over

__all__ = ("Mappings", "Segment", "is_there", "is_written", "over", "require")

HANDLE_BYTES = 64  # of cudaIpcMemHandle_t
PLAIN_HANDLE = b"c"  # torch's mark for memory of cudaMalloc, before the handle's own bytes
# Of the interface by which torch takes foreign memory; what it has no name for goes by its size.
FLOATS = {"float16": "<f2", "float32": "<f4", "float64": "<f8"}
BY_SIZE = {1: "|u1", 2: "<i2", 4: "<i4", 8: "<i8", 16: "<c16"}
MAX_MAPPINGS = 64  # segments of the service that a client keeps open between calls


class Segment:
    """A segment of another process, mapped until nothing refers to this; `base` is its address."""

    def __init__(self, handle: bytes, device: torch.device) -> None:
        with torch.cuda.device(device):
            self.base = _open(handle)
        weakref.finalize(self, _close, device, self.base).atexit = False


class Mappings:
    """Segments of a service, kept mapped so that the next result in one costs microseconds.

    One for all connections of this process: the driver gives a handle that is open the mapping that
    it has.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._pool = 0
        self._segments: dict[bytes, Segment] = {}
        self._used_last = 0.0

    def segment(self, handle: bytes, pool: int) -> Segment:
        """Kept until it is one of the longest here, or until `close`. Raises `RuntimeError`.

        `pool` is the number of the service's pool. What lay in another is the card's again, and a
        handle may come to mean something else.
        """
        with self._lock:
            if pool != self._pool:
                self._segments.clear()
                self._pool = pool
            self._used_last = time.monotonic()
            if handle not in self._segments:
                while len(self._segments) >= MAX_MAPPINGS:
                    self._segments.pop(next(iter(self._segments)))
                self._segments[handle] = Segment(handle, self._device)
            return self._segments[handle]

    def rest(self, seconds: float) -> None:
        """Keep nothing if none was asked for in that time."""
        if time.monotonic() - self._used_last > seconds:
            self.close()

    def close(self) -> None:
        """Keep nothing; what tensors use stays mapped."""
        with self._lock:
            self._segments.clear()


def is_there() -> bool:
    """Whether the bindings are installed."""
    try:
        require()
    except RuntimeError:
        return False
    return True


def over(
    segment: Segment, offset: int, how: Layout, counter: bytes, slot: int, device: torch.device
) -> tuple[torch.Tensor, Callable[[], bool]]:
    """What `rebuild_cuda_tensor` does, without torch's allocator: a tensor so laid out on `device`.

    With it comes what tells whether nothing uses its memory any more. It queues nothing; use it
    once what the service writes there is done. Raises `RuntimeError`.
    """
    owner = _Foreign(segment.base + offset, how)
    tensor = torch.as_tensor(owner, device=device)
    if how.dtype not in FLOATS:
        tensor = tensor.view(DTYPES[how.dtype])
    # The last step: where another fails, nothing is to be let go of.
    return tensor, when_over(owner, partial(_let_go, segment, counter, slot, device))


class _Foreign:
    """Memory that torch did not allocate, in the form in which torch takes it.

    https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html
    """

    def __init__(self, address: int, how: Layout) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": how.shape,
            "typestr": FLOATS.get(how.dtype) or BY_SIZE[how.itemsize],
            "strides": how.steps,
            "version": 3,
        }


def _let_go(segment: Segment, counter: bytes, slot: int, device: torch.device) -> None:
    """The tensor's memory is no longer used: wait for what reads it, then tell the service."""
    stream = torch.cuda.current_stream(device)
    try:
        stream.synchronize()
    except KeyboardInterrupt:
        # Python shows it and goes on, so the lease would be lost.
        stream.synchronize()
        counters.let_go(counter, slot)
        raise
    counters.let_go(counter, slot)


def is_written(event: bytes, device: torch.device) -> Callable[[], bool]:
    """Asks whether the work is done that the service recorded this event behind."""
    asked: Callable[[], bool] = torch.cuda.Event.from_ipc_handle(device, event).query
    return asked


def _open(handle: bytes) -> int:
    if handle[-HANDLE_BYTES - 1 : -HANDLE_BYTES] != PLAIN_HANDLE:
        raise RuntimeError("the service's memory is not of cudaMalloc: is its allocator native?")
    runtime = require()
    shared = runtime.cudaIpcMemHandle_t()
    shared.reserved = handle[-HANDLE_BYTES:]
    flags = runtime.cudaIpcMemLazyEnablePeerAccess
    return int(_checked(runtime.cudaIpcOpenMemHandle(shared, flags)))


def _close(device: torch.device, base: int) -> None:
    with torch.cuda.device(device):
        _checked(require().cudaIpcCloseMemHandle(base))


def _checked(answer: tuple[Any, ...]) -> Any:
    """The value of a call of the runtime. Raises `RuntimeError` with the error's name."""
    status, *values = answer
    if int(status):
        raise RuntimeError(f"the CUDA runtime says {status.name}")
    return values[0] if values else None


@cache
def require() -> Any:
    """The runtime's bindings. Raises `RuntimeError` where they are not installed."""
    try:
        from cuda.bindings import runtime
    except ImportError as exc:
        raise RuntimeError(
            "this process's allocator is cudaMallocAsync, which needs the package cuda-bindings: "
            "pip install cuda-bindings"
        ) from exc
    return runtime
