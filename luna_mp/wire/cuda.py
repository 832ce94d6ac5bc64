"""Carrier for one GPU: the tensor stays where it is, and what crosses says where that is.

    service                                       client, in cuda_client.py
    result ─ made, or copied once on the GPU,     by the CUDA runtime, or rebuild_cuda_tensor where
    into memory that holds results only ─         that is not installed: a tensor over the same
    torch's reducer ── its arguments ───────────▶ memory, which is given out once the reducer's
    noted in the lease book                       event has come
    tensor itself ◀──────── lease's number ────── the same tensor as an argument, or a view of it
    result ── copy, queued behind it ───────────▶ shared memory, for a client that wants it on its
                                                  host, which is given out once the event has come

The service's stream is not waited for: the reply leaves when the work is queued. The client waits
on its host and queues nothing behind the event: the event of a service that is killed never comes,
and a stream that waits for it hangs for ever, with all that is queued on it later.

A tensor that a client made itself goes by another carrier, since its allocator may not be able to
share it. To copy it into memory that the service lends was measured too ("input" in the tables of
`benchmarks/results`): that is quicker for large images, and slower for latents, which are most.
"""

from __future__ import annotations

import logging
import mmap
import os
import reprlib
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import cached_property, lru_cache

import torch

from luna_mp.errors import Rejected
from luna_mp.wire import layout
from luna_mp.wire.carrier import Carrier, Fence, Incoming, NoRoom, Outgoing, Token
from luna_mp.wire.leases import LeaseBook, Owner
from luna_mp.wire.shm import ShmCarrier

__all__ = ("HOST", "Exporter", "ExportingCarrier", "uuid_of")

logger = logging.getLogger(__name__)

COUNTER_BYTES = 8
COUNTERS_START = 64  # torch's shared memory opens with a header of its own
HOST = "host"  # opens the token of what is copied to the host
#: bytes of a result for the host that the service copies: the client would begin its copy only when
#: it wakes. Smaller ones are kept in great numbers, and to make a segment for each takes longer;
#: what larger ones take of pinned memory would stay taken.
COPIED_HERE = range(1 << 20, (64 << 20) + 1)


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
        # Probes export beside calls, and a pool serves one thread at a time.
        self._pool_lock = threading.Lock()
        self.book.when_idle = self._renew_pool
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

    def export(self, tensor: torch.Tensor, owner: Owner, out: Outgoing) -> Token:
        """Token for a result, ready when the work that is queued on the current stream is done."""
        how, source = layout.describe(tensor)
        with self._pool_lock:
            storage = source.untyped_storage()
            if not (self._is_placed(source) and how.nbytes == storage.nbytes()):
                storage = self._copied(layout.run_of(how, source)).untyped_storage()
            # Asked before: the event that torch records now is work, too, for some microseconds.
            is_ready = self.is_done()
            # What `reduce_tensor` calls; the rest of it, which finds a storage that was sent
            # before, has nothing to find here and takes longer than this.
            _, handle, size, offset, *signs = storage._share_cuda_()
        counter, slot, event, must_wait = signs
        counts = _TorchCounter(counter, slot)
        number = self.book.add(owner, how.nbytes, storage, counts)
        out.undo.append(counts.release)
        must_wait = must_wait and not (is_ready or self.is_done())
        return (number, self.uuid, handle, size, offset, counter, slot, event, must_wait, how.text)

    def is_done(self) -> bool:
        """Whether nothing is left on the streams of which results are exported.

        Those are `Worker.stream` and the probes'; to ask which of the two it is takes longer.
        """
        return self._of_calls.query() and self._beside.query()

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

    def _new_pool(self) -> _Pool:
        # It belongs to the current device, which is another one in the thread of the lease book.
        with torch.cuda.device(self.device):
            return _Pool()


class _Pool(torch.cuda.MemPool):
    """torch asks for the name three times a use, and to make it takes longer than the rest."""

    @cached_property
    def id(self) -> tuple[int, int]:
        return super().id


class ExportingCarrier(Carrier):
    """The service's end of one connection."""

    name = "cuda"

    def __init__(self, exporter: Exporter, owner: Owner, host: ShmCarrier) -> None:
        self._exporter = exporter
        self._owner = owner
        self._host = host
        # One for all calls: the next comes when the client has waited for the last one's.
        self._copied = torch.cuda.Event(interprocess=True)
        self._copied_handle = b""
        self._used: list[int] = []

    @property
    def is_in_use(self) -> bool:
        return bool(self._used)

    def pack(self, tensor: torch.Tensor, out: Outgoing) -> Token:
        if tensor.device != self._exporter.device or not tensor.numel():
            raise NoRoom("this tensor does not lie on the service's GPU")
        if out.to_host and tensor.numel() * tensor.itemsize in COPIED_HERE:
            with suppress(NoRoom):
                return self._pack_copy(tensor, out)
        return self._exporter.export(tensor, self._owner, out)

    def _pack_copy(self, tensor: torch.Tensor, out: Outgoing) -> Token:
        token = self._host.pack_queued(tensor, out)
        self._copied.record()
        # A segment that comes back is not to be written to by what is queued.
        out.undo.append(self._copied.synchronize)
        self._copied_handle = self._copied_handle or self._copied.ipc_handle()
        # The result was made in the pool.
        self._exporter.book.note_use()
        return (HOST, token, self._copied_handle, not self._exporter.is_done())

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

    def settle(self, after: Fence | None) -> None:
        """The call that used leases has queued its work: they stay until `after`."""
        used, self._used = self._used, []
        if not used:
            return
        if after is None:
            after = torch.cuda.current_stream(self._exporter.device).record_event()
        for number in used:
            self._exporter.book.fence(number, after)


class _TorchCounter:
    """The counter that torch puts in a file of its own under /dev/shm, one int64 an export."""

    def __init__(self, file: bytes, slot: int) -> None:
        self._memory = _counters(file)
        self._at = COUNTERS_START // COUNTER_BYTES + slot
        if self.value() != 1:
            raise RuntimeError(f"torch {torch.__version__} keeps its counters where we do not look")

    def value(self) -> int:
        count: int = self._memory[self._at]
        return count

    def release(self) -> None:
        # Not one less, as torch does: it keeps memory for ever that was let go of once too often.
        self._memory[self._at] = 0


# The newest only, which the next exports will use: torch begins another for each 10,000, and
# counters that are in use keep their own.
@lru_cache(maxsize=1)
def _counters(file: bytes) -> memoryview:
    """The file as int64s; it stays mapped as long as this is kept."""
    fd = os.open(b"/dev/shm/" + file.lstrip(b"/"), os.O_RDWR)
    try:
        return memoryview(mmap.mmap(fd, 0)).cast("q")
    finally:
        os.close(fd)


def uuid_of(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
