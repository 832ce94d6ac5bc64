"""Tensors whose sender's GPU is not done yet: the receiver waits, and for nobody who has gone."""

from __future__ import annotations

import socket
import threading

import pytest
import torch

from luna_mp.deadline import Deadline
from luna_mp.errors import Broken, TimedOut
from luna_mp.wire import stream
from luna_mp.wire.carrier import Carrier
from luna_mp.wire.channel import HEADER, Channel
from luna_mp.wire.stream import NeverRead, connect, listen
from tests.helpers import LIMIT, wait_until
from tests.wire.pair import channels, soon

BIG = 40_000  # elements; more than what is sent inline for being small


class Pending(Carrier):
    """Its tensors are zeros, which are there once `is_done` is set."""

    name = "pending"

    def __init__(self):
        self.is_done = threading.Event()
        self.is_asked = threading.Event()
        self.discarded = []
        self.given_back = []

    def pack(self, tensor, out):
        out.undo.append(lambda: self.given_back.append(tensor.numel()))
        return (tensor.numel(),)

    def unpack(self, token, source):
        source.wait(self._ask)
        return torch.zeros(token[0])

    def discard(self, token):
        self.discarded.append(token[0])

    def _ask(self):
        self.is_asked.set()
        return self.is_done.is_set()


@pytest.fixture
def ends():
    """A sender, a receiver, and the carrier of the receiver."""
    with channels() as (left, right):
        carrier = Pending()
        left.use(Pending())
        right.use(carrier)
        yield left, right, carrier


def carrier_of(channel):
    return channel._carriers["pending"]


class Receiving(threading.Thread):
    """Receives one message; what came of it."""

    def __init__(self, channel, deadline):
        super().__init__()
        self._channel = channel
        self._deadline = deadline
        self.outcome = None

    def run(self):
        try:
            self.outcome = self._channel.recv(self._deadline)
        except (Broken, TimedOut) as exc:
            self.outcome = exc


def test_a_message_is_there_once_the_work_behind_its_tensors_is_done(ends):
    left, right, carrier = ends
    left.send({"value": torch.ones(BIG)}, soon())
    receiving = Receiving(right, soon())
    receiving.start()
    assert carrier.is_asked.wait(10)
    assert receiving.is_alive()
    carrier.is_done.set()
    receiving.join(10)
    assert receiving.outcome["value"].numel() == BIG
    assert not carrier.discarded


def test_a_sender_that_ends_before_its_work_is_done_breaks_the_wait(ends):
    left, right, carrier = ends
    left.send({"value": [torch.ones(BIG), torch.ones(BIG + 1)]}, soon())
    receiving = Receiving(right, soon())
    receiving.start()
    assert carrier.is_asked.wait(10)
    left.close()
    receiving.join(1.0)
    assert isinstance(receiving.outcome, Broken)
    assert carrier.discarded == [BIG, BIG + 1]


def test_work_that_was_done_is_taken_from_a_sender_that_has_ended(ends):
    left, right, carrier = ends
    left.send({"value": torch.ones(BIG)}, soon())
    left.close()
    carrier.is_done.set()
    assert right.recv(soon())["value"].numel() == BIG


def test_a_wait_ends_by_its_deadline_and_lets_go_of_all_that_was_not_taken(ends):
    left, right, carrier = ends
    left.send({"value": [torch.ones(BIG), torch.ones(BIG + 1)]}, soon())
    with pytest.raises(TimedOut):
        right.recv(Deadline(0.05, "the test"))
    assert carrier.discarded == [BIG, BIG + 1]


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyError, KeyboardInterrupt])
def test_what_ends_a_wait_that_is_not_wanted_stays_what_it_is(ends, error):
    """As a worker's own interrupt: it is neither the tensor's fault nor the message's."""
    left, right, carrier = ends

    def refuse():
        if carrier.is_asked.is_set():
            raise error("enough")

    left.send({"value": torch.ones(BIG)}, soon())
    with pytest.raises(error, match="enough"):
        right.recv(Deadline(10, "the test", refuse))
    assert carrier.discarded == [BIG]


def test_the_rest_of_a_message_is_not_waited_for_when_it_is_not_wanted(ends):
    left, right, carrier = ends
    asked = []

    def refuse():
        asked.append(1)
        if len(asked) > 1:
            raise RuntimeError("enough")

    left.stream.send([HEADER.pack(100, 0)], soon())
    with pytest.raises(RuntimeError, match="enough"):
        right.recv(Deadline(10, "the test", refuse))


def test_what_is_never_read_is_given_back(ends):
    left, right, carrier = ends
    left.send({"value": torch.ones(BIG)}, soon())
    assert carrier_of(left).given_back == []
    right.close()
    wait_until(lambda: left.stream.has_closed)
    with pytest.raises(NeverRead):
        left.recv(soon())
    assert carrier_of(left).given_back == [BIG]


def test_what_is_sent_by_tcp_right_after_the_peer_closed_was_never_read():
    with listen(("127.0.0.1", 0)) as listener:
        left = Channel(connect(listener.getsockname(), soon()), LIMIT)
        listener.accept()[0].close()
    with left:
        left.send({"value": 1}, soon())
        with pytest.raises(NeverRead):
            left.recv(soon())


@pytest.mark.parametrize("reply", [b"\0", HEADER.pack(100, 0) + b"\0"], ids=["header", "message"])
def test_what_was_answered_in_part_was_read(tmp_path, reply):
    path = str(tmp_path / "sock")
    with listen(path) as listener, Channel(connect(path, soon()), LIMIT) as left:
        peer, _ = listener.accept()
        left.send({"value": 1}, soon())
        peer.send(reply)
        peer.close()  # with the request unread, which the system tells as a reset
        with pytest.raises(Broken, match="in the middle"):
            left.recv(soon())


def test_what_cannot_be_sent_is_given_back(ends):
    left, right, carrier = ends
    right.close()
    with pytest.raises(Broken):
        left.send({"value": torch.ones(BIG)}, soon())
    assert carrier_of(left).given_back == [BIG]


def test_what_was_read_is_not_given_back(ends):
    left, right, carrier = ends
    carrier.is_done.set()
    left.send({"value": torch.ones(BIG)}, soon())
    right.recv(soon())
    right.close()
    with pytest.raises(Broken):
        left.recv(soon())
    assert carrier_of(left).given_back == []


def test_small_tensors_of_the_same_message_are_no_sign_of_an_end(ends):
    left, right, carrier = ends
    small = torch.rand(5)
    left.send({"value": [torch.ones(BIG), small, small + 1]}, soon())
    receiving = Receiving(right, soon())
    receiving.start()
    assert carrier.is_asked.wait(10)
    carrier.is_done.set()
    receiving.join(10)
    _, first, second = receiving.outcome["value"]
    assert torch.equal(first, small)
    assert torch.equal(second, small + 1)


def test_the_channel_goes_on_after_a_wait(ends):
    left, right, carrier = ends
    carrier.is_done.set()
    for value in (torch.ones(BIG), torch.ones(3), torch.ones(BIG)):
        left.send({"value": value}, soon())
        assert right.recv(soon())["value"].numel() == value.numel()
    wait_until(lambda: not right.stream.is_readable(0.0))


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")
def test_who_has_more_in_line_than_it_accepts_is_there_until_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "ASK_SECONDS", 0.05)
    path = str(tmp_path / "s")
    with listen(path) as listener:
        listener.listen(0)
        with Channel(connect(path, soon()), LIMIT):
            assert stream.is_answered(path)
    assert not stream.is_answered(path)
