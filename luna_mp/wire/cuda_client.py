"""The client's side of `cuda.py`: tensors over the service's memory, or copied off it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress

import torch
from torch.multiprocessing import reductions

from luna_mp.wire import counters, cuda_runtime, layout
from luna_mp.wire.carrier import Carrier, CarrierFailed, Incoming, NoRoom, Outgoing, Token
from luna_mp.wire.cuda import HOST, Place, uuid_of
from luna_mp.wire.layout import Layout
from luna_mp.wire.leases import IDLE_SECONDS, Owner
from luna_mp.wire.shm import ShmCarrier

__all__ = ("Importer", "ImportingCarrier")

logger = logging.getLogger(__name__)


#: bytes; smaller copies gain nothing and may be kept in great numbers, and torch keeps what it pins
PINNED = range(1 << 20, (1 << 30) + 1)
#: a tensor over the service's memory, and what tells whether nothing uses that any more
Opened = tuple[torch.Tensor, Callable[[], bool]]
MAX_REMEMBERED = 64  # results, before those that were dropped are forgotten
#: after which mappings are given up: before the service gives its memory back to the card, which
#: has it only once nobody maps it
REST_SECONDS = IDLE_SECONDS / 2


class Importer:
    """The client's side: the one GPU that it computes on, torch's current one when first asked.

    To use another GPU's memory would open that GPU too, at hundreds of megabytes of its memory.
    """

    def __init__(self) -> None:
        self._index: int | None = None

    def uuids(self) -> list[str]:
        if self._index is None:
            self._index = torch.cuda.current_device()
        return [uuid_of(self._index)]

    def carrier(self, uuid: str, service: Owner, host: ShmCarrier) -> ImportingCarrier:
        """The client's end of one connection, beside `host`. Raises `RuntimeError`."""
        if self.uuids() != [uuid] or self._index is None:
            raise RuntimeError(f"the service offers GPU {uuid}; this process has {self.uuids()}")
        return ImportingCarrier(self._index, service, host)

    def rest(self) -> None:
        """Let go of what is kept of services' memory for the next call, if none came.

        As with `torch.cuda.empty_cache`, the driver waits here for what this process has queued on
        its GPU, and launches of other threads wait with it: once after a time of calls.
        """
        with _lock:
            memories = list(_memories.values())
        for memory in memories:
            memory.mappings.rest(REST_SECONDS)


class _Memory:
    """What this process has of one service's memory, over all its connections."""

    def __init__(self, device: torch.device) -> None:
        self.connections = 0
        self.mappings = cuda_runtime.Mappings(device)
        #: what came, by its address, to recognise it when it goes back
        self.leased: dict[int, tuple[int, Callable[[], bool]]] = {}


_memories: dict[Owner, _Memory] = {}
_lock = threading.Lock()


class ImportingCarrier(Carrier):
    """The client's end of one connection; `index` is the service's GPU as this process counts."""

    name = "cuda"

    def __init__(self, index: int, service: Owner, host: ShmCarrier) -> None:
        self._device = torch.device("cuda", index)
        self._host = host
        self._is_written: Callable[[], bool] | None = None
        # torch's own import is slower than the runtime's.
        self._by_runtime = cuda_runtime.is_there()
        if not self._by_runtime and torch.cuda.get_allocator_backend() != "native":
            cuda_runtime.require()
        self._opened_last = 0  # the number of a lease
        self._is_counted = True
        # The last step, which `close` takes back.
        with _lock:
            for old in [owner for owner in _memories if owner.is_gone()]:
                del _memories[old]
            self._memory = _memories.setdefault(service, _Memory(self._device))
            self._memory.connections += 1

    def pack(self, tensor: torch.Tensor, out: Outgoing) -> Token:
        if tensor.layout != torch.strided:
            raise NoRoom("this tensor has no memory of its own")
        storage = tensor.untyped_storage()
        number, is_over = self._memory.leased.get(storage.data_ptr(), (0, None))
        if is_over is None or is_over():
            self._memory.leased.pop(storage.data_ptr(), None)
            raise NoRoom("this tensor is not the service's")
        if tensor.is_conj() or tensor.is_neg():
            raise NoRoom("this view has other values than its memory")
        # The service's stream knows nothing of what this process has queued on the tensor.
        torch.cuda.current_stream(self._device).synchronize()
        how = layout.layout_of(tensor.dtype, tensor.shape, tensor.stride())
        return (number, tensor.storage_offset() * tensor.itemsize, how.text)

    def unpack(self, token: Token, source: Incoming) -> torch.Tensor:
        unpack = self._unpack_copy if token[0] == HOST else self._unpack_export
        try:
            return unpack(token, source)
        except RuntimeError as exc:
            raise CarrierFailed.by(self.name, exc) from exc

    def _unpack_copy(self, token: Token, source: Incoming) -> torch.Tensor:
        """What the service copies to shared memory, once that is done."""
        _, where, event, must_wait = token
        result = self._host.unpack(where, source)
        if must_wait:
            source.wait(self._written(event))
        return result

    def _unpack_export(self, token: Token, source: Incoming) -> torch.Tensor:
        """What lies in the service's memory, or a copy of it that is made here."""
        number, _, place, size, counter, slot, text, event, must_wait = token
        how = layout.parse(text, source.limit)
        if how.nbytes != size:
            raise CarrierFailed(f"cuda: a result of {how.nbytes} bytes, exported with {size} bytes")
        is_as_it_lies = not (source.to_host or how.is_packed)
        opened_as = how if is_as_it_lies else layout.bytes_of(size)
        # All that can be is done before the wait, while the service's GPU works.
        tensor, is_over = self._opened(number, opened_as, place, counter, slot)
        if is_as_it_lies:
            self._remember(number, tensor, is_over)
        target = _host_memory(size) if source.to_host else None
        if must_wait:
            source.wait(self._written(event))
        if is_as_it_lies:
            return tensor
        return layout.restore(how, tensor if target is None else target.copy_(tensor))

    def _written(self, event: bytes) -> Callable[[], bool]:
        """Of the service's one event of this connection, each time recorded anew."""
        if self._is_written is None:
            self._is_written = cuda_runtime.is_written(event, self._device)
        return self._is_written

    def discard(self, token: Token) -> None:
        if token[0] == HOST:
            return
        number, _, _, _, counter, slot, *_ = token
        # What was opened is let go of when its tensor is.
        if number != self._opened_last:
            # That its counter cannot be reached is what it was refused for.
            with suppress(OSError):
                counters.let_go(counter, slot)

    def give_up(self) -> None:
        if not self._is_counted:
            return
        self._is_counted = False
        with _lock:
            self._memory.connections -= 1
            is_last = not self._memory.connections
        if is_last:
            self._memory.mappings.close()

    def close(self) -> None:
        self._is_written = None
        self.give_up()

    def _opened(self, number: int, how: Layout, place: Place, counter: bytes, slot: int) -> Opened:
        """The whole export, so laid out, which may be still to be written. Nothing is queued."""
        # Before the GPU's memory, which nobody would learn that it was let go of.
        counters.reach(counter)
        # First: after an interrupt, to let go never is mended when this process ends, and twice is
        # mended by nothing.
        self._opened_last = number
        pool, handle, offset = place
        try:
            if self._by_runtime:
                segment = self._memory.mappings.segment(handle, pool)
                return cuda_runtime.over(segment, offset, how, counter, slot, self._device)
            run = self._rebuilt(handle, how.nbytes, offset, counter, slot)
        except Exception:
            self._opened_last = 0
            raise
        return layout.restore(how, run), reductions.StorageWeakRef(run.untyped_storage()).expired

    def _rebuilt(
        self, handle: bytes, size: int, offset: int, counter: bytes, slot: int
    ) -> torch.Tensor:
        """By torch's own import."""
        with torch.cuda.device(self._device):
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
                counter,
                slot,
                b"",
                False,  # not to wait for the event on this process's stream
            )
        return run

    def _remember(self, number: int, tensor: torch.Tensor, is_over: Callable[[], bool]) -> None:
        leased = self._memory.leased
        if len(leased) > MAX_REMEMBERED:
            for at, (_, is_dropped) in list(leased.items()):
                if is_dropped():
                    leased.pop(at, None)
        leased[tensor.data_ptr()] = (number, is_over)


def _host_memory(nbytes: int) -> torch.Tensor:
    """uint8 [nbytes], pinned where that helps and can be had."""
    if nbytes in PINNED:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as exc:
            logger.debug("%d bytes cannot be pinned: %s", nbytes, exc)
    return torch.empty(nbytes, dtype=torch.uint8)
