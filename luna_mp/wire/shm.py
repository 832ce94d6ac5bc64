"""Carrier for one host: shared memory that both ends map, kept and used again.

A segment belongs to one direction of one connection. Its first page holds one word, the rest the
tensor's run:

    | state: 0 free, 1 lent | …page… | run of at most `capacity` bytes |

The sender takes a free segment, sets the word, writes the run and sends the segment's number. The
receiver's tensor lies over the mapping; when its memory is let go, the receiver clears the word.
Only the sender sets it and only the receiver clears it, so no message and no lock is needed. What
leaves as soon as it is packed goes first, and the run is written while the receiver wakes and
reads: then one byte follows the message.

Segments have no name in any file system: a sealed memfd travels beside the message that uses it
first. So nothing is left behind, whichever end is killed. A fork of the receiver shares what it
has: it lets go of nothing for its parent, but what one of them writes there the other reads.
"""

from __future__ import annotations

import mmap
import os
import reprlib
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch

from luna_mp.errors import Rejected
from luna_mp.wire import layout
from luna_mp.wire.carrier import Carrier, Incoming, NoRoom, Outgoing, Token
from luna_mp.wire.copies import bring, bring_off, queue_off
from luna_mp.wire.loans import when_over
from luna_mp.wire.stream import MAX_FDS

__all__ = ("MAX_SEGMENT_BYTES", "ShmCarrier", "is_supported")

HEADER = mmap.PAGESIZE  # keeps the run page-aligned, as pinning wants it
SMALLEST = 1 << 20
MAX_SEGMENT_BYTES = 4 << 30  # held by one direction of one connection
MAX_SEGMENTS = 64  # likewise; each costs a descriptor at both ends
IDLE_ROUNDS = 64  # a free segment that many tensors did not want is given back

FREE, LENT = b"\0", b"\1"
WRITTEN = memoryview(b"\1")  # follows a message whose run was written after it left


def is_supported() -> bool:
    return hasattr(os, "memfd_create")


class ShmCarrier(Carrier):
    """Both directions of one connection.

    What is sent and what is received can be registered with CUDA, where this process has it, for
    copies that are fast and can be queued. A received tensor that is pinned must not be dropped
    before a queued copy has read it; so clients, whose callers know nothing of that, do not pin it.
    """

    name = "shm"

    def __init__(self, pin_sent: bool = False, pin_received: bool = False) -> None:
        self._pin_sent = pin_sent and torch.cuda.is_available()
        self._pin_received = pin_received and torch.cuda.is_available()
        self._mine: dict[int, _Segment] = {}
        self._theirs: dict[int, _Segment] = {}
        self._dropped: list[int] = []
        self._round = 0
        self._next = 0

    def pack(self, tensor: torch.Tensor, out: Outgoing) -> Token:
        return self._pack(*layout.describe(tensor), out, bring_off)

    def pack_queued(self, tensor: torch.Tensor, out: Outgoing) -> Token:
        """Like `pack`, but of a GPU's tensor the copy is only queued, on the current stream.

        Whoever unpacks it has to wait for that before it is read.
        """
        how, source = layout.describe(tensor)
        if how.is_packed:
            raise NoRoom("this tensor is copied once more when it is unpacked")
        if not self._pin_sent:
            raise NoRoom("a copy to memory that is not pinned cannot be queued")
        return self._pack(how, source, out, queue_off)

    def _pack(
        self,
        how: layout.Layout,
        source: torch.Tensor,
        out: Outgoing,
        off: Callable[[torch.Tensor, torch.Tensor, Outgoing], None],
    ) -> Token:
        number, segment = self._take(how.nbytes, out)
        segment.set_state(LENT)
        out.undo.append(lambda: segment.set_state(FREE))
        # What is packed is read as soon as it is lent, to be put together.
        is_late = out.is_leaving and not source.is_cuda and not how.is_packed
        if source.is_cuda:
            off(layout.run_of(how, source), segment.run(how.nbytes), out)
        elif is_late:
            out.late.append(partial(segment.write, how, source))
            out.parts.append(WRITTEN)
        else:
            segment.write(how, source)
        dropped, self._dropped = tuple(self._dropped), []
        out.undo.append(lambda: self._dropped.extend(dropped))
        return (number, segment.capacity, dropped, is_late, how.text)

    def unpack(self, token: Token, source: Incoming) -> torch.Tensor:
        match token:
            case (int(number), int(capacity), tuple(dropped), bool(is_late), how):
                parsed = layout.parse(how, source.limit)
            case _:
                raise Rejected(f"a shared tensor's token is malformed: {reprlib.repr(token)}")
        for old in dropped:
            self._theirs.pop(old, None)
        segment = self._theirs.get(number)
        if segment is None:
            if len(self._theirs) >= MAX_SEGMENTS or not 0 < capacity <= source.limit * 2:
                raise Rejected(f"segment {number} of {capacity} bytes is over the limit")
            segment = self._theirs[number] = _attach(capacity, source, self._pin_received)
        if parsed.nbytes > segment.capacity:
            raise Rejected(f"{parsed.nbytes} bytes in a segment of {segment.capacity} bytes")
        tensor = segment.lend(parsed)
        if is_late:
            source.read_into(memoryview(bytearray(WRITTEN)), is_soon=True)
        return tensor

    def close(self) -> None:
        self._mine.clear()
        self._theirs.clear()

    def _take(self, nbytes: int, out: Outgoing) -> tuple[int, _Segment]:
        """The smallest free segment that holds `nbytes`, or a new one."""
        self._round += 1
        free = {number: s for number, s in self._mine.items() if s.is_free}
        fitting = [(s.capacity, number) for number, s in free.items() if s.capacity >= nbytes]
        if fitting:
            number = min(fitting)[1]
            segment = self._mine[number]
            segment.last_round = self._round
            self._drop([n for n in free if n != number and self._is_stale(free[n])])
            return number, segment
        capacity = _rounded_up(nbytes)
        if self._is_over(capacity):
            self._drop(list(free))
        if self._is_over(capacity):
            raise NoRoom(f"{len(self._mine)} segments are lent to the peer")
        return self._create(capacity, out)

    def _create(self, capacity: int, out: Outgoing) -> tuple[int, _Segment]:
        if len(out.fds) >= MAX_FDS:
            raise NoRoom(f"a message brings {MAX_FDS} new segments at most")
        segment, fd = _create(capacity, self._pin_sent)
        self._pin_sent = segment.is_pinned
        self._next += 1
        number = self._next
        self._mine[number] = segment
        segment.last_round = self._round
        # If the message never leaves, the peer never learns of the segment.
        out.undo.append(lambda: self._mine.__delitem__(number))
        out.fds.append(fd)
        out.kept.append(_Descriptor(fd))
        return number, segment

    def _is_stale(self, segment: _Segment) -> bool:
        return self._round - segment.last_round > IDLE_ROUNDS

    def _is_over(self, capacity: int) -> bool:
        held = sum(s.capacity for s in self._mine.values())
        return held + capacity > MAX_SEGMENT_BYTES or len(self._mine) >= MAX_SEGMENTS

    def _drop(self, numbers: list[int]) -> None:
        for number in numbers:
            del self._mine[number]
        self._dropped += numbers


class _Segment:
    """One mapping, of this process; it ends when nothing refers to it, tensors included."""

    def __init__(self, memory: mmap.mmap, pin: bool) -> None:
        self._memory = memory
        self.capacity = len(memory) - HEADER
        self.last_round = 0
        #: of the run
        self.address = self.run(1).data_ptr()
        self.is_pinned = pin and _pin(self)

    @property
    def is_free(self) -> bool:
        return self._memory[0:1] == FREE

    def set_state(self, state: bytes) -> None:
        self._memory[0:1] = state

    def run(self, nbytes: int) -> torch.Tensor:
        """The first bytes of the run, uint8 [nbytes]."""
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._memory, dtype=torch.uint8, count=nbytes, offset=HEADER)

    def write(self, how: layout.Layout, source: torch.Tensor) -> None:
        """Fill the run with what `layout.describe` gave, of the CPU."""
        bring(how, source, self.address)

    def lend(self, how: layout.Layout) -> torch.Tensor:
        """A tensor over the run; the state is cleared once nothing uses its memory any more."""
        if not how.nbytes:
            self.set_state(FREE)
            return layout.restore(how, self.run(0))
        loan = memoryview(self._memory)[HEADER : HEADER + how.nbytes]
        when_over(loan, partial(self.set_state, FREE))
        return layout.over(how, loan)


class _Descriptor:
    """Owns a descriptor until the message that carries it has left."""

    def __init__(self, fd: int) -> None:
        self._finalizer = weakref.finalize(self, os.close, fd)


def _rounded_up(nbytes: int) -> int:
    """At most a quarter more, so that tensors of nearly one size share segments."""
    step = max(SMALLEST, 1 << max(nbytes.bit_length() - 3, 0))
    return max(-(-nbytes // step), 1) * step


def _create(capacity: int, pin: bool) -> tuple[_Segment, int]:
    """A segment and the descriptor to send. Raises `NoRoom`."""
    import fcntl  # not on Windows, where this carrier is never agreed on

    size = capacity + HEADER
    fd = os.memfd_create("luna-mp", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        # Without this a full machine kills with SIGBUS whoever writes first.
        os.posix_fallocate(fd, 0, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        return _Segment(mmap.mmap(fd, size), pin), fd
    except OSError as exc:
        os.close(fd)
        raise NoRoom(f"no shared memory for {size} bytes: {exc.strerror}") from exc


def _attach(capacity: int, source: Incoming, pin: bool) -> _Segment:
    import fcntl

    size = capacity + HEADER
    fd = source.take_fd()
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        if not seals & fcntl.F_SEAL_SHRINK or os.fstat(fd).st_size != size:
            raise Rejected(f"a shared segment of {size} bytes is not what its sender says")
        return _Segment(mmap.mmap(fd, size), pin)
    except OSError as exc:
        raise Rejected(f"a shared segment of {size} bytes cannot be mapped: {exc}") from exc
    finally:
        os.close(fd)


def _pin(segment: _Segment) -> bool:
    """Register with CUDA, so that copies from and to the GPU run at the full rate of the bus."""
    cudart = torch.cuda.cudart()
    if int(cudart.cudaHostRegister(segment.address, segment.capacity, 0)) == 0:
        weakref.finalize(segment, cudart.cudaHostUnregister, segment.address).atexit = False
        return True
    # The runtime keeps the error for whoever launches the next kernel.
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")
    return False
