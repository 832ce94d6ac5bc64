"""Waits that end: by time, or since nobody wants them any more."""

from __future__ import annotations

import math
import threading

import pytest

from luna_mp.deadline import CHECK_SECONDS, LONGEST, Deadline
from luna_mp.endpoint import Endpoint
from luna_mp.errors import OutOfMemory, TimedOut
from tests.helpers import KEY, endpoint, served, wait_until


class Unwanted(Exception):
    pass


def refuse():
    raise Unwanted


def test_a_deadline_says_what_took_too_long():
    with pytest.raises(TimedOut, match="waiting for tea took longer than 0 s"):
        Deadline(0.0, "waiting for tea").remaining()


def test_without_a_question_a_pause_is_all_that_is_left():
    assert 99.0 < Deadline(100.0, "waiting").pause() <= 100.0


def test_a_pause_is_short_where_there_is_a_question():
    asked = []
    assert Deadline(100.0, "waiting", lambda: asked.append(1)).pause() == CHECK_SECONDS
    assert asked


def test_a_pause_is_never_longer_than_the_time_left():
    assert Deadline(CHECK_SECONDS / 2, "waiting", lambda: None).pause() <= CHECK_SECONDS / 2


def test_a_wait_that_is_not_wanted_any_more_ends():
    with pytest.raises(Unwanted):
        Deadline(100.0, "waiting", refuse).pause()


def test_time_comes_before_the_question():
    with pytest.raises(TimedOut):
        Deadline(0.0, "waiting", refuse).pause()


def test_a_call_that_is_not_wanted_any_more_ends_on_both_sides(tmp_path):
    began, gone = threading.Event(), threading.Event()

    def work(call):
        began.set()
        wait_until(call.is_abandoned)
        gone.set()

    def check():
        if began.is_set():
            raise Unwanted

    with served({"work": work}, str(tmp_path / "s"), KEY) as server, endpoint(server) as client:
        with pytest.raises(Unwanted):
            client.call("work", (), {}, 100.0, check=check)
        assert gone.wait(10.0)


def test_a_connection_is_well_after_a_call_that_was_not_wanted(tmp_path):
    began = threading.Event()

    def work(call, wait):
        began.set()
        return wait and wait_until(call.is_abandoned)

    with served({"work": work}, str(tmp_path / "s"), KEY) as server, endpoint(server) as client:
        with pytest.raises(Unwanted):
            client.call("work", (True,), {}, 100.0, check=lambda: began.is_set() and refuse())
        assert client.call("work", (False,), {}, 100.0) is False


def test_a_call_may_be_given_for_ever():
    assert Deadline(math.inf, "a call").pause() <= LONGEST


def answered_late(monkeypatch, error, kind):
    def exchange(self, request, deadline):
        wait_until(lambda: deadline.has_passed)
        return {"error": error, "kind": kind, "traceback": ""}

    monkeypatch.setattr(Endpoint, "_exchange", exchange)
    return Endpoint("vae", lambda: "nowhere", KEY).call("echo", (), {}, 0.1)


def test_a_call_that_the_service_dropped_for_its_time_is_out_of_time(monkeypatch):
    with pytest.raises(TimedOut, match=r"vae.echo took longer than 0.1 s") as caught:
        answered_late(monkeypatch, "nobody waits for it any more", "Broken")
    assert "nobody waits" in str(caught.value.__cause__)


def test_an_error_of_the_model_that_comes_late_stays_what_it_is(monkeypatch):
    with pytest.raises(OutOfMemory, match="the card is full"):
        answered_late(monkeypatch, "the card is full", "OutOfMemory")
