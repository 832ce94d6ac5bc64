"""Which carrier a connection gets, why not a faster one, and what becomes of one that fails."""

from __future__ import annotations

import threading
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest
import torch

from luna_mp import errors
from luna_mp.endpoint import Endpoint
from luna_mp.wire import handshake, probe, shm
from luna_mp.wire.carrier import CarrierFailed
from tests.helpers import KEY, endpoint, served, wait_until
from tests.same import assert_same
from tests.wire.fakes import (
    ClientEnd,
    ClientEndOverACopy,
    ClientEndThatMisreads,
    ClientEndThatOpensNothing,
    FakeExporter,
    FakeGpu,
    FakeImporter,
    FullBook,
    ImporterWithoutRuntime,
    ServiceEnd,
    ServiceEndThatCannotExport,
    ServiceEndThatFailsLater,
)
from tests.wire.pair import LIMIT, channels, soon

pytestmark = pytest.mark.skipif(not shm.is_supported(), reason="no shared memory here")

BIG = 40_000  # elements; more than what is sent inline for being small
LOST = "cuda: invalid resource handle"
FULL = "cuda: No space left on device"


class Service:
    """What the server of a test exposes; counts its runs."""

    def __init__(self):
        self.runs = 0
        self.entered = threading.Event()
        self.may_return = threading.Event()
        self.on_run = lambda: None

    def exposed(self):
        return {call.__name__: call for call in (self.double, self.numbers, self.more, self.wait)}

    def double(self, call, tensor):
        self.runs += 1
        return tensor * 2

    def numbers(self, call):
        self.runs += 1
        self.on_run()
        return torch.arange(BIG)

    def more(self, call):
        """Of the GPU, and behind it of the host."""
        return [self.numbers(call), torch.zeros(100)]

    def wait(self, call):
        self.entered.set()
        assert self.may_return.wait(10)
        return torch.arange(BIG)


@pytest.fixture
def gpu():
    return FakeGpu()


@pytest.fixture
def service():
    return Service()


@contextmanager
def connected(service, exporter, importer, address):
    with served(service.exposed(), address, exporter=exporter) as server:
        with endpoint(server, importer=importer) as client:
            client.open(soon())
            yield server, client


@pytest.fixture
def address(tmp_path):
    return str(tmp_path / "sock")


@pytest.fixture
def importer(gpu):
    return FakeImporter(gpu)


@pytest.fixture
def client(service, gpu, importer, address):
    with connected(service, FakeExporter(gpu), importer, address) as (_, client):
        assert (client.carrier, client.reason) == ("cuda", "")
        yield client


def call(client, method, *args):
    return client.call(method, args, {}, 10.0)


def told(server):
    """Carrier and reason as the service's status has them."""
    [session] = server._sessions.to_data()["clients"]
    return session["carrier"], session["reason"]


def test_a_gpu_that_both_ends_read_and_write_is_used(client, gpu):
    before = len(gpu.exported)
    first = call(client, "double", torch.ones(BIG))
    assert_same(call(client, "double", first), torch.full((BIG,), 4.0))
    assert len(gpu.exported) == before + 2


def test_what_clients_drop_is_taken_back_while_their_next_call_is_awaited(gpu, importer, address):
    exporter = FakeExporter(gpu)
    with connected(Service(), exporter, importer, address) as (_, client):
        call(client, "numbers")
        assert exporter.book.collected.wait(5.0)


@pytest.mark.parametrize(
    ("uuid", "ends", "importer_class", "reason"),
    [
        (
            "99999999-9999",
            (ServiceEnd, ClientEnd),
            FakeImporter,
            (
                "the service is on GPU 99999999-9999, and this process computes on "
                "00000000-0000, 11111111-2222"
            ),
        ),
        (
            "",
            (ServiceEnd, ClientEnd),
            ImporterWithoutRuntime,
            "this process's allocator needs the package cuda-bindings",
        ),
        (
            "",
            (ServiceEndThatCannotExport, ClientEnd),
            FakeImporter,
            "RuntimeError: CUDA error: operation not supported",
        ),
        (
            "",
            (ServiceEnd, ClientEndThatOpensNothing),
            FakeImporter,
            "peer access is not supported",
        ),
        (
            "",
            (ServiceEnd, ClientEndThatMisreads),
            FakeImporter,
            "the client read other bytes than were written",
        ),
        (
            "",
            (ServiceEnd, ClientEndOverACopy),
            FakeImporter,
            "what the client wrote did not arrive",
        ),
    ],
    ids=["another GPU", "no runtime", "no export", "no opening", "wrong nonce", "lost write"],
)
def test_a_gpu_that_fails_its_probe_is_left_for_shared_memory_with_the_reason(
    service, gpu, address, uuid, ends, importer_class, reason
):
    exporter = FakeExporter(gpu, ends[0], **({"uuid": uuid} if uuid else {}))
    with connected(service, exporter, importer_class(gpu, ends[1]), address) as (server, client):
        assert (client.carrier, client.reason) == ("shm", f"cuda: {reason}")
        assert told(server) == ("shm", f"cuda: {reason}")
        assert_same(call(client, "double", torch.ones(BIG)), torch.full((BIG,), 2.0))


def test_a_service_without_a_gpu_says_so(service, importer, address):
    with connected(service, None, importer, address) as (_, client):
        assert client.carrier == "shm"
        assert client.reason == "cuda: the service has no GPU whose memory it can share"


def test_a_client_of_another_pid_namespace_gets_no_memory_that_would_be_taken_back_at_once(
    service, gpu, importer, address, monkeypatch
):
    with served(service.exposed(), address, exporter=FakeExporter(gpu)) as server:
        elsewhere = replace(handshake.identity("", LIMIT), pid=1 << 30)
        monkeypatch.setattr(handshake, "identity", lambda *_: elsewhere)
        with endpoint(server, importer=importer) as client:
            client.open(soon())
            assert client.carrier == "shm"
            assert "cuda: the service sees no process 1073741824" in client.reason


def test_a_client_that_wants_no_gpu_has_no_reason_to_give(service, gpu, address):
    with connected(service, FakeExporter(gpu), None, address) as (_, client):
        assert (client.carrier, client.reason) == ("shm", "")


def test_another_host_is_reached_inline(service, gpu, importer):
    with connected(service, FakeExporter(gpu), importer, ("127.0.0.1", 0)) as (server, client):
        assert (client.carrier, client.reason) == ("inline", "the service is reached over TCP")
        assert told(server) == ("inline", "the service is reached over TCP")
        assert_same(call(client, "numbers"), torch.arange(BIG))
    assert importer.tried == 0


@pytest.mark.parametrize("request_", [{"prepare": "shm"}, {"prepare": "cuda"}], ids=str)
def test_another_host_cannot_ask_for_what_it_cannot_reach(service, gpu, request_):
    with connected(service, FakeExporter(gpu), None, ("127.0.0.1", 0)) as (_, client):
        channel = client._take(soon())
        channel.send(request_, soon())
        assert "neither call nor probe" in channel.recv(soon())["error"]
        channel.close()


@pytest.mark.parametrize("request_", [{"prepare": "shm"}, {"prepare": "cuda"}], ids=str)
def test_a_client_cannot_have_twice_what_it_has(client, request_):
    assert client.carrier == "cuda"
    channel = client._take(soon())
    channel.send(request_, soon())
    assert "neither call nor probe" in channel.recv(soon())["error"]
    channel.close()


def test_a_system_without_shared_memory_goes_inline(service, gpu, importer, address, monkeypatch):
    monkeypatch.setattr(shm, "is_supported", lambda: False)
    with connected(service, FakeExporter(gpu), importer, address) as (_, client):
        assert client.carrier == "inline"
        assert client.reason == "shm: this system has no memfd"
        assert_same(call(client, "numbers"), torch.arange(BIG))


class Garbling(probe.Answerer):
    """Sends other bytes back than came."""

    def answer(self, request):
        reply = super().answer(request)
        return {"tensor": reply["tensor"] ^ 1} if "probe" in request else reply


class Refusing(probe.Answerer):
    """Has no shared memory to offer."""

    def answer(self, request):
        if "prepare" in request:
            raise errors.Rejected("no space is left")
        return super().answer(request)


def answer_all(channel, answerer):
    """The service's end of one probe."""
    request = {}
    while "use" not in request:
        request = channel.recv(soon())
        try:
            reply = answerer.answer(request)
        except errors.LunaError as exc:
            reply = {"error": str(exc)}
        channel.send(reply, soon())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Garbling, "shm: other bytes came back than were sent"),
        (Refusing, "shm: no space is left"),
    ],
)
def test_shared_memory_that_fails_its_probe_is_not_used_and_nothing_faster(
    kind, reason, gpu, importer
):
    identity = handshake.identity("", LIMIT)
    with channels() as (left, right):
        answerer = kind(right, identity, FakeExporter(gpu))
        thread = threading.Thread(target=answer_all, args=(right, answerer))
        thread.start()
        assert probe.choose(left, identity, importer) == reason
        thread.join()
        assert (left.carrier, right.carrier) == ("inline", "inline")
    assert importer.tried == 0


def test_what_a_probe_that_failed_had_exported_is_given_up(gpu, address):
    given_up = []

    class End(ServiceEnd):
        def give_up(self):
            given_up.append(self)

    importer = FakeImporter(gpu, ClientEndThatOpensNothing)
    with connected(Service(), FakeExporter(gpu, End), importer, address) as (_, client):
        assert client.carrier == "shm"
        assert len(given_up) == 1


def test_a_gpu_that_is_avoided_is_not_tried_and_the_reason_is_kept(gpu, importer):
    identity = handshake.identity("", LIMIT)
    with channels() as (left, right):
        answerer = probe.Answerer(right, identity, FakeExporter(gpu))
        thread = threading.Thread(target=answer_all, args=(right, answerer))
        thread.start()
        assert probe.choose(left, identity, importer, avoided=LOST) == LOST
        thread.join()
        assert (left.carrier, right.carrier) == ("shm", "shm")
    assert importer.tried == 0


def test_a_result_that_cannot_be_opened_is_asked_for_once_more_by_shared_memory(
    client, service, gpu, importer
):
    gpu.is_lost = True
    assert_same(call(client, "numbers"), torch.arange(BIG))
    assert service.runs == 2
    assert (client.carrier, client.reason) == ("shm", LOST)
    assert_same(call(client, "double", torch.ones(BIG)), torch.full((BIG,), 2.0))
    assert service.runs == 3
    assert importer.tried == 1


def test_a_result_that_cannot_be_exported_is_asked_for_once_more_by_shared_memory(
    service, gpu, importer, address
):
    exporter = FakeExporter(gpu, ServiceEndThatFailsLater)
    with connected(service, exporter, importer, address) as (server, client):
        call(client, "numbers")
        gpu.is_lost = True
        for runs in (3, 4):
            assert_same(call(client, "numbers"), torch.arange(BIG))
            assert service.runs == runs
        assert (client.carrier, client.reason) == ("shm", FULL)
        assert told(server) == ("shm", FULL)


def test_a_result_that_no_carrier_takes_is_told(service, gpu, importer, address, monkeypatch):
    def pack(self, tensor, out):
        raise CarrierFailed("shm: full as well")

    def fill():
        if service.runs == 2:
            monkeypatch.setattr(shm.ShmCarrier, "pack", pack)

    service.on_run = fill
    exporter = FakeExporter(gpu, ServiceEndThatFailsLater)
    with connected(service, exporter, importer, address) as (_, client):
        gpu.is_lost = True
        with pytest.raises(errors.Broken, match="full as well"):
            call(client, "numbers")
        assert service.runs == 2


def test_a_service_that_comes_back_shares_its_gpu_again(service, gpu, importer, address):
    exporter = FakeExporter(gpu)
    with closing(Endpoint("vae", lambda: address, KEY, importer)) as client:
        with served(service.exposed(), address, exporter=exporter):
            client.open(soon())
            gpu.is_lost = True
            call(client, "numbers")
            assert (client.carrier, client.reason) == ("shm", LOST)
        gpu.is_lost = False
        with served(service.exposed(), address, exporter=exporter) as server:
            server._identity = replace(server._identity, born=2.0)
            assert_same(call(client, "numbers"), torch.arange(BIG))
            assert (client.carrier, client.reason) == ("cuda", "")


def test_a_client_that_wants_its_results_on_the_host_needs_no_room_on_the_gpu(
    service, gpu, importer, address
):
    exposed = {
        "wait": lambda call: call.wait_for_room(),
        "has_room": lambda call: call.has_room(),
    }
    exporter = FakeExporter(gpu)
    exporter.book = FullBook()
    with served(exposed, address, exporter=exporter) as server:
        with endpoint(server, importer=importer) as client:
            with pytest.raises(errors.OutOfMemory, match="ask for device='cpu'"):
                call(client, "wait")
            assert not call(client, "has_room")
            client.call("wait", (), {}, 10.0, device="cpu")
            assert client.call("has_room", (), {}, 10.0, device="cpu")


def test_an_argument_that_cannot_be_sent_goes_by_shared_memory(client, service, gpu):
    argument = call(client, "numbers")
    gpu.is_lost = True
    assert_same(call(client, "double", argument), torch.arange(BIG) * 2)
    assert service.runs == 2
    assert (client.carrier, client.reason) == ("shm", LOST)


def test_new_connections_keep_to_shared_memory(client, gpu, importer):
    gpu.is_lost = True
    call(client, "numbers")
    gpu.is_lost = False
    channels = [client._take(soon()) for _ in range(3)]
    assert [channel.carrier for channel in channels] == ["shm"] * 3
    assert client.reason == LOST
    assert importer.tried == 1
    for channel in channels:
        channel.close()


def test_a_connection_in_use_when_the_gpu_failed_is_not_used_again(client, service, gpu):
    for channel in [client._take(soon()) for _ in range(2)]:
        client._give_back(channel)
    results = []
    waiting = threading.Thread(target=lambda: results.append(call(client, "wait")))
    waiting.start()
    assert service.entered.wait(10)
    gpu.is_lost = True
    call(client, "numbers")
    assert client.reason == LOST
    gpu.is_lost = False
    service.may_return.set()
    waiting.join()
    assert_same(results[0], torch.arange(BIG))
    exported = len(gpu.exported)
    for _ in range(3):
        assert_same(call(client, "numbers"), torch.arange(BIG))
    assert len(gpu.exported) == exported


def test_a_result_that_cannot_be_opened_since_its_service_died_is_no_fault_of_the_gpu(
    service, gpu, importer, address, monkeypatch
):
    with connected(service, FakeExporter(gpu), importer, address) as (server, client):
        call(client, "numbers")

        def die(end):
            server.stop(grace=0.0)
            raise CarrierFailed(LOST)

        monkeypatch.setattr(ClientEnd, "_check", die)
        with pytest.raises(errors.Broken, match="was lost during more"):
            call(client, "more")
        assert (client.carrier, client.reason) == ("cuda", "")
        assert service.runs == 2


class FailingShm(shm.ShmCarrier):
    is_lost = threading.Event()

    def unpack(self, token, source):
        if self.is_lost.is_set():
            raise CarrierFailed("shm: lost as well")
        return super().unpack(token, source)


def test_a_call_is_made_again_once_and_no_more(client, service, gpu, monkeypatch):
    monkeypatch.setattr(FailingShm, "is_lost", threading.Event())
    monkeypatch.setattr(shm, "ShmCarrier", FailingShm)
    gpu.is_lost = True
    service.on_run = lambda: service.runs == 2 and FailingShm.is_lost.set()
    with pytest.raises(errors.Broken, match="lost as well"):
        call(client, "numbers")
    assert service.runs == 2


def test_connections_of_a_service_that_went_are_closed_while_its_gpu_is_shared(
    service, gpu, importer, address
):
    with connected(service, FakeExporter(gpu), importer, address) as (server, client):
        server.stop(grace=1.0)
        wait_until(lambda: "0 idle" in repr(client))


def test_a_client_lets_go_of_the_memory_that_it_does_not_use(client, importer):
    assert importer.has_rested.wait(10)
