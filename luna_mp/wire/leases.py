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
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import psutil

from luna_mp.deadline import Deadline
from luna_mp.errors import OutOfMemory, Rejected
from luna_mp.processes import is_running
from luna_mp.wire.carrier import Fence

__all__ = ("Counter", "LeaseBook", "Owner")

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 0.2  # between two looks at counters and clients, while anything is leased
IDLE_SECONDS = 5.0  # without a lease, after which memory is given back to the card
WAIT_SECONDS = 10.0  # for a client over its share to let something go

T = TypeVar("T")


class Owner(NamedTuple):
    """A client's process: its pid and its birth, as `processes.born` says it."""

    pid: int
    born: float

    def is_gone(self) -> bool:
        """False also where it cannot be told: what is held stays held."""
        try:
            return not is_running(self.pid, self.born)
        except (psutil.AccessDenied, OSError):
            return False


class Counter(Protocol):
    """How many holders an export still has, in memory that the client can reach."""

    def value(self) -> int:
        """Zero once the client has let go, or less if it counts badly."""

    def release(self) -> None:
        """From now on it is zero, whatever the client has counted."""

    def retire(self) -> None:
        """Its lease is over: it may count another."""


@dataclass
class _Lease(Generic[T]):
    owner: Owner
    nbytes: int
    held: T
    counter: Counter
    fences: list[Fence] = field(default_factory=list)

    def is_over(self) -> bool:
        if self.counter.value() > 0:
            return False
        self.fences = [fence for fence in self.fences if not fence.query()]
        return not self.fences


class LeaseBook(Generic[T]):
    """`most`: bytes that one client process may hold. Owns the thread that looks after them."""

    def __init__(self, most: int, is_gone: Callable[[Owner], bool] = Owner.is_gone) -> None:
        self.most = most
        self._is_gone = is_gone
        self._numbers = itertools.count(1)
        self._leases: dict[int, _Lease[T]] = {}
        self._lock = threading.Lock()
        # The sweeper sleeps on the one, clients over their share on the other; an export while
        # neither sleeps wakes nobody.
        self._wanted = threading.Event()
        self._returned = threading.Condition(self._lock)
        self._closing = threading.Event()
        self._used_last = 0.0
        #: called when nothing has been leased for a while, or was left by the dead
        self.when_idle: Callable[[], None] = lambda: None
        self._sweeper = threading.Thread(target=self._look_after, name="leases", daemon=True)
        self._sweeper.start()

    def __repr__(self) -> str:
        return f"<LeaseBook {len(self._leases)} leases>"

    def add(self, owner: Owner, nbytes: int, held: T, counter: Counter) -> int:
        """Note an export; returns its number, by which the client may name it."""
        with self._lock:
            number = next(self._numbers)
            self._leases[number] = _Lease(owner, nbytes, held, counter)
        self.note_use()
        return number

    def note_use(self) -> None:
        """The memory that is leased from was used now: it is given back a while after."""
        self._used_last = time.monotonic()
        if not self._wanted.is_set():
            self._wanted.set()

    def get(self, number: int, owner: Owner) -> T:
        """What a client names. Raises `Rejected` for what it does not hold."""
        with self._lock:
            lease = self._leases.get(number)
        if lease is None or lease.owner != owner:
            raise Rejected(f"lease {number} is not held by process {owner.pid}")
        return lease.held

    def fence(self, number: int, fence: Fence) -> None:
        """Keep a lease until work of our own that reads it is done."""
        with self._lock:
            if number in self._leases:
                self._leases[number].fences.append(fence)

    def withdraw(self, number: int) -> None:
        """What was noted never left: nobody holds it."""
        with self._lock:
            if number in self._leases:
                self._leases[number].counter.release()

    def leased(self, owner: Owner) -> int:
        """Bytes that a client process holds."""
        with self._lock:
            return sum(each.nbytes for each in self._leases.values() if each.owner == owner)

    def has_room(self, owner: Owner) -> bool:
        """Whether a client holds less than its share."""
        if not self._leases or self.leased(owner) < self.most:
            return True
        self.collect()
        return self.leased(owner) < self.most

    def wait_for_room(self, owner: Owner, deadline: Deadline) -> None:
        """Return once a client holds less than its share. Raises `OutOfMemory`.

        It is asked before the work, and outside the lock of the models, so nobody else waits.
        """
        # What clients dropped since is used again for this call.
        self.collect()
        if not self._leases:
            return
        patience = Deadline(min(WAIT_SECONDS, deadline.remaining()), "waiting for leases")
        while (held := self.leased(owner)) >= self.most:
            if patience.has_passed:
                raise OutOfMemory(
                    f"process {owner.pid} holds {held} bytes of results on the GPU and its share "
                    f"is {self.most} (--max-leased): drop results, or ask for device='cpu'"
                )
            if not self.collect():
                with self._lock:
                    self._returned.wait(SWEEP_SECONDS)

    def collect(self) -> int:
        """Take back what clients let go of; returns the bytes. Quick: it reads counters only."""
        if not self._leases:
            return 0
        with self._lock:
            over = [number for number, lease in self._leases.items() if lease.is_over()]
            ended = [self._leases.pop(number) for number in over]
            for lease in ended:
                lease.counter.retire()
            if ended:
                self._returned.notify_all()
        return sum(lease.nbytes for lease in ended)

    def sweep(self) -> int:
        """Take back also what the dead held; returns the bytes that those had."""
        with self._lock:
            owners = {lease.owner for lease in self._leases.values()}
        gone = {owner for owner in owners if self._is_gone(owner)}
        orphaned = 0
        with self._lock:
            for lease in self._leases.values():
                if lease.owner in gone and lease.counter.value() > 0:
                    lease.counter.release()
                    orphaned += lease.nbytes
        if orphaned:
            logger.info("%d bytes are taken back from clients that are gone", orphaned)
        self.collect()
        return orphaned

    def to_data(self) -> dict[str, Any]:
        """Bytes and number of leases by pid, for `status`."""
        found: dict[str, Any] = {}
        with self._lock:
            for lease in self._leases.values():
                entry = found.setdefault(str(lease.owner.pid), {"bytes": 0, "leases": 0})
                entry["bytes"] += lease.nbytes
                entry["leases"] += 1
        return found

    def close(self) -> None:
        self._closing.set()
        self._wanted.set()
        self._sweeper.join()

    def _look_after(self) -> None:
        while not self._closing.is_set():
            self._wanted.wait()
            try:
                self._look_after_leases()
            except RuntimeError:
                # Of a GPU that is lost, which calls meet, or too full for another pool: leases of
                # the dead still have to come back.
                logger.exception("the sweep of the leases failed, and is made again")
                self._wanted.set()
                self._closing.wait(IDLE_SECONDS)

    def _look_after_leases(self) -> None:
        """Sweep while anything is leased and for a while after; then the memory may go."""
        while not self._closing.wait(SWEEP_SECONDS):
            # First: a lease that comes while the last ones go wakes the sweeper again.
            self._wanted.clear()
            orphaned = self.sweep()
            with self._lock:
                is_idle = not self._leases
            if not is_idle:
                self._used_last = time.monotonic()
            elif orphaned or time.monotonic() - self._used_last > IDLE_SECONDS:
                self.when_idle()
                return
