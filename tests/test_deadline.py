"""Waits that end: by time, or since nobody wants them any more."""

from __future__ import annotations

import pytest

from luna_mp.deadline import CHECK_SECONDS, Deadline
from luna_mp.errors import TimedOut


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
