"""What the service says of a result, and its memory once the client has let go."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def found():
    command = [sys.executable, "-m", "tests.gpu.exporting"]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=100, check=True)
    return json.loads(ran.stdout)


def test_a_client_waits_only_for_a_result_that_is_not_done(found):
    assert found["waits"] == {"done": False, "not": True}


def test_each_result_has_a_counter_and_those_that_follow_in_its_place_the_same(found):
    first, second, third = found["counters"]
    assert len({tuple(counter) for counter in first + second}) == 6
    assert second == third


def test_memory_comes_back_however_often_a_client_lets_go_of_it(found):
    assert found["left"] == {"0": 1, "1": 0, "2": 0, "3": 0}


def test_memory_of_a_message_that_never_left_comes_back(found):
    assert found["taken_back"] == 0


def test_a_result_is_copied_only_out_of_memory_that_was_given_up(found):
    assert found["as_made"] == [True, False]


def test_what_lies_in_memory_that_was_given_up_is_told_from_what_comes_after(found):
    first, second, third = found["pools"]
    assert first == second != third


def test_memory_that_cannot_be_pinned_fails_no_kernel(found):
    assert found["pinned_twice"] == [False, 2.0]


def test_a_copy_to_a_segment_that_is_taken_back_is_waited_for(found):
    assert found["copy_is_done"]
