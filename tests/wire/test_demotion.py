"""What becomes of a carrier that fails in mid-life, and of what a client keeps of a service."""

from __future__ import annotations

import threading
from contextlib import closing
from dataclasses import replace

import pytest
import torch

from luna_mp import errors
from luna_mp.endpoint import Endpoint
from luna_mp.wire import shm
from luna_mp.wire.carrier import CarrierFailed
from tests.helpers import KEY, served, wait_until
from tests.same import assert_same
from tests.wire.fakes import ClientEnd, FakeExporter, ServiceEndThatFailsLater
from tests.wire.pair import soon
from tests.wire.sharing import BIG, call, connected, told

pytestmark = pytest.mark.skipif(not shm.is_supported(), reason="no shared memory here")

LOST = "cuda: invalid resource handle"
FULL = "cuda: No space left on device"


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
