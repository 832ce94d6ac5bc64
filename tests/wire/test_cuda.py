"""What the service says of a result that it cannot export; its GPU is faked."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from luna_mp.wire.carrier import CarrierFailed, Outgoing
from luna_mp.wire.cuda import ExportingCarrier
from luna_mp.wire.leases import Owner
from tests.workers.fakes import GPU_FAULT

RESULT = torch.zeros(8)


@pytest.fixture
def carrier(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", lambda interprocess: None)
    return ExportingCarrier(SimpleNamespace(device=RESULT.device), Owner(1, 1.0), None)


def pack(carrier, error):
    def export(tensor, owner, out):
        raise error

    carrier._exporter.export = export
    carrier.pack(RESULT, Outgoing())


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("CUDA error: operation not supported\nadvice"), "operation not supported$"),
        (RuntimeError("unable to allocate shared memory(shm)"), "unable to allocate shared memory"),
        (OSError(24, "Too many open files"), "Too many open files"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_a_result_that_cannot_be_shared_is_a_failure_of_the_carrier(carrier, error, reason):
    with pytest.raises(CarrierFailed, match=f"^cuda: .*{reason}"):
        pack(carrier, error)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(GPU_FAULT)]
)
def test_a_full_or_a_lost_gpu_is_no_failure_of_the_carrier(carrier, error):
    with pytest.raises(type(error)) as met:
        pack(carrier, error)
    assert met.value is error


def test_the_probe_s_export_is_withdrawn_when_the_carrier_is_given_up(carrier, monkeypatch):
    withdrawn = []
    carrier._exporter.book = SimpleNamespace(withdraw=withdrawn.append)
    carrier._exporter.export = lambda tensor, owner, out: ((7,), False)
    monkeypatch.setattr(ExportingCarrier, "_event", b"event")
    assert carrier.pack(RESULT, Outgoing()) == (7, b"event", False)
    carrier.give_up()
    assert withdrawn == [7]
