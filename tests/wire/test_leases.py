"""The lease book, without a GPU: what comes back, when, and whom it keeps waiting."""

from __future__ import annotations

import os
import threading

import psutil
import pytest

from luna_mp.deadline import Deadline
from luna_mp.errors import OutOfMemory, Rejected
from luna_mp.processes import born
from luna_mp.wire import leases
from luna_mp.wire.leases import LeaseBook, Owner
from tests.helpers import wait_until
from tests.wire.fakes import FakeCounter, FakeFence

ALICE, BOB = Owner(1, 1.0), Owner(2, 2.0)
LATER = 10  # looks at a counter


class CounterThatIsLetGoOfLater(FakeCounter):
    asked = 0

    def value(self):
        self.asked += 1
        return int(self.asked < LATER)


@pytest.fixture
def dead():
    return set()


@pytest.fixture
def book(dead, monkeypatch):
    monkeypatch.setattr(leases, "SWEEP_SECONDS", 0.01)
    monkeypatch.setattr(leases, "WAIT_SECONDS", 0.1)
    book = LeaseBook(most=100, is_gone=dead.__contains__)
    yield book
    book.close()


def test_what_a_client_lets_go_of_comes_back(book):
    counter = FakeCounter()
    book.add(ALICE, 10, "result", counter)
    assert book.collect() == 0
    counter.holders = 0
    assert book.collect() == 10
    assert book.to_data() == {}


def test_what_a_dead_client_held_comes_back_and_the_living_keep_theirs(book, dead):
    book.add(ALICE, 10, "a", FakeCounter())
    book.add(BOB, 20, "b", FakeCounter())
    dead.add(ALICE)
    wait_until(lambda: book.to_data() == {"2": {"bytes": 20, "leases": 1}})


def test_what_was_withdrawn_comes_back(book):
    number = book.add(ALICE, 10, "result", FakeCounter())
    book.withdraw(number)
    assert book.collect() == 10


def test_a_counter_is_retired_once_and_its_next_lease_is_its_own(book):
    counter = FakeCounter()
    number = book.add(ALICE, 10, "result", counter)
    counter.holders = 0
    assert [book.collect(), book.collect()] == [10, 0]
    assert counter.retired == 1
    counter.holders = 1
    book.add(BOB, 20, "result", counter)
    book.withdraw(number)
    assert book.collect() == 0


def test_a_lease_stays_while_our_own_work_reads_it(book):
    counter, fence = FakeCounter(), FakeFence()
    number = book.add(ALICE, 10, "result", counter)
    book.fence(number, fence)
    counter.holders = 0
    assert book.collect() == 0
    fence.is_done = True
    wait_until(lambda: book.to_data() == {})


def test_only_its_holder_can_name_a_lease(book):
    number = book.add(ALICE, 10, "result", FakeCounter())
    assert book.get(number, ALICE) == "result"
    for wrong in ((number, BOB), (number + 1, ALICE)):
        with pytest.raises(Rejected, match="is not held by process"):
            book.get(*wrong)


def test_a_client_over_its_share_is_told_and_others_do_not_wait(book):
    book.add(ALICE, 100, "result", FakeCounter())
    with pytest.raises(OutOfMemory, match="holds 100 bytes .* its share is 100"):
        book.wait_for_room(ALICE, Deadline(5, "the call"))
    book.wait_for_room(BOB, Deadline(5, "the call"))


def test_a_client_over_its_share_goes_on_once_it_lets_go(book, monkeypatch):
    monkeypatch.setattr(leases, "WAIT_SECONDS", 20.0)
    counter = CounterThatIsLetGoOfLater()
    book.add(ALICE, 100, "result", counter)
    assert not book.has_room(ALICE)
    book.wait_for_room(ALICE, Deadline(20, "the call"))
    assert book.has_room(ALICE)
    assert counter.asked >= LATER


def test_memory_is_given_back_when_the_dead_held_the_last_of_it(book, dead):
    idle = []
    book.when_idle = lambda: idle.append(True)
    book.add(ALICE, 10, "result", FakeCounter())
    dead.add(ALICE)
    wait_until(lambda: idle)


def test_memory_that_was_used_without_a_lease_is_given_back_too(book, monkeypatch):
    monkeypatch.setattr(leases, "IDLE_SECONDS", 0.0)
    idle = []
    book.when_idle = lambda: idle.append(True)
    book.note_use()
    wait_until(lambda: idle)


def test_a_sweep_that_failed_is_made_again(book, dead, monkeypatch, caplog):
    monkeypatch.setattr(leases, "IDLE_SECONDS", 0.0)
    results = [RuntimeError("CUDA out of memory"), None]
    idle = threading.Event()

    def when_idle():
        if error := results.pop(0):
            raise error
        idle.set()

    book.when_idle = when_idle
    book.note_use()
    assert idle.wait(10)
    assert "is made again" in caplog.text


@pytest.mark.parametrize("error", [psutil.AccessDenied(), OSError(24, "Too many open files")])
def test_an_owner_that_cannot_be_looked_at_is_there(monkeypatch, error):
    def process(pid):
        raise error

    owner = Owner(os.getpid(), born(os.getpid()))
    monkeypatch.setattr(psutil, "Process", process)
    assert not owner.is_gone()
