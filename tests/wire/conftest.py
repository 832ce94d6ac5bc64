"""A service and a client that share a GPU, which is faked."""

from __future__ import annotations

import pytest

from tests.wire.fakes import FakeExporter, FakeGpu, FakeImporter
from tests.wire.sharing import Service, connected


@pytest.fixture
def gpu():
    return FakeGpu()


@pytest.fixture
def service():
    return Service()


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
