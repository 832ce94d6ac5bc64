"""Which carrier a connection gets, and why not a faster one."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from luna_mp import errors
from luna_mp.wire import handshake, probe, shm
from tests.helpers import endpoint, served
from tests.same import assert_same
from tests.wire.fakes import (
    ClientEnd,
    ClientEndOverACopy,
    ClientEndThatMisreads,
    ClientEndThatOpensNothing,
    FakeExporter,
    FakeImporter,
    FullBook,
    ImporterWithoutRuntime,
    ServiceEnd,
    ServiceEndThatCannotExport,
)
from tests.wire.pair import LIMIT, channels, soon
from tests.wire.sharing import BIG, Service, call, connected, told

pytestmark = pytest.mark.skipif(not shm.is_supported(), reason="no shared memory here")

LOST = "cuda: invalid resource handle"


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
