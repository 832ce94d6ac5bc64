"""The client's side of `cuda.py`: tensors over the service's memory, or copied off it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch.multiprocessing import reductions

from luna_mp.wire import cuda_runtime, layout
from luna_mp.wire.carrier import Carrier, CarrierFailed, Incoming, NoRoom, Outgoing, Token
from luna_mp.wire.cuda import HOST, uuid_of
from luna_mp.wire.leases import Owner
from luna_mp.wire.shm import ShmCarrier

__all__ = ("Importer", "ImportingCarrier")

logger = logging.getLogger(__name__)


#: bytes; smaller copies gain nothing and may be kept in great numbers, and torch keeps what it pins
PINNED = range(1 << 20, (1 << 30) + 1)
MAX_REMEMBERED = 64  # results, before those that were dropped are forgotten


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


# By service and address: what came from it over any connection, to recognise it when it goes back.
_leased: dict[Owner, dict[int, tuple[int, reductions.StorageWeakRef]]] = {}


class ImportingCarrier(Carrier):
    """The client's end of one connection; `index` is the service's GPU as this process counts."""

    name = "cuda"

    def __init__(self, index: int, service: Owner, host: ShmCarrier) -> None:
        self._device = torch.device("cuda", index)
        self._host = host
        self._is_copied: Callable[[], bool] | None = None
        for old in [owner for owner in _leased if owner.is_gone()]:
            _leased.pop(old, None)
        self._leased = _leased.setdefault(service, {})
        # torch's own import is slower than the runtime's.
        self._by_runtime = cuda_runtime.is_there()
        if not self._by_runtime and torch.cuda.get_allocator_backend() != "native":
            cuda_runtime.require()
        self._mappings = cuda_runtime.Mappings(self._device)
        self._opened_last = 0  # the number of a lease

    def pack(self, tensor: torch.Tensor, out: Outgoing) -> Token:
        storage = tensor.untyped_storage()
        number, alive = self._leased.get(storage.data_ptr(), (0, None))
        if alive is None or alive.expired():
            self._leased.pop(storage.data_ptr(), None)
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
            raise CarrierFailed(f"cuda: {str(exc).splitlines()[0]}") from exc

    def _unpack_copy(self, token: Token, source: Incoming) -> torch.Tensor:
        """What the service copies to shared memory, once that is done."""
        _, where, event, must_wait = token
        result = self._host.unpack(where, source)
        if must_wait:
            if self._is_copied is None:
                self._is_copied = cuda_runtime.is_written(event, self._device)
            source.wait(self._is_copied)
        return result

    def _unpack_export(self, token: Token, source: Incoming) -> torch.Tensor:
        """What lies in the service's memory, or a copy of it that is made here."""
        number, _, *export, event, must_wait, how = token
        parsed = layout.parse(how, source.limit)
        # All that can be is done before the wait, while the service's GPU works.
        run = self._opened(number, *export)
        target = _host_memory(parsed.nbytes) if source.to_host else None
        if target is None:
            self._remember(number, run)
        result = None
        if not parsed.is_packed:
            result = layout.restore(parsed, run if target is None else target)
        if must_wait:
            source.wait(cuda_runtime.is_written(event, self._device))
        if target is not None:
            run = target.copy_(run)
        return layout.restore(parsed, run) if result is None else result

    def discard(self, token: Token) -> None:
        if token[0] == HOST:
            return
        number, _, _, _, _, counter, slot, *_ = token
        # What was opened is let go of when its tensor is.
        if number != self._opened_last:
            cuda_runtime.release(counter, slot)

    def close(self) -> None:
        self._mappings.close()

    def _opened(
        self, number: int, handle: bytes, size: int, offset: int, counter: bytes, slot: int
    ) -> torch.Tensor:
        """The whole export, uint8 [size], which may be still to be written. Nothing is queued."""
        # First: after an interrupt, to let go never is mended when this process ends, and twice is
        # mended by nothing.
        self._opened_last = number
        try:
            if self._by_runtime:
                segment = self._mappings.segment(handle)
                return cuda_runtime.over(segment, size, offset, counter, slot, self._device)
            return self._rebuilt(handle, size, offset, counter, slot)
        except RuntimeError:
            self._opened_last = 0
            raise

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

    def _remember(self, number: int, run: torch.Tensor) -> None:
        if len(self._leased) > MAX_REMEMBERED:
            for at, (_, alive) in list(self._leased.items()):
                if alive.expired():
                    self._leased.pop(at, None)
        storage = run.untyped_storage()
        self._leased[storage.data_ptr()] = (number, reductions.StorageWeakRef(storage))


def _host_memory(nbytes: int) -> torch.Tensor:
    """uint8 [nbytes], pinned where that helps and can be had."""
    if nbytes in PINNED:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as exc:
            logger.debug("%d bytes cannot be pinned: %s", nbytes, exc)
    return torch.empty(nbytes, dtype=torch.uint8)
