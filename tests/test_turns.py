"""When a reply leaves: within the turn of its call where that keeps nobody waiting, else after."""

from __future__ import annotations

import threading

import pytest
import torch

from luna_mp import errors
from tests.helpers import endpoint, served, wait_until
from tests.workers.fakes import GPU_FAULT


class Turn:
    """Its end waits for `may_end`, and raises `error` if there is one."""

    def __init__(self, error=None):
        self.may_end = threading.Event()
        self.is_over = False
        self._error = error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        assert self.may_end.wait(10.0)
        self.is_over = True
        if self._error:
            raise self._error


def in_turn(turn, result):
    def method(call):
        call.hold(turn)
        return result

    return {"method": method}


def test_reply_leaves_before_the_turn_is_over(tmp_path):
    turn = Turn()
    with served(in_turn(turn, "small"), str(tmp_path / "sock")) as server:
        with endpoint(server) as client:
            assert client.call("method", (), {}, 10.0) == "small"
            assert not turn.is_over
            turn.may_end.set()
            wait_until(lambda: turn.is_over)


@pytest.mark.parametrize("result", ["x" * (1 << 20), torch.zeros(100)], ids=["long", "tensor"])
def test_reply_that_might_have_to_wait_for_the_client_leaves_after_the_turn(tmp_path, result):
    turn = Turn()
    with served(in_turn(turn, result), str(tmp_path / "sock")) as server:
        with endpoint(server) as client:
            threading.Timer(0.2, turn.may_end.set).start()
            client.call("method", (), {}, 10.0)
            assert turn.is_over


def test_fault_at_the_end_of_an_answered_turn_is_noted_and_ends_the_connection(tmp_path):
    noted = []
    turn = Turn(RuntimeError(GPU_FAULT))
    exposed = in_turn(turn, "small")
    with served(exposed, str(tmp_path / "sock"), on_fault=noted.append) as server:
        with endpoint(server) as client:
            assert client.call("method", (), {}, 10.0) == "small"
            turn.may_end.set()
            wait_until(lambda: noted)
            wait_until(lambda: "0 connections" in repr(server))


def test_error_of_a_call_in_its_turn_is_told_once(tmp_path):
    turn = Turn()
    turn.may_end.set()

    def method(call):
        call.hold(turn)
        raise errors.Rejected("it takes none of this")

    with served({"method": method}, str(tmp_path / "sock")) as server, endpoint(server) as client:
        for _ in range(2):
            with pytest.raises(errors.Rejected, match="none of this"):
                client.call("method", (), {}, 10.0)
        assert turn.is_over
