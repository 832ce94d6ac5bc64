"""Carrier for one GPU: the tensor stays where it is, and what crosses says where that is.

    service                                       client
    result ─ copied once on the GPU into          torch's rebuild_cuda_tensor, or, where its
    memory that holds results only ─              allocator is cudaMallocAsync, the CUDA runtime:
    torch's reduce_tensor ── arguments ─────────▶ a tensor over the same memory, ordered behind
    noted in the lease book                       the service's work by the reducer's event
    tensor itself ◀──────── lease's number ────── the same tensor as an argument, or a view of it

The service's stream is not waited for: the reply leaves when the work is queued. A tensor that a
client made itself goes by another carrier, since its allocator may not be able to share it.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
import weakref
from functools import cache, lru_cache
from typing import Any

import torch
from torch.multiprocessing import reductions

from luna_mp.errors import Rejected
from luna_mp.wire import layout
from luna_mp.wire.carrier import Carrier, CarrierFailed, Fence, Incoming, NoRoom, Outgoing, Token
from luna_mp.wire.layout import Layout
from luna_mp.wire.leases import LeaseBook, Owner

__all__ = ("Exporter", "ExportingCarrier", "Importer", "ImportingCarrier")

logger = logging.getLogger(__name__)

COUNTER_BYTES = 8
COUNTERS_START = 64  # torch's shared memory opens with a header of its own
HANDLE_BYTES = 64  # of cudaIpcMemHandle_t and of cudaIpcEventHandle_t
PLAIN_HANDLE = b"c"  # torch's mark for memory of cudaMalloc, before the handle's own bytes
MAX_MAPPINGS = 64  # segments of the service that a client keeps open between calls


class Exporter:
    """The service's side, one for the process: where results lie, and who holds them.

    `most` is what one client process may hold, in bytes.
    """

    def __init__(self, device: torch.device, most: int) -> None:
        self.device = device
        self.uuid = uuid_of(device.index)
        self.book: LeaseBook[torch.Tensor] = LeaseBook(most)
        # A handle opens the whole of the memory that the allocator took at once, so weights must
        # not lie in it: results have a pool of their own, and are copied into it on the GPU.
        self._pool = torch.cuda.MemPool()
        # Connections export side by side, and a pool serves one thread at a time.
        self._pool_lock = threading.Lock()
        self.book.when_idle = self._renew_pool
        # The copy is not made behind the next client's work, which may be queued by now.
        self.stream = torch.cuda.Stream(device)

    def carrier(self, owner: Owner) -> ExportingCarrier:
        """The service's end of one connection of that client."""
        return ExportingCarrier(self, owner)

    def export(self, tensor: torch.Tensor, owner: Owner, after: Fence | None) -> Token:
        """Token for a result; `after` is the event behind the work that makes it."""
        how, run = layout.flatten(tensor)
        # What the client dropped since is used again for this.
        self.book.collect()
        with torch.cuda.stream(self.stream):
            if isinstance(after, torch.cuda.Event):
                self.stream.wait_event(after)
            else:
                self.stream.wait_stream(torch.cuda.default_stream(self.device))
            with self._pool_lock, torch.cuda.use_mem_pool(self._pool):
                fresh = torch.empty_like(run)
            fresh.copy_(run)
            run.record_stream(self.stream)
            _, arguments = reductions.reduce_tensor(fresh)
        handle, size, offset = arguments[7:10]
        counter, slot, event, must_sync = arguments[11:15]
        number = self.book.add(owner, fresh.numel(), fresh, _TorchCounter(counter, slot))
        return (number, self.uuid, handle, size, offset, counter, slot, event, must_sync, *how)

    def _renew_pool(self) -> None:
        """Nothing is leased: give the pool's memory back to the card, which it does only whole."""
        with self._pool_lock:
            self._pool = torch.cuda.MemPool()


class ExportingCarrier(Carrier):
    """The service's end of one connection."""

    name = "cuda"

    def __init__(self, exporter: Exporter, owner: Owner) -> None:
        self._exporter = exporter
        self._owner = owner
        self._used: list[int] = []

    def pack(self, tensor: torch.Tensor, out: Outgoing) -> Token:
        if out.to_host or tensor.device != self._exporter.device or not tensor.numel():
            raise NoRoom("this tensor does not stay on the service's GPU")
        return self._exporter.export(tensor, self._owner, out.after)

    def unpack(self, token: Token, source: Incoming) -> torch.Tensor:
        match token:
            case (int(number), int(start), *how) if start >= 0:
                parsed = layout.parse(tuple(how), source.limit)
            case _:
                raise Rejected(f"a leased tensor's token is malformed: {str(token)[:200]}")
        held = self._exporter.book.get(number, self._owner)
        if parsed.is_packed or start + parsed.nbytes > held.numel():
            raise Rejected(f"a view reaches beyond lease {number} of {held.numel()} bytes")
        self._used.append(number)
        torch.cuda.current_stream(held.device).wait_stream(self._exporter.stream)
        return layout.restore(parsed, held[start : start + parsed.nbytes])

    def settle(self, after: Fence | None) -> None:
        """The call that used leases has queued its work: they stay until `after`."""
        used, self._used = self._used, []
        for number in used:
            if after is None:
                after = torch.cuda.default_stream(self._exporter.device).record_event()
            self._exporter.book.fence(number, after)


class Importer:
    """The client's side, one for the process: the GPUs that it sees. Asked first, it opens them."""

    def uuids(self) -> list[str]:
        return [uuid_of(index) for index in range(torch.cuda.device_count())]

    def carrier(self, uuid: str, service: Owner) -> ImportingCarrier:
        """The client's end of one connection. Raises `RuntimeError`."""
        return ImportingCarrier(self.uuids().index(uuid), service)


# By service and address: what came from it over any connection, to recognise it when it goes back.
_leased: dict[Owner, dict[int, tuple[int, reductions.StorageWeakRef]]] = {}


class ImportingCarrier(Carrier):
    """The client's end of one connection; `index` is the service's GPU as this process counts."""

    name = "cuda"

    def __init__(self, index: int, service: Owner) -> None:
        self._device = torch.device("cuda", index)
        self._leased = _leased.setdefault(service, {})
        self._is_native = torch.cuda.get_allocator_backend() == "native"
        if not self._is_native:
            _runtime()
        self._mappings = _Mappings(self._device)

    def pack(self, tensor: torch.Tensor, out: Outgoing) -> Token:
        storage = tensor.untyped_storage()
        number, alive = self._leased.get(storage.data_ptr(), (0, None))
        if alive is None or alive.expired():
            self._leased.pop(storage.data_ptr(), None)
            raise NoRoom("this tensor is not the service's")
        # The service's stream knows nothing of what this process has queued on the tensor.
        torch.cuda.current_stream(self._device).synchronize()
        how = Layout(layout.name_of(tensor.dtype), tuple(tensor.shape), tensor.stride(), False)
        return (number, tensor.storage_offset() * tensor.itemsize, *how)

    def unpack(self, token: Token, source: Incoming) -> torch.Tensor:
        number, _, handle, size, offset, counter, slot, event, must_sync, *how = token
        parsed = layout.parse(tuple(how), source.limit)
        try:
            with torch.cuda.device(self._device):
                self._mappings.keep(handle)
                if self._is_native:
                    run = self._rebuild(handle, size, offset, counter, slot, event, must_sync)
                else:
                    run = _over_foreign_memory(
                        self._mappings, handle, size, offset, counter, slot, event
                    )
        except RuntimeError as exc:
            raise CarrierFailed(f"cuda: {str(exc).splitlines()[0]}") from exc
        run = run[: parsed.nbytes]
        self._remember(number, run)
        return layout.restore(parsed, run)

    def close(self) -> None:
        self._mappings.close()

    def _rebuild(self, handle: bytes, size: int, offset: int, *rest: Any) -> torch.Tensor:
        run: torch.Tensor = reductions.rebuild_cuda_tensor(
            torch.Tensor,
            torch.Size((size,)),
            (1,),
            0,
            torch.storage.TypedStorage,
            torch.uint8,
            self._device.index,
            handle,
            size,
            offset,
            False,
            *rest,
        )
        return run

    def _remember(self, number: int, run: torch.Tensor) -> None:
        for at, (_, alive) in list(self._leased.items()):
            if alive.expired():
                self._leased.pop(at, None)
        storage = run.untyped_storage()
        self._leased[storage.data_ptr()] = (number, reductions.StorageWeakRef(storage))


class _TorchCounter:
    """The counter that torch puts in a file of its own under /dev/shm, one int64 an export."""

    def __init__(self, file: bytes, slot: int) -> None:
        self._file = file
        self._slot = slot
        self._memory = _counters(file)
        if self.value() != 1:
            raise RuntimeError(f"torch {torch.__version__} keeps its counters where we do not look")

    def value(self) -> int:
        start = COUNTERS_START + self._slot * COUNTER_BYTES
        return int.from_bytes(self._memory[start : start + COUNTER_BYTES], "little", signed=True)

    def release(self) -> None:
        torch.UntypedStorage._release_ipc_counter_cuda(self._file, self._slot)


# The newest only, which the next exports will use: torch begins another for each 10,000, and
# counters that are in use keep their own.
@lru_cache(maxsize=1)
def _counters(file: bytes) -> mmap.mmap:
    fd = os.open(b"/dev/shm/" + file.lstrip(b"/"), os.O_RDONLY)
    try:
        return mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    finally:
        os.close(fd)


class _Mappings:
    """Segments of the service, kept open so that the next result in one costs microseconds.

    The driver counts: a segment stays mapped as long as one tensor or this object has it open.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: dict[bytes, int] = {}

    def keep(self, handle: bytes) -> None:
        """Have the segment open until it is one of the longest unused, or until `close`."""
        if handle in self._open or not _has_runtime():
            return
        while len(self._open) >= MAX_MAPPINGS:
            _close(self._device, self._open.pop(next(iter(self._open))))
        self._open[handle] = _open(handle)

    def close(self) -> None:
        while self._open:
            _close(self._device, self._open.popitem()[1])


def _over_foreign_memory(
    mappings: _Mappings,
    handle: bytes,
    size: int,
    offset: int,
    counter: bytes,
    slot: int,
    event: bytes,
) -> torch.Tensor:
    """What `rebuild_cuda_tensor` does, for an allocator that cannot: uint8 [size]."""
    runtime = _runtime()
    base = _open(handle)
    owner = _Foreign(base + offset, size)
    stream = torch.cuda.current_stream()
    weakref.finalize(owner, _let_go, base, counter, slot, stream.device).atexit = False
    shared = runtime.cudaIpcEventHandle_t()
    shared.reserved = event
    opened = _checked(runtime.cudaIpcOpenEventHandle(shared))
    _checked(runtime.cudaStreamWaitEvent(stream.cuda_stream, opened, 0))
    _checked(runtime.cudaEventDestroy(opened))
    return torch.as_tensor(owner, device=stream.device)


class _Foreign:
    """Memory that torch did not allocate, in the form in which torch takes it."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (size,),
            "typestr": "|u1",
            "strides": None,
            "version": 3,
        }


def _let_go(base: int, counter: bytes, slot: int, device: torch.device) -> None:
    """The tensor's memory is no longer used: wait for what reads it, then tell the service."""
    torch.cuda.current_stream(device).synchronize()
    torch.UntypedStorage._release_ipc_counter_cuda(counter, slot)
    _close(device, base)


def _open(handle: bytes) -> int:
    if handle[-HANDLE_BYTES - 1 : -HANDLE_BYTES] != PLAIN_HANDLE:
        raise RuntimeError("the service's memory is not of cudaMalloc: is its allocator native?")
    runtime = _runtime()
    shared = runtime.cudaIpcMemHandle_t()
    shared.reserved = handle[-HANDLE_BYTES:]
    flags = runtime.cudaIpcMemLazyEnablePeerAccess
    return int(_checked(runtime.cudaIpcOpenMemHandle(shared, flags)))


def _close(device: torch.device, base: int) -> None:
    with torch.cuda.device(device):
        _checked(_runtime().cudaIpcCloseMemHandle(base))


def _checked(answer: tuple[Any, ...]) -> Any:
    """The value of a call of the runtime. Raises `RuntimeError` with the error's name."""
    status, *values = answer
    if int(status):
        raise RuntimeError(f"the CUDA runtime says {status.name}")
    return values[0] if values else None


def _has_runtime() -> bool:
    try:
        _runtime()
    except RuntimeError:
        return False
    return True


@cache
def _runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as exc:
        raise RuntimeError(
            "this process's allocator is cudaMallocAsync, which needs the package cuda-bindings: "
            "pip install cuda-bindings"
        ) from exc
    return runtime


def uuid_of(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
