"""Which segments of a service's memory a client keeps mapped, and for how long."""

from __future__ import annotations

import itertools
import os
from contextlib import nullcontext

import pytest
import torch

from luna_mp.endpoint import WATCH_SECONDS
from luna_mp.processes import born
from luna_mp.wire import cuda_client, cuda_runtime
from luna_mp.wire.cuda_client import Importer
from luna_mp.wire.cuda_runtime import Mappings
from luna_mp.wire.leases import IDLE_SECONDS, Owner

DEVICE = torch.device("cuda", 0)
POOL = 1


class Driver:
    """Fakes CUDA's: each mapping has an address of its own; `open` has the handles of those."""

    def __init__(self):
        self.open = {}
        self._addresses = itertools.count(1)

    def map(self, handle):
        base = next(self._addresses)
        self.open[base] = handle
        return base

    def unmap(self, device, base):
        del self.open[base]


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(cuda_runtime, "_open", driver.map)
    monkeypatch.setattr(cuda_runtime, "_close", driver.unmap)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    return driver


@pytest.fixture
def mappings(driver):
    return Mappings(DEVICE)


def test_a_segment_is_mapped_once_for_many_results(mappings, driver):
    assert mappings.segment(b"a", POOL) is mappings.segment(b"a", POOL)
    assert driver.open == {1: b"a"}


def test_the_longest_kept_goes_first(mappings, driver, monkeypatch):
    monkeypatch.setattr(cuda_runtime, "MAX_MAPPINGS", 2)
    for handle in (b"a", b"b", b"c"):
        mappings.segment(handle, POOL)
    assert list(driver.open.values()) == [b"b", b"c"]


def test_a_handle_of_another_pool_is_opened_anew(mappings, driver):
    first = mappings.segment(b"a", POOL).base
    mappings.segment(b"b", POOL)
    assert mappings.segment(b"a", POOL + 1).base != first
    assert list(driver.open.values()) == [b"a"]


def test_what_was_not_asked_for_in_a_while_is_unmapped(mappings, driver):
    mappings.segment(b"a", POOL)
    mappings.rest(60.0)
    assert list(driver.open.values()) == [b"a"]
    mappings.rest(0.0)
    assert not driver.open


def test_what_a_tensor_lies_over_stays_mapped(mappings, driver):
    segment = mappings.segment(b"a", POOL)
    mappings.rest(0.0)
    assert list(driver.open.values()) == [b"a"]
    del segment
    assert not driver.open


@pytest.fixture
def importer(driver, monkeypatch):
    monkeypatch.setattr(cuda_client, "_memories", {})
    monkeypatch.setattr(cuda_client, "uuid_of", lambda index: "GPU")
    monkeypatch.setattr(cuda_client, "REST_SECONDS", 0.0)
    monkeypatch.setattr(cuda_runtime, "is_there", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return Importer()


def test_connections_to_one_service_share_its_mappings_and_rest_together(importer, driver):
    service, other = Owner(os.getpid(), born(os.getpid())), Owner(os.getppid(), born(os.getppid()))
    carriers = [importer.carrier("GPU", owner, None) for owner in (service, service, other)]
    for carrier in carriers:
        carrier._memory.mappings.segment(b"a", POOL)
    assert len(driver.open) == 2
    importer.rest()
    assert not driver.open


def test_a_client_rests_before_the_service_gives_memory_back():
    assert cuda_client.REST_SECONDS + WATCH_SECONDS < IDLE_SECONDS
