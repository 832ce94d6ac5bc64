"""A result that goes back to its service goes by the number of its lease, and so does a view of it.

Memory of the host stands for that of a GPU; both ends of the carrier are the real ones.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from luna_mp.errors import Rejected, Unsendable
from luna_mp.wire import cuda_client, cuda_runtime
from luna_mp.wire.carrier import NoRoom, Outgoing
from luna_mp.wire.cuda import ExportingCarrier
from luna_mp.wire.cuda_client import ImportingCarrier
from luna_mp.wire.inline import InlineCarrier
from luna_mp.wire.leases import LeaseBook, Owner
from tests.same import assert_same
from tests.wire.fakes import FakeCounter, FakeFence

OWNER = Owner(1, 1.0)
LIMIT = SimpleNamespace(limit=1 << 20)

VIEWS = {
    "whole": lambda t: t,
    "a part": lambda t: t[:, :, 8:24, 8:24],
    "one channel": lambda t: t[:, 2],
    "channels last": lambda t: t.permute(0, 2, 3, 1),
    "every other": lambda t: t[..., ::2],
    "expanded": lambda t: t[:, :1].expand(3, -1, -1, -1),
    "bytes": lambda t: t.view(torch.uint8)[..., 3:7],
    "half": lambda t: t.view(torch.float16)[..., 1:],
}


class Stream:
    """The client's: how often it was waited for."""

    waits = 0

    def synchronize(self):
        self.waits += 1


@pytest.fixture
def stream(monkeypatch):
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return stream


@pytest.fixture
def book():
    book = LeaseBook(most=1 << 30, is_gone=lambda owner: False)
    yield book
    book.close()


@pytest.fixture
def client(stream, monkeypatch):
    monkeypatch.setattr(cuda_runtime, "is_there", lambda: True)
    monkeypatch.setattr(cuda_client, "_memories", {})
    return ImportingCarrier(0, OWNER, None)


@pytest.fixture
def service(book, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", lambda interprocess: None)
    exporter = SimpleNamespace(device=torch.device("cpu"), book=book)
    return ExportingCarrier(exporter, OWNER, None)


@pytest.fixture
def result(book, client):
    """A latent of the service that the client holds."""
    tensor = torch.arange(4096.0).view(1, 4, 32, 32)
    number = book.add(OWNER, tensor.nbytes, tensor.untyped_storage(), FakeCounter())
    client._remember(number, tensor, lambda: False)
    return tensor


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_of_a_result_is_the_same_memory_again(client, service, result, stream, view):
    sent = VIEWS[view](result)
    got = service.unpack(client.pack(sent, Outgoing()), LIMIT)
    assert_same(got, sent)
    assert got.data_ptr() == sent.data_ptr()
    assert stream.waits == 1


@pytest.mark.parametrize(
    "sent",
    [
        lambda t: t.clone(),
        lambda t: torch.view_as_complex(t.view(-1, 2)).conj(),
    ],
    ids=["a copy", "conjugated"],
)
def test_what_is_not_the_memory_of_a_result_goes_otherwise(client, result, sent):
    with pytest.raises(NoRoom):
        client.pack(sent(result), Outgoing())


def test_sparse_tensors_are_refused_as_by_every_carrier(client):
    sparse = torch.eye(200).to_sparse()
    with pytest.raises(NoRoom):
        client.pack(sparse, Outgoing())
    with pytest.raises(Unsendable):
        InlineCarrier().pack(sparse, Outgoing())


@pytest.mark.parametrize(
    ("start", "how"),
    [
        (16384, "float32:1:1"),
        (16380, "float32:2:1"),
        (0, "float32:4097:1"),
        (0, "float32:2,2:4096,1"),
        (-4, "float32:1:1"),
    ],
)
def test_a_view_beyond_its_lease_is_refused(service, result, start, how):
    with pytest.raises(Rejected):
        service.unpack((1, start, how), LIMIT)


def test_a_result_that_was_dropped_is_not_recognised_by_its_address(client, result):
    client._remember(1, result, lambda: True)
    with pytest.raises(NoRoom):
        client.pack(result, Outgoing())


def test_a_lease_that_a_call_reads_stays_until_its_work_is_done(client, service, result, book):
    work = FakeFence()
    service.unpack(client.pack(result, Outgoing()), LIMIT)
    assert service.is_in_use
    service.settle(work)
    book.withdraw(1)
    book.collect()
    assert book.leased(OWNER) == result.nbytes
    work.is_done = True
    book.collect()
    assert book.leased(OWNER) == 0
