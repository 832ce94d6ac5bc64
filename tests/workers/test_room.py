"""A client that holds its share of the GPU waits, alone, and is told; never does it get more."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest
import torch

from luna_mp.deadline import Deadline
from luna_mp.errors import OutOfMemory
from luna_mp.wire import leases
from luna_mp.wire.leases import LeaseBook, Owner
from luna_mp.workers.clip import ClipWorker
from luna_mp.workers.vae import VaeWorker
from tests.helpers import wait_until
from tests.wire.fakes import FakeCounter
from tests.workers.fakes import FakeCall, FakeClip, FakeVae, library

GREEDY, OTHER = Owner(1, 1.0), Owner(2, 2.0)
SHARE = RESULT = 100  # bytes
LATENT = torch.zeros(1, 4, 8, 8)
SECONDS = 20.0


class LeasingCall(FakeCall):
    """What it gives is held by its client."""

    def __init__(self, book, owner):
        super().__init__()
        self.asked_for_room = False
        self._book = book
        self._owner = owner

    def wait_for_room(self):
        self.asked_for_room = True
        self._book.wait_for_room(self._owner, Deadline(SECONDS, "the call"))

    def has_room(self):
        return self._book.has_room(self._owner)


@pytest.fixture
def book():
    book = LeaseBook(SHARE, is_gone=lambda owner: False)
    yield book
    book.close()


@pytest.fixture
def worker():
    return VaeWorker(library(FakeVae()))


def decode(worker, book, owner, counter):
    with torch.inference_mode(), LeasingCall(book, owner) as call:
        worker.decode(call, LATENT)
        book.add(owner, RESULT, "image", counter)


@contextmanager
def running(step, *args):
    """On a thread of its own, which ends with the block."""
    thread = threading.Thread(target=step, args=args)
    thread.start()
    yield thread
    thread.join(SECONDS)
    assert not thread.is_alive()


def test_others_go_on_while_the_greedy_one_waits(book, worker):
    held = FakeCounter()
    decode(worker, book, GREEDY, held)
    with running(decode, worker, book, GREEDY, FakeCounter()) as waiting:
        for _ in range(3):
            decode(worker, book, OTHER, FakeCounter())
            book.withdraw(max(book._leases))
        assert waiting.is_alive()
        held.holders = 0
    assert book.leased(GREEDY) == RESULT


def test_calls_at_once_get_no_more_than_calls_one_by_one(book, worker):
    """All have room when they come; the first takes it, and the others wait for one another."""
    args = [(worker, book, GREEDY, FakeCounter()) for _ in range(8)]
    threads = [threading.Thread(target=decode, args=each) for each in args]
    with worker.flight.turn(FakeCall()):
        for thread in threads:
            thread.start()
        wait_until(lambda: len(worker.flight.to_data()["line"]) == 1 + len(threads))
    for left in reversed(range(len(threads))):
        wait_until(lambda left=left: sum(thread.is_alive() for thread in threads) == left)
        assert book.leased(GREEDY) == RESULT
        for counter in held_by(book):
            counter.holders = 0
    assert worker.status(FakeCall())["queue"]["methods"]["decode"]["calls"] == 1 + len(threads)


def held_by(book):
    with book._lock:
        return [lease.counter for lease in book._leases.values()]


def test_the_greedy_one_is_told_with_its_figures(book, worker, monkeypatch):
    monkeypatch.setattr(leases, "WAIT_SECONDS", 0.1)
    decode(worker, book, GREEDY, FakeCounter())
    with pytest.raises(OutOfMemory, match="process 1 holds 100 bytes .* its share is 100"):
        decode(worker, book, GREEDY, FakeCounter())
    assert book.leased(GREEDY) == RESULT


@pytest.mark.parametrize(
    "ask",
    [
        lambda call: VaeWorker(library(FakeVae())).load(call, None),
        lambda call: ClipWorker(library(FakeClip()), 0).tokenize(call, "a fox"),
    ],
    ids=["load", "tokenize"],
)
def test_who_holds_its_share_is_told_what_takes_no_room(book, ask):
    book.add(GREEDY, RESULT, "image", FakeCounter())
    with torch.inference_mode(), LeasingCall(book, GREEDY) as call:
        assert ask(call)
    assert not call.asked_for_room
