"""Who may call what, and what becomes of a call that goes wrong."""

from __future__ import annotations

import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict

import pytest
import torch

from luna_mp import errors, manager
from luna_mp.client import _parse
from luna_mp.deadline import Deadline
from luna_mp.endpoint import Endpoint
from luna_mp.wire import handshake, stream
from luna_mp.wire.carrier import CarrierFailed
from luna_mp.wire.channel import HEADER, Channel
from tests.helpers import KEY, LIMIT, endpoint, served, wait_until
from tests.same import assert_same


def echo(call, *args, **kwargs):
    return [*args, kwargs]


def is_inference(call):
    return torch.is_inference_mode_enabled()


def fail(call):
    raise ZeroDivisionError("of the model")


EXPOSED = {"echo": echo, "fail": fail, "is_inference": is_inference}


@pytest.fixture(params=["local", "tcp"])
def server(request, tmp_path):
    address = str(tmp_path / "sock") if request.param == "local" else ("127.0.0.1", 0)
    with served(EXPOSED, address) as running:
        yield running


@pytest.fixture
def client(server):
    with endpoint(server) as connected:
        yield connected


def call(client, method, *args, seconds=10.0, **kwargs):
    return client.call(method, args, kwargs, seconds)


def test_arguments_and_results_cross(client):
    tensor = torch.rand(1, 3, 100, 200).movedim(1, -1)
    value, (returned, number), kwargs = call(client, "echo", "x", (tensor, 3), key=None)
    assert (value, number, kwargs) == ("x", 3, {"key": None})
    assert_same(returned, tensor)


def test_calls_are_made_in_inference_mode(client):
    assert call(client, "is_inference")


def test_carrier_follows_the_address(client, server):
    client.open(Deadline(5, "opening"))
    assert client.carrier == ("shm" if isinstance(server.address, str) else "inline")


def test_error_of_the_model_keeps_its_traceback(client):
    with pytest.raises(errors.RemoteFailure, match="ZeroDivisionError: of the model") as caught:
        call(client, "fail")
    assert "in fail" in str(caught.value.__cause__)


@pytest.mark.parametrize("name", ["shutdown", "#GETVALUE", "__repr__", "create", "stop", ""])
def test_what_is_not_exposed_cannot_be_called(client, name):
    with pytest.raises(errors.Rejected, match="is not a call that vae takes"):
        call(client, name)
    assert call(client, "echo", 1)[0] == 1


def test_unsendable_argument_is_refused_before_it_is_sent(client):
    with pytest.raises(errors.Unsendable, match=r'args\[0\]\["positive"\]\[2\]: function'):
        call(client, "echo", {"positive": [0, 1, lambda: None]})
    assert call(client, "echo", 1)[0] == 1


def test_wrong_key_is_refused(server):
    with endpoint(server, key=bytes(32)) as stranger:
        with pytest.raises(errors.WrongKey, match="authkey"):
            call(stranger, "echo")


def test_wrong_version_names_both(server, client, monkeypatch):
    monkeypatch.setattr(handshake, "PROTOCOL", 70)
    hello = {"luna": 1, "nonce": "0" * 64}
    connected = stream.connect(server.address, Deadline(5, "connecting"))
    handshake._send(connected, hello, Deadline(5, "sending"))
    with pytest.raises(errors.WrongVersion, match=r"version 1 .* version 70"):
        handshake._recv(connected, Deadline(5, "receiving"))
        handshake._recv(connected, Deadline(5, "receiving"))
    connected.close()


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\n\r\n", b"\0\0", b"\xff" * 70_000, b"\x20\0" + b"[" * 0x2000],
    ids=["http", "nothing", "noise", "nesting"],
)
def test_garbage_before_the_key_does_no_harm(server, client, garbage):
    connected = stream.connect(server.address, Deadline(5, "connecting"))
    connected.send([garbage], Deadline(5, "sending"))
    connected.close()
    assert call(client, "echo", 1)[0] == 1


@pytest.fixture
def raw(server):
    """An authenticated connection to write bytes on."""
    connected = stream.connect(server.address, Deadline(5, "connecting"))
    handshake.greet(connected, KEY, handshake.identity("raw", LIMIT))
    with Channel(connected, LIMIT) as channel:
        yield channel


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (HEADER.pack(1 << 31, 0), "the limit is 67108864"),
        (HEADER.pack(10, 1 << 60), f"the limit is {LIMIT}"),
        (HEADER.pack(5, 0) + b"hello", "is not data"),
        (HEADER.pack(8, 0) + b"cos\nsys\n", "only data may cross"),
        (HEADER.pack(2, 9) + b"N.", "malformed"),
    ],
    ids=["pickled", "inline", "garbage", "code", "longer than told"],
)
def test_bad_message_is_answered_and_ends_only_its_connection(raw, client, data, message):
    raw.stream.send([data], Deadline(5, "sending"))
    assert message in raw.recv(Deadline(5, "the refusal"))["error"]
    with pytest.raises(errors.Broken):
        raw.recv(Deadline(5, "the end"))
    assert call(client, "echo", 1)[0] == 1


def test_request_over_the_limit_is_refused_before_it_is_sent(tmp_path):
    with served(EXPOSED, ("127.0.0.1", 0), limit=1 << 20) as server, endpoint(server) as client:
        with pytest.raises(errors.Rejected, match="4000000 bytes .* limit is 1048576"):
            call(client, "echo", torch.rand(1_000_000))
        assert call(client, "echo", 1)[0] == 1


def test_result_over_the_limit_is_an_error(tmp_path):
    exposed = {"big": lambda call: torch.rand(1_000_000), **EXPOSED}
    with served(exposed, ("127.0.0.1", 0), limit=1 << 20) as server, endpoint(server) as client:
        with pytest.raises(errors.Rejected, match="limit is 1048576"):
            call(client, "big")
        assert call(client, "echo", 1)[0] == 1


def test_half_open_connection_is_given_up(server, client, monkeypatch):
    monkeypatch.setattr(handshake, "SECONDS", 0.2)
    connected = stream.connect(server.address, Deadline(5, "connecting"))
    wait_until(lambda: connected.peer_has_gone)
    connected.close()
    assert call(client, "echo", 1)[0] == 1


def test_stalled_message_is_given_up(raw, server, monkeypatch):
    monkeypatch.setattr("luna_mp.wire.channel.MESSAGE_SECONDS", 0.2)
    raw.stream.send([struct.pack("!IQ", 100, 0), b"x"], Deadline(5, "sending"))
    wait_until(lambda: raw.stream.peer_has_gone)


def test_too_many_connections_are_told_so(server, monkeypatch):
    monkeypatch.setattr(manager, "MAX_CONNECTIONS", 1)
    with endpoint(server) as first, endpoint(server) as second:
        assert call(first, "echo", 1)[0] == 1
        with pytest.raises(errors.Rejected, match="has its 1 connections"):
            call(second, "echo")


def test_call_that_takes_too_long_is_given_up(tmp_path):
    release = threading.Event()
    exposed = {"wait": lambda call: release.wait(10), **EXPOSED}
    with served(exposed, str(tmp_path / "sock")) as server, endpoint(server) as client:
        with pytest.raises(errors.TimedOut, match=r"vae.wait took longer than 0.2 s"):
            call(client, "wait", seconds=0.2)
        assert call(client, "echo", 1)[0] == 1
        release.set()


def test_threads_share_one_client(client):
    results = {}

    def work(number):
        results[number] = [call(client, "echo", number)[0] for _ in range(20)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: [n] * 20 for n in range(8)}


def test_threads_over_the_limit_of_a_client_wait(tmp_path, monkeypatch):
    monkeypatch.setattr("luna_mp.endpoint.MAX_CONNECTIONS", 1)
    may_end = threading.Event()
    exposed = {**EXPOSED, "work": lambda call: may_end.wait(10.0)}
    with served(exposed, str(tmp_path / "sock")) as server, endpoint(server) as client:
        working = threading.Thread(target=call, args=(client, "work"))
        working.start()
        wait_until(lambda: "1 connections" in repr(server))
        with pytest.raises(errors.TimedOut):
            call(client, "echo", seconds=0.2)
        may_end.set()
        working.join()
        assert call(client, "echo", 1)[0] == 1
        assert "1 connections" in repr(server)


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ([stream.NeverRead("ended"), CarrierFailed("cuda")], nullcontext()),
        ([CarrierFailed("cuda"), stream.NeverRead("ended")], nullcontext()),
        ([stream.NeverRead("ended")] * 2, pytest.raises(stream.NeverRead)),
        ([CarrierFailed("cuda")] * 2, pytest.raises(CarrierFailed)),
    ],
)
def test_call_is_made_again_once_after_each_kind_of_failure(monkeypatch, failures, expected):
    left = [*failures]

    def exchange(self, request, deadline):
        if left:
            raise left.pop(0)
        return {"result": "at last"}

    monkeypatch.setattr(Endpoint, "_exchange", exchange)
    with expected:
        assert call(Endpoint("vae", lambda: "nowhere", KEY), "echo") == "at last"


def test_client_finds_a_server_that_came_back(tmp_path):
    path = str(tmp_path / "sock")
    with served(EXPOSED, path) as first, endpoint(first) as client:
        assert call(client, "echo", 1)[0] == 1
        first.stop(grace=1.0)
        wait_until(lambda: not (tmp_path / "sock").exists())
        with served(EXPOSED, path):
            assert call(client, "echo", 2)[0] == 2


def test_call_that_comes_while_a_service_ends_goes_to_the_next(tmp_path):
    path = tmp_path / "sock"
    may_end = threading.Event()
    both = threading.Barrier(2, timeout=10.0)
    first = {
        "work": lambda call: may_end.wait(10.0),
        "meet": lambda call: both.wait() and None,
        "who": lambda call: "the first",
    }
    with served(first, str(path)) as ending, endpoint(ending) as client:
        working = threading.Thread(target=call, args=(client, "work"))
        working.start()
        wait_until(lambda: "1 connections" in repr(ending))
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda _: call(client, "meet"), range(2)))
        assert call(client, "who") == "the first"
        assert "2 idle" in repr(client)
        stopping = threading.Thread(target=ending.stop, args=(10.0,))
        stopping.start()
        wait_until(lambda: not path.exists())
        with served({"who": lambda call: "the next"}, str(path)):
            assert call(client, "who") == "the next"
        may_end.set()
        working.join()
        stopping.join()


def test_socket_of_a_killed_service_is_replaced(tmp_path):
    path = str(tmp_path / "sock")
    left = socket.socket(socket.AF_UNIX)
    left.bind(path)
    left.close()
    with served(EXPOSED, path) as server, endpoint(server) as client:
        assert call(client, "echo", 1)[0] == 1


def test_socket_of_a_living_service_is_left_alone(tmp_path):
    path = str(tmp_path / "sock")
    with served(EXPOSED, path):
        with pytest.raises(errors.LunaError, match="cannot listen"):
            with served(EXPOSED, path):
                pass


def test_impostor_cannot_pass_by_relaying_between_two_clients():
    """A listener without the key hands one client's challenge to another and learns nothing."""
    impostor = socket.create_server(("127.0.0.1", 0))
    failures = []

    def greet():
        connected = stream.connect(impostor.getsockname(), Deadline(5, "connecting"))
        try:
            handshake.greet(connected, KEY, handshake.identity("", LIMIT))
        except errors.LunaError as exc:
            failures.append(type(exc))
        finally:
            connected.close()

    victims = [threading.Thread(target=greet) for _ in range(2)]
    for victim in victims:
        victim.start()
    ends = [stream.Stream(impostor.accept()[0], "victim") for _ in victims]
    deadline = Deadline(5, "the attack")
    hellos = [handshake._recv(end, deadline) for end in ends]
    # Each victim gets the other's nonce and, since there is no better one, an invented proof.
    for end, other in zip(ends, reversed(hellos), strict=True):
        handshake._send(end, {**other, "proof": other["nonce"]}, deadline)
    for victim in victims:
        victim.join()
    for end in ends:
        end.close()
    impostor.close()
    assert failures == [errors.WrongKey] * 2


def test_a_service_without_threads_to_spare_refuses_and_goes_on(server, monkeypatch):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        connected = stream.connect(server.address, Deadline(5, "the test"))
        wait_until(lambda: connected.is_readable(0.0))
        connected.close()
    with endpoint(server) as client:
        assert client.call("echo", (1,), {}, 5.0) == [1, {}]


@pytest.mark.parametrize(
    "wrong",
    [{"pid": -1}, {"pid": "x"}, {"born": "then"}, {"gpus": None}, {"max_message": 0}],
    ids=str,
)
def test_an_identity_of_wrong_types_is_rejected(wrong):
    good = asdict(handshake.identity("", LIMIT))
    assert handshake.Identity.from_data(good).client_id
    with pytest.raises(errors.Rejected, match="an identity is malformed"):
        handshake.Identity.from_data({**good, **wrong})


def test_the_service_of_the_other_kind_is_told_apart(server):
    client = Endpoint("clip", lambda: server.address, KEY)
    with pytest.raises(errors.Rejected, match="is the vae service and the clip service is wanted"):
        client.open(Deadline(5, "the test"))
    client.close()


def test_a_check_does_not_wait_for_a_service_that_was_there(tmp_path):
    with served(EXPOSED, str(tmp_path / "sock")) as server, endpoint(server) as client:
        client.open(Deadline(5, "the test"))
        client.check(Deadline(5, "the test"))
        server.stop(grace=1.0)
        wait_until(lambda: not (tmp_path / "sock").exists())
        with pytest.raises(errors.Unavailable):
            client.check(Deadline(60, "the test"))


def test_a_host_that_is_not_there_is_unavailable():
    with pytest.raises(errors.Unavailable, match="host.invalid:1 cannot be reached"):
        stream.connect(("host.invalid", 1), Deadline(30, "the test"))


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_place_of_a_server_is_an_address_that_clients_take(host, shown):
    try:
        stream.listen((host, 0)).close()
    except errors.LunaError:
        pytest.skip(f"this machine has no {host}")
    with served(EXPOSED, (host, 0)) as server:
        assert server.place == f"{shown}:{server.address[1]}"
        assert _parse(server.place) == server.address
