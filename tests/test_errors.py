"""An error that nobody keeps keeps nothing: it goes at once, and with it all that it passed.

The frames that an error has passed, and those that called them, hold the tensors of a call. Where
one of them holds the error, or it holds itself, all of that waits for Python's collector, which an
idle service may not run for hours.
"""

from __future__ import annotations

import weakref

import pytest
import torch

import luna_mp
from luna_mp import errors
from luna_mp.deadline import Deadline
from luna_mp.wire import stream
from luna_mp.wire.carrier import Carrier
from tests.helpers import endpoint, served
from tests.wire.pair import channels, soon

pytestmark = pytest.mark.usefixtures("no_collector")


def is_kept(kind, step, *args):
    """Whether the error that `step` raises, or one that led to it, outlives its handler."""
    try:
        step(*args)
    except kind as exc:
        met = [weakref.ref(each) for each in chain(exc) if type(each).__weakrefoffset__]
    return any(error() is not None for error in met)


def chain(error):
    met = []
    while error is not None and error not in met:
        met.append(error)
        error = error.__cause__ or error.__context__
    return met


@pytest.fixture
def ends():
    with channels() as (left, right):
        yield left, right


def test_error_that_a_peer_ended_is_not_kept(ends):
    left, right = ends
    left.close()
    assert not is_kept(errors.Broken, right.recv, soon())


@pytest.mark.parametrize("is_seen_before", [False, True])
def test_error_that_a_message_was_never_read_is_not_kept(ends, is_seen_before):
    left, right = ends
    right.send({}, soon())
    left.close()
    if is_seen_before:
        assert right.stream.has_closed
    assert not is_kept(stream.NeverRead, right.recv, soon())


class Local:
    """Stands for what a frame holds."""


def test_stream_that_was_seen_to_be_closed_keeps_no_frame(ends):
    left, right = ends
    right.send({}, soon())
    left.close()

    def looks():
        local = Local()
        assert right.stream.has_closed
        return weakref.ref(local)

    assert looks()() is None


class Waiting(Carrier):
    """Its tensors are waited for, and never come."""

    name = "waiting"

    def pack(self, tensor, out):
        return ()

    def unpack(self, token, source):
        source.wait(lambda: False)


class Unwanted(Exception):
    """Raised by a caller's own check."""


def refuse():
    raise Unwanted


def test_error_of_a_caller_who_gives_up_a_wait_is_not_kept():
    with channels(Waiting) as (left, right):
        left.send({"value": torch.zeros(10_000)}, soon())
        assert not is_kept(Unwanted, right.recv, Deadline(10, "the test", refuse))


def test_error_that_a_service_reports_is_not_kept(tmp_path):
    def fail(call):
        raise errors.Rejected("none of this")

    with served({"fail": fail}, str(tmp_path / "s")) as server, endpoint(server) as client:
        assert not is_kept(errors.Rejected, client.call, "fail", (), {}, 10.0)


def test_error_that_nobody_listens_is_not_kept(tmp_path):
    assert not is_kept(errors.Unavailable, stream.connect, str(tmp_path / "s"), soon())


def test_error_that_no_service_runs_is_not_kept(runtime_dir):
    assert not is_kept(errors.Unavailable, luna_mp.connect)
