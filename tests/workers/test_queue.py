"""One at a time, in order of arrival, and nobody runs for nobody."""

from __future__ import annotations

import threading

import pytest

from luna_mp.errors import Broken
from luna_mp.workers.queue import SingleFlight
from tests.helpers import wait_until
from tests.workers.fakes import FakeCall


def line_up(flight, calls, order):
    """A thread for each call, entered in order; each notes its client when it runs."""
    threads = []
    for call in calls:
        depth = len(flight.to_data()["line"])
        thread = threading.Thread(target=run, args=(flight, call, order))
        thread.start()
        threads.append(thread)
        wait_until(lambda depth=depth: len(flight.to_data()["line"]) == depth + 1)
    return threads


def run(flight, call, order):
    try:
        with flight.turn(call):
            order.append(call.client)
    except Broken:
        order.append(f"dropped {call.client}")


def test_calls_run_in_the_order_in_which_they_came():
    flight, order = SingleFlight(), []
    calls = [FakeCall(str(number)) for number in range(20)]
    with flight.turn(FakeCall("first")):
        threads = line_up(flight, calls, order)
        assert flight.to_data()["depth"] == 20
    for thread in threads:
        thread.join(5)
    assert order == [call.client for call in calls]


def test_waiting_call_whose_client_has_gone_is_dropped_and_the_next_runs():
    flight, order = SingleFlight(), []
    calls = [FakeCall("a"), FakeCall("b"), FakeCall("c")]
    with flight.turn(FakeCall("first")):
        threads = line_up(flight, calls, order)
        calls[1].is_gone = True
        wait_until(lambda: order == ["dropped b"])
    for thread in threads:
        thread.join(5)
    assert order == ["dropped b", "a", "c"]
    assert flight.to_data()["dropped"] == 1


def test_call_whose_client_has_gone_does_not_even_start():
    call = FakeCall()
    call.is_gone = True
    with pytest.raises(Broken, match="dropped before it ran"):
        with SingleFlight().turn(call):
            pytest.fail("it ran")


def test_a_call_that_raises_makes_way_for_the_next():
    flight = SingleFlight()
    with pytest.raises(ZeroDivisionError):
        with flight.turn(FakeCall()):
            raise ZeroDivisionError
    with flight.turn(FakeCall()):
        pass
    assert flight.to_data()["methods"]["decode"]["calls"] == 2
