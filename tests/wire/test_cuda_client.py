"""What a client opens of a service's results it lets go of once, however the message ends.

The CUDA runtime is faked by memory of the host, at `cuda_runtime`'s own interface.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections import Counter

import numpy as np
import pytest
import torch

from luna_mp.errors import Rejected, TimedOut
from luna_mp.processes import born
from luna_mp.wire import codec, counters, cuda_client, cuda_runtime, layout
from luna_mp.wire.carrier import CarrierFailed
from luna_mp.wire.cuda import HOST
from luna_mp.wire.cuda_client import ImportingCarrier
from luna_mp.wire.leases import Owner
from tests.same import assert_same
from tests.wire.pair import channels

FLOATS = 4
POOL = 5
SERVICE = Owner(os.getpid(), born(os.getpid()))
ONCE = {1: 1, 2: 1}  # releases, by slot


class Runtime:
    """The service's memory: opens it, and counts who lets go of what."""

    def __init__(self):
        self.released = Counter()
        self.events = []
        self.pools = []
        self.closed = 0
        #: raised when the second one is opened: before that is noted, or right after
        self.before = None
        self.after = None
        #: raised for counters that this process cannot count in
        self.unreachable = None

    def segment(self, handle, pool):
        self.pools.append(pool)
        return handle

    def close(self):
        self.closed += 1

    def is_written(self, event, device):
        self.events.append(event)
        return lambda: True

    def over(self, segment, offset, how, counter, slot, device):
        if slot == 2 and self.before:
            raise self.before
        memory = (ctypes.c_ubyte * how.nbytes)()
        run = torch.frombuffer(memory, dtype=torch.uint8)
        is_released = weakref.finalize(memory, self.release, counter, slot)
        if slot == 2 and self.after:
            raise self.after
        return layout.restore(how, run), lambda: not is_released.alive

    def release(self, counter, slot):
        self.released[slot] += 1

    def reach(self, counter):
        if self.unreachable:
            raise self.unreachable


class Host:
    """Shared memory, in which the service's GPU writes a result when it likes."""

    def __init__(self):
        self.memory = torch.zeros(FLOATS)

    def unpack(self, token, source):
        assert token == "where"
        return self.memory


class Source:
    """What came with a message; the wait for one of its tensors may fail."""

    limit = 1 << 20

    def __init__(self, to_host):
        self.to_host = to_host
        self.errors = []
        self.when_waited_for = lambda: None

    def wait(self, is_done):
        assert is_done()
        self.when_waited_for()
        if error := self.errors and self.errors.pop(0):
            raise error


@pytest.fixture
def runtime(monkeypatch):
    fake = Runtime()
    monkeypatch.setattr(cuda_client, "_memories", {})
    monkeypatch.setattr(cuda_runtime, "is_there", lambda: True)
    monkeypatch.setattr(cuda_runtime, "Mappings", lambda device: fake)
    monkeypatch.setattr(cuda_runtime, "is_written", fake.is_written)
    monkeypatch.setattr(cuda_runtime, "over", fake.over)
    monkeypatch.setattr(counters, "let_go", fake.release)
    monkeypatch.setattr(counters, "reach", fake.reach)
    return fake


@pytest.fixture
def host():
    return Host()


@pytest.fixture
def carrier(runtime, host):
    return ImportingCarrier(0, SERVICE, host)


@pytest.fixture(params=[False, True], ids=["stays", "to the host"])
def source(request):
    return Source(request.param)


def export(slot, how=f"float32:{FLOATS}:1"):
    return (slot, "GPU", (POOL, b"handle", 0), 4 * FLOATS, b"counter", slot, how, b"event", True)


def message(second=f"float32:{FLOATS}:1"):
    """Two results in slots 1 and 2."""

    def token(tensor):
        slot = int(tensor[0])
        return export(slot, second) if slot == 2 else export(slot)

    results = [torch.full((FLOATS,), float(slot)) for slot in ONCE]
    return codec.Writer().dumps({"value": results}, token)


def read(carrier, source, payload=None):
    return codec.loads(
        payload or message(), lambda token: carrier.unpack(token, source), carrier.discard
    )


class OnHost:
    """What `_Foreign` says of memory of a GPU, said of memory of the host."""

    def __init__(self, tensor, how):
        foreign = cuda_runtime._Foreign(tensor.data_ptr(), how)
        self.__array_interface__ = foreign.__cuda_array_interface__


@pytest.mark.parametrize("dtype", layout.DTYPES.values(), ids=str)
def test_memory_is_opened_as_it_lies(dtype):
    run = torch.arange(0, 6 * dtype.itemsize, dtype=torch.uint8)
    how = layout.layout_of(dtype, (2, 3), (1, 2))
    opened = torch.from_numpy(np.asarray(OnHost(run, how)))
    assert opened.stride() == (1, 2)
    assert opened.dtype == dtype or how.dtype not in cuda_runtime.FLOATS
    assert_same(layout.run_of(how, opened.view(dtype)), run)


def test_results_are_let_go_of_when_they_are_dropped(runtime, carrier):
    results = read(carrier, Source(to_host=False))["value"]
    assert not runtime.released
    del results
    assert runtime.released == ONCE


def test_event_of_a_connection_is_opened_once(runtime, carrier):
    for _ in range(2):
        read(carrier, Source(to_host=False))
        carrier.unpack((HOST, "where", b"event", True), Source(to_host=True))
    assert runtime.events == [b"event"]
    carrier.close()
    read(carrier, Source(to_host=False))
    assert runtime.events == [b"event"] * 2


def test_results_on_the_host_are_let_go_of_at_once(runtime, carrier):
    results = read(carrier, Source(to_host=True))["value"]
    assert runtime.released == ONCE
    assert [result.shape for result in results] == [(FLOATS,)] * 2


def test_a_description_that_is_refused_lets_go_of_all(runtime, carrier, source):
    with pytest.raises(Rejected):
        read(carrier, source, message("float33:4:1"))
    assert runtime.released == ONCE


def test_memory_that_cannot_be_opened_lets_go_of_all(runtime, carrier, source):
    runtime.before = RuntimeError("invalid resource handle")
    with pytest.raises(CarrierFailed, match="invalid resource handle"):
        read(carrier, source)
    assert runtime.released == ONCE


def test_nothing_is_opened_that_could_not_be_let_go_of(runtime, carrier, source, monkeypatch):
    runtime.unreachable = RuntimeError("the service's counters cannot be opened")
    monkeypatch.setattr(cuda_runtime, "over", None)
    with pytest.raises(CarrierFailed, match="counters cannot be opened"):
        read(carrier, source)
    assert runtime.released == ONCE


def test_services_that_have_gone_are_forgotten_by_one_thread_at_a_time(runtime, host):
    asked = []

    class Gone(Owner):
        def is_gone(self):
            asked.append(cuda_client._lock.locked())
            return True

    for service in (Gone(1, 1.0), SERVICE):
        ImportingCarrier(0, service, host)
    assert asked == [True]
    assert list(cuda_client._memories) == [SERVICE]


def test_memory_is_kept_mapped_until_its_last_connection_closes(runtime, host):
    connections = [ImportingCarrier(0, SERVICE, host) for _ in range(3)]
    for connection, closed in zip(connections, (0, 0, 1), strict=True):
        for _ in range(2):
            connection.close()
        assert runtime.closed == closed


def test_a_connection_that_goes_by_another_carrier_keeps_nothing_mapped(runtime, host):
    with channels() as (channel, _):
        channel.use(ImportingCarrier(0, SERVICE, host))
        channel.demote("cuda")
        assert runtime.closed == 1


def test_each_segment_is_asked_for_by_its_pool(runtime, carrier, source):
    read(carrier, source)
    assert runtime.pools == [POOL] * 2


def test_a_service_s_counters_that_are_out_of_reach_are_refused_as_one_failure(
    runtime, carrier, source, monkeypatch
):
    def let_go(counter, slot):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(counters, "let_go", let_go)
    runtime.unreachable = RuntimeError("the service's counters cannot be opened")
    with pytest.raises(CarrierFailed, match="cannot be opened"):
        read(carrier, source)


def test_an_interrupt_right_after_opening_lets_go_once(runtime, carrier, source):
    runtime.after = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        read(carrier, source)
    assert runtime.released == ONCE


@pytest.mark.parametrize("error", [TimedOut, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("waits_before", [0, 1])
def test_a_wait_that_fails_lets_go_of_all_also_while_its_error_is_kept(
    runtime, carrier, source, error, waits_before
):
    source.errors = [None] * waits_before + [error("late")]
    with pytest.raises((TimedOut, KeyboardInterrupt, CarrierFailed)) as kept:
        read(carrier, source)
    assert runtime.released == ONCE
    del kept


def test_a_result_that_is_too_small_for_its_description_is_not_held_by_the_error(runtime, carrier):
    with pytest.raises(CarrierFailed) as kept:
        read(carrier, Source(to_host=False), message("float32:400:1"))
    assert runtime.released == ONCE
    del kept


@pytest.mark.parametrize(("must_wait", "value"), [(True, 1.0), (False, 0.0)])
def test_what_the_service_copies_is_given_out_once_it_is_there(carrier, host, must_wait, value):
    source = Source(to_host=True)
    source.when_waited_for = lambda: host.memory.fill_(1.0)
    for _ in range(2):
        host.memory.zero_()
        result = carrier.unpack((HOST, "where", b"event", must_wait), source)
        assert result.tolist() == [value] * FLOATS


def test_what_comes_after_a_copy_that_is_interrupted_is_let_go_of(runtime, carrier):
    source = Source(to_host=True)
    source.errors = [KeyboardInterrupt()]
    tokens = [(HOST, "where", b"event", True), export(2)]
    results = {"value": [torch.zeros(1), torch.ones(1)]}
    payload = codec.Writer().dumps(results, lambda tensor: tokens[int(tensor)])
    with pytest.raises(KeyboardInterrupt):
        read(carrier, source, payload)
    assert runtime.released == {2: 1}
