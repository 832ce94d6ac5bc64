"""Carrier for one GPU: the tensor stays where it is, and what crosses says where that is.

    service                                       client, in cuda_client.py
    result ─ made, or copied once on the GPU,     by the CUDA runtime, or rebuild_cuda_tensor where
    into memory that holds results only ─         that is not installed: a tensor over the same
    torch's reducer ── its arguments ───────────▶ memory, which is given out once the event behind
    noted in the lease book                       the work has come
    tensor itself ◀──────── lease's number ────── the same tensor as an argument, or a view of it
    result ── copy, queued behind it ───────────▶ shared memory, for a client that wants it on its
                                                  host, which is given out once the event has come

Torch's reducer is asked once for each place in that memory, and once for each counter of holders:
both serve one result after the other, since the event that it makes with each takes longer than all
else that it does.

The service's stream is not waited for: the reply leaves when the work is queued. The client waits
on its host and queues nothing behind the event: the event of a service that is killed never comes,
and a stream that waits for it hangs for ever, with all that is queued on it later.

A tensor that a client made itself goes by another carrier, since its allocator may not be able to
share it. To copy it into memory that the service lends was measured too ("input" in the tables of
`benchmarks/results`): that is quicker for large images, and slower for latents, which are most.
"""

from __future__ import annotations

import logging
import reprlib
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import cached_property, partial

import torch

from luna_mp.errors import Rejected
from luna_mp.faults import is_gpu_fault, is_out_of_memory
from luna_mp.wire import layout
from luna_mp.wire.carrier import Carrier, CarrierFailed, Fence, Incoming, NoRoom, Outgoing, Token
from luna_mp.wire.counters import Counters, TorchCounter
from luna_mp.wire.leases import LeaseBook, Owner
from luna_mp.wire.shm import ShmCarrier

__all__ = ("HOST", "Exporter", "ExportingCarrier", "Place", "uuid_of")

logger = logging.getLogger(__name__)

HOST = "host"  # opens the token of what is copied to the host
#: bytes of a result for the host that the service copies: the client would begin its copy only when
#: it wakes. Smaller ones are kept in great numbers, and to make a segment for each takes longer;
#: what larger ones take of pinned memory would stay taken.
COPIED_HERE = range(1 << 20, (64 << 20) + 1)
MAX_PLACES = 4096  # addresses of results, of which a workflow has a few for each size

#: the number of the pool, the handle that opens a segment of it, and an offset in that, in bytes
Place = tuple[int, bytes, int]


class Exporter:
    """The service's side, one for the process: where results lie, and who holds them.

    `most` is what one client process may hold, in bytes.
    """

    def __init__(self, device: torch.device, most: int) -> None:
        self.device = device
        self.uuid = uuid_of(device.index)
        self.book: LeaseBook[torch.UntypedStorage] = LeaseBook(most)
        # A handle opens the whole of the memory that the allocator took at once, so weights must
        # not lie in it: results have a pool of their own.
        self._pool = self._new_pool()
        #: counts the pools
        self._number = 1
        # Probes export beside calls, and a pool serves one thread at a time.
        self._pool_lock = threading.Lock()
        self.book.when_idle = self._renew_pool
        self._counters = Counters(device)
        #: of memory in the pool, by its address
        self._places: dict[int, Place] = {}
        #: where that lies which was made in the pool last, and is not exported yet
        self._placed = 0
        self._beside = torch.cuda.Stream(device)
        self._of_calls = torch.cuda.default_stream(device)

    def carrier(self, owner: Owner, host: ShmCarrier) -> ExportingCarrier:
        """The service's end of one connection of that client, beside `host`."""
        return ExportingCarrier(self, owner, host)

    def beside(self) -> AbstractContextManager[object]:
        """Within, this thread's work is queued beside that of calls."""
        return torch.cuda.stream(self._beside)

    def place(self, step: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `step` makes, in the memory of results: it is exported as it is.

        Callers hold the service's lock until it is exported.
        """
        with self._pool_lock:
            with self._results():
                made = step()
            # Within the lock: what was made in a pool that is given up since is not in this one.
            self._placed = made.data_ptr()
        return made

    def export(self, tensor: torch.Tensor, owner: Owner, out: Outgoing) -> tuple[Token, bool]:
        """Where a result lies, and whether work that is queued has still to make it."""
        how, source = layout.describe(tensor)
        with self._pool_lock:
            storage = source.untyped_storage()
            if not (self._is_placed(source) and how.nbytes == storage.nbytes()):
                storage = self._copied(layout.run_of(how, source)).untyped_storage()
            # Asked before: the events that torch records are work, too, for some microseconds.
            must_wait = not self.is_done()
            place = self._places.get(storage.data_ptr())
            if place is None:
                place, counter = self._shared(storage)
            else:
                counter = self._counters.take()
        number = self.book.add(owner, how.nbytes, storage, counter)
        out.undo.append(partial(self.book.withdraw, number))
        where = (place, how.nbytes, counter.file, counter.slot, how.text)
        return (number, self.uuid, *where), must_wait

    def close(self) -> None:
        """End the lease book; nothing is exported any more."""
        self.book.close()
        # Torch warns of those that are left when the process ends.
        self._counters.forget()

    def is_done(self) -> bool:
        """Whether nothing is left on the streams of which results are exported.

        Those are `Worker.stream` and the probes'; to ask which of the two it is takes longer.
        """
        return self._of_calls.query() and self._beside.query()

    def _shared(self, storage: torch.UntypedStorage) -> tuple[Place, TorchCounter]:
        """Where memory in the pool lies, for all that will lie there; and a counter for once.

        What is in use keeps its memory from the card, as graphs of CUDA rely on too; except where
        torch was told a `max_split_size_mb`, which services are started without.
        """
        # What `reduce_tensor` calls; the rest of it, which finds a storage that was sent before,
        # has nothing to find here and takes longer than this.
        _, handle, _, offset, file, slot, *_ = storage._share_cuda_()
        place = (self._number, handle, offset)
        if self._pool.is_in_use:
            if len(self._places) >= MAX_PLACES:
                self._places.clear()
            self._places[storage.data_ptr()] = place
        return place, TorchCounter(file, slot)

    def _is_placed(self, source: torch.Tensor) -> bool:
        """Once for each: a tensor that was exported before is somebody's.

        The address is enough: the pool gives it to nothing else before the next export.
        """
        placed, self._placed = self._placed, 0
        return placed == source.data_ptr()

    def _results(self) -> AbstractContextManager[None]:
        """Within, this thread's memory is taken from that of results."""
        # Without the index torch would ask for the current device, each time.
        return torch.cuda.use_mem_pool(self._pool, self.device.index)

    def _copied(self, run: torch.Tensor) -> torch.Tensor:
        with self._results():
            fresh = torch.empty_like(run)
        return fresh.copy_(run)

    def _renew_pool(self) -> None:
        """Nothing is leased: give the pool's memory back to the card, which it does only whole."""
        with self._pool_lock:
            self._pool, self._placed = self._new_pool(), 0
            self._number += 1
            self._places.clear()
            # Each holds memory, too, if little.
            self._counters.forget()

    def _new_pool(self) -> _Pool:
        # It belongs to the current device, which is another one in the thread of the lease book.
        with torch.cuda.device(self.device):
            return _Pool()


class _Pool(torch.cuda.MemPool):
    """torch asks for the name three times a use, and to make it takes longer than the rest."""

    @cached_property
    def id(self) -> tuple[int, int]:
        return super().id

    @property
    def is_in_use(self) -> bool:
        """Whether this itself is a use of it; older torches count only what allocates there."""
        return hasattr(self, "use_count") and self.use_count() > 0


class ExportingCarrier(Carrier):
    """The service's end of one connection."""

    name = "cuda"

    def __init__(self, exporter: Exporter, owner: Owner, host: ShmCarrier) -> None:
        self._exporter = exporter
        self._owner = owner
        self._host = host
        # One for all calls: the next comes when the client has waited for the last one's.
        self._queued = torch.cuda.Event(interprocess=True)
        self._used: list[int] = []
        self._exported_last = 0  # the number of a lease

    @property
    def is_in_use(self) -> bool:
        return bool(self._used)

    def pack(self, tensor: torch.Tensor, out: Outgoing) -> Token:
        if tensor.device != self._exporter.device or not tensor.numel():
            raise NoRoom("this tensor does not lie on the service's GPU")
        try:
            return self._pack(tensor, out)
        except (RuntimeError, OSError) as exc:
            if is_gpu_fault(exc) or is_out_of_memory(exc):
                raise
            logger.warning("a result cannot be shared", exc_info=exc)
            raise CarrierFailed.by(self.name, exc) from exc

    def _pack(self, tensor: torch.Tensor, out: Outgoing) -> Token:
        if out.to_host and tensor.numel() * tensor.itemsize in COPIED_HERE:
            # A system without another descriptor or segment leaves the copy to the client.
            with suppress(NoRoom, OSError):
                return self._pack_copy(tensor, out)
        token, must_wait = self._exporter.export(tensor, self._owner, out)
        self._exported_last = token[0]
        return (*token, *self._marked(must_wait))

    def _pack_copy(self, tensor: torch.Tensor, out: Outgoing) -> Token:
        token = self._host.pack_queued(tensor, out)
        # A segment that comes back is not to be written to by what is queued.
        out.undo.append(self._queued.synchronize)
        # The result was made in the pool.
        self._exporter.book.note_use()
        return (HOST, token, *self._marked(not self._exporter.is_done()))

    def _marked(self, must_wait: bool) -> tuple[bytes, bool]:
        """The event behind what is queued on the current stream, and whether to wait for it."""
        if must_wait:
            self._queued.record()
        return self._event, must_wait

    @cached_property
    def _event(self) -> bytes:
        with torch.cuda.device(self._exporter.device):
            return bytes(self._queued.ipc_handle())

    def unpack(self, token: Token, source: Incoming) -> torch.Tensor:
        match token:
            case (int(number), int(start), how) if start >= 0:
                parsed = layout.parse(how, source.limit)
            case _:
                raise Rejected(f"a leased tensor's token is malformed: {reprlib.repr(token)}")
        held = self._exporter.book.get(number, self._owner)
        if parsed.is_packed or start + parsed.nbytes > held.nbytes():
            raise Rejected(f"a view reaches beyond lease {number} of {held.nbytes()} bytes")
        self._used.append(number)
        run = torch.empty(0, dtype=torch.uint8, device=self._exporter.device).set_(held)
        return layout.restore(parsed, run[start : start + parsed.nbytes])

    def give_up(self) -> None:
        # The probe's, of a client that may be able to let go of nothing.
        self._exporter.book.withdraw(self._exported_last)

    def settle(self, after: Fence | None) -> None:
        """The call that used leases has queued its work: they stay until `after`."""
        used, self._used = self._used, []
        if not used:
            return
        if after is None:
            after = torch.cuda.current_stream(self._exporter.device).record_event()
        for number in used:
            self._exporter.book.fence(number, after)


def uuid_of(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
