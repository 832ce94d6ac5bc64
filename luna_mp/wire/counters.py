"""Torch's counters of who holds what was exported, in files of its own under /dev/shm.

A file has a header and then one int64 an export, which stands at 1 until the importer takes that
away (`CudaIPCTypes.h`, `MapAllocator.cpp`). Both ends map the file and keep it mapped: torch's own
functions map it anew each time.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from contextlib import suppress
from functools import lru_cache

import torch

__all__ = ("Counters", "TorchCounter", "let_go", "reach")

COUNTER_BYTES = 8
COUNTERS_START = 64  # torch's shared memory opens with a header of its own
SPARE = 64  # counters that wait for their next result; no worker lets go of more at once


class TorchCounter:
    """One of the service's, at 1 when it is made. `donor` is the storage that torch made it for."""

    def __init__(
        self,
        file: bytes,
        slot: int,
        donor: torch.UntypedStorage | None = None,
        spare: deque[TorchCounter] | None = None,
    ) -> None:
        self.file = file
        self.slot = slot
        self._memory = _counters(file)
        self._at = _place_of(slot)
        self._donor = donor
        self._spare = spare
        if self.value() != 1:
            raise RuntimeError(f"torch {torch.__version__} keeps its counters where we do not look")

    def value(self) -> int:
        count: int = self._memory[self._at]
        return count

    def hold(self) -> None:
        self._memory[self._at] = 1

    def release(self) -> None:
        # Not one less, as torch does: it keeps memory for ever that was let go of once too often.
        self._memory[self._at] = 0
        # Whoever was given up on may still count here.
        self._spare = None

    def retire(self) -> None:
        if self._spare is None or self.value():
            self.release()
        else:
            self._spare.append(self)


class Counters:
    """Counters of results, each used over and over: torch makes an event with each, in 20 µs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # The one that was retired first is taken first; what is over its length is let go of.
        self._spare: deque[TorchCounter] = deque(maxlen=SPARE)

    def take(self) -> TorchCounter:
        """One that stands at 1, until it is retired."""
        try:
            counter = self._spare.popleft()
        except IndexError:
            return self._made()
        counter.hold()
        return counter

    def forget(self) -> None:
        """Let go of those that count nothing."""
        self._spare.clear()

    def _made(self) -> TorchCounter:
        donor = torch.empty(1, device=self._device).untyped_storage()
        *_, file, slot, _, _ = donor._share_cuda_()
        return TorchCounter(file, slot, donor, self._spare)


def reach(file: bytes) -> None:
    """Raise `RuntimeError` where a client cannot count in the service's file."""
    try:
        _counters(file)
    except OSError as exc:
        raise RuntimeError(
            f"the service's counters cannot be opened ({exc}): run both with one /dev/shm "
            "(docker run --ipc=host)"
        ) from exc


def let_go(file: bytes, slot: int) -> None:
    """Tell the service, from a client, that one of its exports is not used here any more."""
    # When the service has gone its file has, too, and so has all that it exported.
    with suppress(FileNotFoundError):
        _counters(file)[_place_of(slot)] -= 1


def _place_of(slot: int) -> int:
    return COUNTERS_START // COUNTER_BYTES + slot


# Those of a client's services, or a service's newest: torch begins another for each 10,000, and
# counters that are in use keep their own.
@lru_cache(maxsize=4)
def _counters(file: bytes) -> memoryview:
    """The file as int64s; it stays mapped as long as this is kept."""
    fd = os.open(b"/dev/shm/" + os.path.basename(file), os.O_RDWR)
    try:
        return memoryview(mmap.mmap(fd, 0)).cast("q")
    finally:
        os.close(fd)
