"""Which client holds which exported memory, and when it comes back.

The service keeps every result that it exported until the client is done with it. A client that lets
a tensor go lowers the tensor's counter, in shared memory; a client that dies lowers nothing, so
what it held is taken back once its process is gone, not when its connection closes, for it may
close one and still read.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import psutil

from luna_mp.deadline import Deadline
from luna_mp.errors import OutOfMemory, Rejected
from luna_mp.wire.carrier import Fence

__all__ = ("Counter", "LeaseBook", "Owner")

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 0.2  # between two looks at counters and clients, while anything is leased
WAIT_SECONDS = 10.0  # for a client over its share to let something go

T = TypeVar("T")


class Owner(NamedTuple):
    """A client's process: its pid and its time of creation, since pids are used again."""

    pid: int
    created: float

    def is_gone(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return (
                abs(process.create_time() - self.created) > 1.0
                or process.status() == psutil.STATUS_ZOMBIE
            )
        except psutil.NoSuchProcess:
            return True


class Counter(Protocol):
    """How many holders an export still has, in memory that the client can reach."""

    def value(self) -> int:
        """Zero once the client has let go."""

    def release(self) -> None:
        """Let go in the place of a client that no longer can."""


@dataclass
class _Lease(Generic[T]):
    owner: Owner
    nbytes: int
    held: T
    counter: Counter
    fences: list[Fence] = field(default_factory=list)

    def is_over(self) -> bool:
        self.fences = [fence for fence in self.fences if not fence.query()]
        return not self.fences and self.counter.value() <= 0


class LeaseBook(Generic[T]):
    """`most`: bytes that one client process may hold. Owns the thread that looks after them."""

    def __init__(self, most: int, is_gone: Callable[[Owner], bool] = Owner.is_gone) -> None:
        self.most = most
        self._is_gone = is_gone
        self._numbers = itertools.count(1)
        self._leases: dict[int, _Lease[T]] = {}
        self._changed = threading.Condition()
        self._is_closed = False
        self._sweeper = threading.Thread(target=self._look_after, name="leases", daemon=True)
        self._sweeper.start()

    def __repr__(self) -> str:
        return f"<LeaseBook {len(self._leases)} leases>"

    def add(self, owner: Owner, nbytes: int, held: T, counter: Counter) -> int:
        """Note an export; returns its number, by which the client may name it."""
        with self._changed:
            number = next(self._numbers)
            self._leases[number] = _Lease(owner, nbytes, held, counter)
            self._changed.notify_all()
        return number

    def get(self, number: int, owner: Owner) -> T:
        """What a client names. Raises `Rejected` for what it does not hold."""
        with self._changed:
            lease = self._leases.get(number)
        if lease is None or lease.owner != owner:
            raise Rejected(f"lease {number} is not held by process {owner.pid}")
        return lease.held

    def fence(self, number: int, fence: Fence) -> None:
        """Keep a lease until work of our own that reads it is done."""
        with self._changed:
            if number in self._leases:
                self._leases[number].fences.append(fence)

    def leased(self, owner: Owner) -> int:
        """Bytes that a client process holds."""
        with self._changed:
            return sum(each.nbytes for each in self._leases.values() if each.owner == owner)

    def wait_for_room(self, owner: Owner, deadline: Deadline) -> None:
        """Return once a client holds less than its share. Raises `OutOfMemory`.

        It is asked before the work, and outside the lock of the models, so nobody else waits.
        """
        patience = Deadline(min(WAIT_SECONDS, deadline.remaining()), "waiting for leases")
        while (held := self.leased(owner)) >= self.most:
            if patience.has_passed:
                raise OutOfMemory(
                    f"process {owner.pid} holds {held} bytes of results on the GPU and its share "
                    f"is {self.most} (--max-leased): drop results, or ask for device='cpu'"
                )
            with self._changed:
                self._changed.wait(SWEEP_SECONDS)

    def sweep(self) -> int:
        """Take back what is over or orphaned; returns the bytes."""
        with self._changed:
            owners = {lease.owner for lease in self._leases.values()}
        gone = {owner for owner in owners if self._is_gone(owner)}
        over = []
        with self._changed:
            for number, lease in list(self._leases.items()):
                if lease.owner in gone and lease.counter.value() > 0:
                    lease.counter.release()
                if lease.is_over():
                    over.append(self._leases.pop(number))
            self._changed.notify_all()
        for owner in gone:
            logger.info("process %d is gone, what it held is taken back", owner.pid)
        return sum(lease.nbytes for lease in over)

    def to_data(self) -> dict[str, Any]:
        """Bytes and number of leases by pid, for `status`."""
        found: dict[str, Any] = {}
        with self._changed:
            for lease in self._leases.values():
                entry = found.setdefault(str(lease.owner.pid), {"bytes": 0, "leases": 0})
                entry["bytes"] += lease.nbytes
                entry["leases"] += 1
        return found

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._sweeper.join()

    def _look_after(self) -> None:
        while True:
            with self._changed:
                if not self._leases and not self._is_closed:
                    self._changed.wait_for(lambda: self._leases or self._is_closed)
                if self._is_closed:
                    return
                self._changed.wait_for(lambda: self._is_closed, timeout=SWEEP_SECONDS)
            self.sweep()
