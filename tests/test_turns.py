"""When a reply leaves: within the turn of its call where that keeps nobody waiting, else after."""

from __future__ import annotations

import weakref

import pytest
import torch

from luna_mp import errors
from luna_mp.sessions import Sessions
from luna_mp.wire.carrier import Carrier
from tests.helpers import calls_over, request
from tests.wire.pair import channels, soon
from tests.workers.fakes import GPU_FAULT


class Turn:
    """Does something at its end, and notes whether the client had its reply by then."""

    def __init__(self, client, at_end=lambda: None):
        self.had_reply = None
        self._client = client
        self._at_end = at_end

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.had_reply = self._client.stream.is_readable(0.0)
        self._at_end()


class Connection:
    """One request on its way to a service that answers `result`, in the turn that it gets."""

    def __init__(self, client, service):
        self.client = client
        self.service = service
        self.sessions = Sessions()
        self.noted = []

    def answer(self, turn, result, after=None):
        def method(call):
            call.hold(turn)
            call.after = after
            if isinstance(result, Exception):
                raise result
            return result

        exposed = {"method": method}
        calls = calls_over(self.service, exposed, self.sessions, on_fault=self.noted.append)
        self.client.send(request("method"), soon())
        calls.answer(calls.next())

    @property
    def figures(self):
        [client] = self.sessions.to_data()["clients"]
        return client["calls"], client["failures"]


@pytest.fixture
def connection():
    with channels() as (left, right):
        yield Connection(left, right)


def raises(error):
    def at_end():
        raise error

    return at_end


def test_reply_leaves_before_the_turn_is_over(connection):
    turn = Turn(connection.client)
    connection.answer(turn, "small")
    assert turn.had_reply
    assert connection.client.recv(soon()) == {"result": "small"}
    assert connection.figures == (1, 0)


@pytest.mark.parametrize("result", ["x" * (1 << 15), torch.zeros(100)], ids=["long", "tensor"])
def test_reply_that_might_wait_for_the_client_leaves_after_the_turn(connection, result):
    turn = Turn(connection.client)
    connection.answer(turn, result)
    assert turn.had_reply is False
    assert connection.client.stream.is_readable(0.0)


def test_reply_that_the_client_s_socket_has_no_room_for_leaves_after_the_turn(connection):
    filling = bytes(1 << 12)
    filled = 0
    while connection.service.stream.send_at_once(filling, soon()):
        filled += len(filling)

    def read():
        connection.client.stream.recv_into(bytearray(filled), soon())
        assert not connection.client.stream.is_readable(0.0)

    connection.answer(Turn(connection.client, read), "small")
    assert connection.client.recv(soon()) == {"result": "small"}


def test_reply_by_tcp_leaves_after_the_turn(connection):
    connection.service.stream.is_local = False
    turn = Turn(connection.client)
    connection.answer(turn, "small")
    assert turn.had_reply is False


class InUse(Carrier):
    name = "in use"
    is_in_use = True
    pack = unpack = None


def test_reply_of_a_call_that_uses_leases_leaves_after_the_turn(connection):
    connection.service.use(InUse())
    turn = Turn(connection.client)
    connection.answer(turn, "small")
    assert turn.had_reply is False


def test_error_in_the_turn_is_told_once(connection):
    connection.answer(Turn(connection.client), errors.Rejected("none of this"))
    assert connection.client.recv(soon())["error"] == "none of this"
    assert not connection.client.stream.is_readable(0.0)
    assert connection.figures == (1, 1)


@pytest.fixture
def going(connection, monkeypatch):
    """One whose client goes as it is answered, and leaves something unread, which is a reset."""
    connection.service.send({}, soon())
    stream = type(connection.service.stream)
    send_at_once = stream.send_at_once

    def goes(self, data, deadline):
        if self is connection.service.stream:
            connection.client.close()
        return send_at_once(self, data, deadline)

    monkeypatch.setattr(stream, "send_at_once", goes)
    return connection


def test_client_that_goes_as_it_is_answered_is_sent_nothing_more(going):
    turn = Turn(going.client)
    with pytest.raises(errors.Broken, match="before it read the message"):
        going.answer(turn, "small")
    assert turn.had_reply is not None
    assert going.figures == (1, 0)


class Small(Carrier):
    """What it packs leaves at once, as what stays on a GPU does."""

    name = "small"
    unpack = None

    def pack(self, tensor, out):
        return ()


class Fence:
    """Work of a GPU, which is done when it was asked for thrice."""

    asked = 0

    def query(self):
        self.asked += 1
        return self.asked > 3


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("after", [lambda: None, Fence], ids=["done", "not done"])
@pytest.mark.parametrize("is_local", [True, False], ids=["in its turn", "after it"])
def test_result_of_a_client_that_goes_as_it_is_answered_is_not_kept(going, after, is_local):
    going.service.use(Small())
    going.service.stream.is_local = is_local
    result = torch.zeros(1 << 15)
    kept = weakref.ref(result)
    with pytest.raises(errors.Broken, match="before it read the message"):
        going.answer(Turn(going.client), result, after())
    del result
    assert kept() is None


class Noting(Carrier):
    """Notes what is given back of what it packed."""

    name = "noting"

    def __init__(self):
        self.given_back = []

    def pack(self, tensor, out):
        out.undo.append(lambda: self.given_back.append(tensor.numel()))
        out.before.append(lambda: None)
        return ("token",)

    unpack = None


def test_result_of_a_turn_that_fails_at_its_end_is_given_back(connection):
    carrier = Noting()
    connection.service.use(carrier)
    turn = Turn(connection.client, raises(RuntimeError("CUDA error: out of memory")))
    connection.answer(turn, torch.zeros(1 << 15))
    assert "out of memory" in connection.client.recv(soon())["error"]
    assert carrier.given_back == [1 << 15]


def test_error_at_the_end_of_an_answered_turn_ends_the_connection(connection):
    turn = Turn(connection.client, raises(RuntimeError("CUDA error: out of memory")))
    with pytest.raises(errors.RemoteFailure, match="method failed after it was answered: CUDA"):
        connection.answer(turn, "small")
    assert connection.client.recv(soon()) == {"result": "small"}
    assert not connection.noted


def test_fault_at_the_end_of_an_answered_turn_is_noted(connection):
    turn = Turn(connection.client, raises(RuntimeError(GPU_FAULT)))
    with pytest.raises(errors.RemoteFailure, match="lost its GPU"):
        connection.answer(turn, "small")
    assert connection.client.recv(soon()) == {"result": "small"}
    assert [str(fault) for fault in connection.noted] == [GPU_FAULT]
