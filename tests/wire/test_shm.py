"""Segments: used again, bounded, and gone with both ends."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace

import pytest
import torch

from luna_mp.errors import Broken, Rejected
from luna_mp.wire import shm
from luna_mp.wire.carrier import NoRoom, Outgoing
from luna_mp.wire.channel import HEADER
from luna_mp.wire.shm import ShmCarrier
from luna_mp.wire.stream import MAX_FDS, Stream
from tests.wire.pair import channels, crossed, soon

BIG = 1 << 20  # elements
SMALL = 20_000  # elements; more than what is sent inline for being small

pytestmark = pytest.mark.skipif(not shm.is_supported(), reason="no shared memory here")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def segments(channel) -> int:
    return len(channel._carriers["shm"]._mine)


def test_segment_is_used_again_once_the_tensor_is_dropped():
    with channels(ShmCarrier) as (left, right):
        for _ in range(5):
            crossed(left, right, torch.rand(BIG))
        assert segments(left) == 1


def test_segment_stays_lent_while_a_view_lives():
    with channels(ShmCarrier) as (left, right):
        kept = crossed(left, right, torch.ones(BIG))[5:6]
        crossed(left, right, torch.zeros(BIG))
        assert segments(left) == 2
        assert kept.item() == 1


def test_tensor_goes_inline_when_all_segments_are_lent(monkeypatch):
    monkeypatch.setattr(shm, "MAX_SEGMENTS", 2)
    with channels(ShmCarrier) as (left, right):
        kept = [crossed(left, right, torch.full((BIG,), float(i))) for i in range(4)]
        assert segments(left) == 2
        assert [tensor[0].item() for tensor in kept] == [0, 1, 2, 3]


def test_free_segments_make_room_for_a_bigger_one(monkeypatch):
    monkeypatch.setattr(shm, "MAX_SEGMENTS", 2)
    with channels(ShmCarrier) as (left, right):
        for size in (BIG, 4 * BIG, 16 * BIG):
            assert crossed(left, right, torch.ones(size)).sum() == size
        assert segments(left) == 1
        assert len(right._carriers["shm"]._theirs) == 1


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of threads and forks
def test_a_fork_lets_go_of_nothing_for_its_parent():
    with channels(ShmCarrier) as (left, right):
        kept = crossed(left, right, torch.ones(BIG))
        if not (child := os.fork()):
            del kept
            os._exit(0)
        os.waitpid(child, 0)
        crossed(left, right, torch.zeros(BIG))
        assert kept.sum() == BIG


def test_what_is_put_together_on_arrival_cannot_be_sent_before_it_is_copied():
    with pytest.raises(NoRoom, match="copied once more"):
        ShmCarrier().pack_queued(torch.zeros(100, 100)[:, ::2], Outgoing())


def test_nothing_is_left_when_both_ends_close():
    before = descriptors()
    with channels(ShmCarrier) as (left, right):
        crossed(left, right, torch.rand(BIG))
        crossed(right, left, torch.rand(BIG))
    assert descriptors() == before


def test_a_message_of_many_tensors_brings_as_many_segments_as_descriptors_may_travel():
    with channels(ShmCarrier) as (left, right):
        sent = [torch.full((SMALL,), float(i)) for i in range(40)]
        got = crossed(left, right, sent)
        assert [tensor[0].item() for tensor in got] == list(range(40))
        assert segments(left) == MAX_FDS


def test_no_room_for_a_segment_sends_inline(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = descriptors()
    with channels(ShmCarrier) as (left, right):
        assert crossed(left, right, torch.ones(BIG)).sum() == BIG
        assert segments(left) == 0
    assert descriptors() < before + 1


def test_segment_that_its_sender_could_shrink_is_refused():
    fd = os.memfd_create("test")
    os.ftruncate(fd, shm.HEADER + 4096)
    source = SimpleNamespace(take_fd=lambda: fd, limit=1 << 20)
    with pytest.raises(Rejected, match="not what its sender says"):
        ShmCarrier().unpack((1, 4096, (), False, "uint8:10:1"), source)


def test_a_message_is_on_its_way_while_its_run_is_written(monkeypatch):
    write, arrived = shm._Segment.write, []
    with channels(ShmCarrier) as (left, right):

        def watched(self, how, source):
            arrived.append(right.stream.is_readable(0.0))
            write(self, how, source)

        monkeypatch.setattr(shm._Segment, "write", watched)
        left.send({"value": torch.ones(BIG)}, soon())
    assert arrived == [True]


def test_a_tensor_is_given_out_only_when_its_run_is_written(monkeypatch):
    write, recv_into, is_awaited = shm._Segment.write, Stream.recv_into, threading.Event()

    def received(self, target, deadline, is_soon=False):
        if is_soon:
            is_awaited.set()
        recv_into(self, target, deadline, is_soon)

    def written(self, how, source):
        assert is_awaited.wait(10)
        write(self, how, source)

    with channels(ShmCarrier) as (left, right):
        crossed(left, right, torch.zeros(BIG))
        monkeypatch.setattr(Stream, "recv_into", received)
        monkeypatch.setattr(shm._Segment, "write", written)
        assert crossed(left, right, torch.ones(BIG)).sum() == BIG


def test_what_is_put_together_on_arrival_is_written_before_it_leaves():
    with channels(ShmCarrier) as (left, _):
        gaps = torch.ones(BIG, 2)[:, 0]
        assert left.pack({"value": gaps}, is_leaving=True).out.late == []


def test_a_sender_that_ends_while_it_writes_has_sent_nothing(monkeypatch):
    def interrupted(self, how, source):
        raise KeyboardInterrupt

    monkeypatch.setattr(shm._Segment, "write", interrupted)
    with channels(ShmCarrier) as (left, right):
        with pytest.raises(KeyboardInterrupt):
            left.send({"value": torch.ones(BIG)}, soon())
        left.close()
        with pytest.raises(Broken, match="closed the connection"):
            right.recv(soon())


def test_what_leaves_later_is_written_when_it_is_packed():
    with channels(ShmCarrier) as (left, _):
        assert left.pack({"value": torch.ones(BIG)}).out.late == []


def test_a_run_whose_end_is_not_told_is_refused():
    with channels(ShmCarrier) as (left, right):
        packed = left.pack({"value": torch.ones(BIG)}, is_leaving=True)
        pickled = packed.data[HEADER.size :]
        left.stream.send([HEADER.pack(len(pickled), 0) + pickled], soon(), packed.out.fds)
        with pytest.raises(Rejected, match="only 0 bytes follow"):
            right.recv(soon())


@pytest.mark.parametrize("beside", [0, 40 * SMALL], ids=["alone", "beside what goes inline"])
def test_a_sender_that_still_writes_reads_why_it_is_refused(monkeypatch, beside):
    write, is_refused = shm._Segment.write, threading.Event()

    def refused(text, limit):
        is_refused.set()
        raise Rejected("too much")

    def written(self, how, source):
        assert is_refused.wait(10)
        write(self, how, source)

    monkeypatch.setattr(shm.layout, "parse", refused)
    monkeypatch.setattr(shm._Segment, "write", written)
    with channels(ShmCarrier) as (left, right):
        message = {"value": [torch.ones(BIG), *torch.ones(beside).split(SMALL)]}
        sender = threading.Thread(target=left.send, args=(message, soon()))
        sender.start()
        with pytest.raises(Rejected, match="too much"):
            right.recv(soon())
        right.skip()
        right.send({"error": "too much"}, soon())
        right.close()
        sender.join()
        assert left.recv(soon()) == {"error": "too much"}
