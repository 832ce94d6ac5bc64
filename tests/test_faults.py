"""A GPU that is lost to the service: who notices, who is told, and what comes after."""

from __future__ import annotations

import sys
import threading
from contextlib import nullcontext

import pytest
import torch

import luna_mp
from luna_mp import errors, supervisor
from luna_mp.config import ServeConfig, ServiceConfig
from luna_mp.faults import is_gpu_fault, is_out_of_memory
from luna_mp.sessions import Sessions
from luna_mp.supervisor import Supervisor
from luna_mp.wire.carrier import Carrier
from luna_mp.wire.channel import HEADER, Channel
from luna_mp.wire.stream import Stream
from luna_mp.workers.vae import VaeWorker
from tests.helpers import calls_over, endpoint, request, served, wait_until
from tests.test_supervisor import running
from tests.wire.pair import channels, soon
from tests.workers.fakes import GPU_FAULT, FakeVaeOnBrokenGpu, called, library

BIG = 40_000  # elements; more than what is sent inline for being small
INFINITE = torch.full((1, 4, 8, 8), float("inf"))
ZEROS = torch.zeros(1, 4, 8, 8)
LOST = "the vae service lost its GPU .*illegal memory access was encountered\\) and restarts"


@pytest.mark.parametrize(
    "text",
    [
        GPU_FAULT,
        "CUDA error: device-side assert triggered",
        "CUDA error: unspecified launch failure",
        "a layer failed: CUDA error: misaligned address",
        "CUDA error: unknown error",
    ],
)
def test_an_error_of_work_on_the_gpu_is_a_fault(text):
    assert is_gpu_fault(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=str,
)
def test_a_lack_of_memory_is_no_fault(error):
    assert is_out_of_memory(error)
    assert not is_gpu_fault(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes cannot be multiplied"),
        RuntimeError("CUDA error: invalid configuration argument"),
        RuntimeError("CUDA error: operation not supported"),
        RuntimeError("CUDA error: no kernel image is available for execution on the device"),
        errors.Rejected("CUDA error: unknown error, says the prompt"),
        None,
    ],
    ids=str,
)
def test_what_leaves_the_gpu_as_it_was_is_no_fault(error):
    assert not is_gpu_fault(error)


def test_the_worker_lets_a_fault_through_and_does_not_try_tiles():
    vae = FakeVaeOnBrokenGpu()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        called(VaeWorker(library(vae)).decode, INFINITE)
    assert vae.asked == []


class FaultyCarrier(Carrier):
    """Meets the fault in one of the places where a carrier uses the GPU."""

    name = "faulty"
    is_in_use = True

    def __init__(self, place=""):
        self._place = place

    def pack(self, tensor, out):
        self._meet("pack")
        return (tensor.numel(),)

    def unpack(self, token, source):
        self._meet("unpack")
        return torch.zeros(token[0], dtype=torch.uint8)

    def settle(self, after):
        self._meet("settle")

    def _meet(self, place):
        if place == self._place:
            raise RuntimeError(GPU_FAULT)


class FaultyBook:
    def wait_for_room(self, owner, deadline):
        raise RuntimeError(GPU_FAULT)

    def collect(self):
        raise RuntimeError(GPU_FAULT)


class FaultyExporter:
    book = FaultyBook()
    beside = nullcontext


def waits_for_room(call):
    call.wait_for_room()


def fails(call):
    raise RuntimeError(GPU_FAULT)


EXPOSED = {"echo": lambda call, tensor: tensor, "waits_for_room": waits_for_room, "fails": fails}


@pytest.mark.parametrize(
    ("message", "place", "carrier"),
    [
        (request("fails"), "", "faulty"),
        (request("waits_for_room"), "", "cuda"),
        (request("echo", torch.zeros(BIG)), "unpack", "faulty"),
        (request("echo", torch.zeros(BIG)), "settle", "faulty"),
        (request("echo", torch.zeros(BIG)), "pack", "faulty"),
        ({"probe": "faulty", "tensor": torch.zeros(BIG, dtype=torch.uint8)}, "pack", "faulty"),
    ],
    ids=["model", "waiting for room", "unpacking", "settling", "packing", "packing a probe"],
)
def test_a_fault_is_noted_wherever_it_shows_before_the_client_is_told(message, place, carrier):
    noted = []
    with channels() as (left, right):
        for end, own in ((left, FaultyCarrier()), (right, FaultyCarrier(place))):
            own.name = carrier
            end.use(own)
        left.send(message, soon())
        calls = calls_over(right, EXPOSED, Sessions(), FaultyExporter(), noted.append)
        with pytest.raises(errors.RemoteFailure, match=LOST):
            calls.answer(calls.next())
        reply = left.recv(soon())
    assert [str(fault) for fault in noted] == [GPU_FAULT]
    assert "lost its GPU" in reply["error"]
    assert "illegal memory access" in reply["traceback"]


def test_a_fault_is_noted_before_the_rest_of_its_request_is_awaited(monkeypatch):
    monkeypatch.setattr(Channel, "skip", lambda self: pytest.fail("the rest was awaited"))
    noted = []
    with channels() as (left, right):
        left.use(FaultyCarrier())
        right.use(FaultyCarrier("unpack"))
        pickled = left.pack(request("echo", torch.zeros(BIG))).data[HEADER.size :]
        left.stream.send([HEADER.pack(len(pickled), 1) + pickled], soon())
        with pytest.raises(errors.RemoteFailure, match=LOST):
            calls_over(right, EXPOSED, Sessions(), FaultyExporter(), noted.append).next()
    assert [str(fault) for fault in noted] == [GPU_FAULT]


def test_a_fault_that_shows_while_the_next_request_is_awaited_is_noted():
    noted = []
    with channels() as (left, right):
        right.stream.meanwhile = FaultyBook().collect
        calls = calls_over(right, EXPOSED, Sessions(), FaultyExporter(), noted.append)
        with pytest.raises(errors.RemoteFailure, match=LOST):
            calls.next()
        assert "lost its GPU" in left.recv(soon())["error"]
    assert [str(fault) for fault in noted] == [GPU_FAULT]


class Work:
    """Queued on a GPU; it fails, or is done, once it is looked at after `may_end`."""

    def __init__(self, error=None):
        self.looks = 0
        self.may_end = threading.Event()
        self._error = error

    def query(self):
        self.looks += 1
        if self.may_end.is_set() and self._error:
            raise self._error
        return self.may_end.is_set()


def replies_early(work):
    def method(call):
        call.after = work
        return "queued"

    return {"method": method}


def test_a_fault_of_work_that_the_reply_did_not_wait_for_is_noted(tmp_path):
    noted = []
    work = Work(RuntimeError(GPU_FAULT))
    exposed = replies_early(work)
    with served(exposed, str(tmp_path / "sock"), on_fault=noted.append) as server:
        with endpoint(server) as client:
            assert client.call("method", (), {}, 10.0) == "queued"
            work.may_end.set()
            wait_until(lambda: noted)
            wait_until(lambda: "0 connections" in repr(server))


def test_a_call_is_under_way_until_the_gpu_is_done(tmp_path):
    work = Work()
    with served(replies_early(work), str(tmp_path / "sock")) as server, endpoint(server) as client:
        client.call("method", (), {}, 10.0)
        stopping = threading.Thread(target=server.stop, args=(10.0,))
        stopping.start()
        looks = work.looks
        wait_until(lambda: work.looks > looks + 2)
        assert stopping.is_alive()
        work.may_end.set()
        stopping.join(1.0)
        assert not stopping.is_alive()


def test_work_that_is_done_at_once_is_awaited_awake(tmp_path, monkeypatch):
    waits = []
    is_readable = Stream.is_readable

    def noted(self, seconds):
        waits.append(seconds)
        work.may_end.set()
        return is_readable(self, seconds)

    work = Work()
    with served(replies_early(work), str(tmp_path / "sock")) as server, endpoint(server) as client:
        monkeypatch.setattr(Stream, "is_readable", noted)
        monkeypatch.setattr("luna_mp.calls.WORK_SPIN", 60.0)
        client.call("method", (), {}, 10.0)
        wait_until(lambda: work.may_end.is_set())
    assert set(waits) == {0.0}


def test_work_that_takes_long_is_awaited_asleep(tmp_path, monkeypatch):
    is_readable = Stream.is_readable

    def noted(self, seconds):
        if seconds:
            work.may_end.set()
        return is_readable(self, seconds)

    work = Work()
    with served(replies_early(work), str(tmp_path / "sock")) as server, endpoint(server) as client:
        monkeypatch.setattr(Stream, "is_readable", noted)
        client.call("method", (), {}, 10.0)
        wait_until(lambda: work.may_end.is_set())


def test_a_client_that_has_gone_is_kept_until_the_gpu_is_done(tmp_path):
    work = Work()
    with served(replies_early(work), str(tmp_path / "sock")) as server:
        with endpoint(server) as client:
            client.call("method", (), {}, 10.0)
        looks = work.looks
        wait_until(lambda: work.looks > looks + 2)
        assert "1 connections" in repr(server)
        work.may_end.set()
        wait_until(lambda: "0 connections" in repr(server))


def test_the_next_request_is_taken_while_the_gpu_still_works(tmp_path):
    work = Work()
    with served(replies_early(work), str(tmp_path / "sock")) as server:
        with endpoint(server) as client:
            assert [client.call("method", (), {}, 10.0) for _ in range(2)] == ["queued"] * 2
            work.may_end.set()


class FullCarrier(FaultyCarrier):
    """Finds no memory on the GPU for what it is to send."""

    def _meet(self, place):
        if place == self._place:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")


def test_a_result_for_which_there_is_no_room_is_a_lack_of_memory(tmp_path):
    with channels() as (left, right):
        left.use(FaultyCarrier())
        right.use(FullCarrier("pack"))
        left.send(request("echo", torch.zeros(BIG)), soon())
        calls = calls_over(right, EXPOSED, Sessions(), FaultyExporter())
        calls.answer(calls.next())
        assert left.recv(soon())["kind"] == "OutOfMemory"


def test_a_fault_ends_the_connection_and_is_told_once(tmp_path):
    noted = []
    with served(EXPOSED, str(tmp_path / "sock"), on_fault=noted.append) as server:
        with endpoint(server) as client:
            with pytest.raises(errors.RemoteFailure, match=LOST):
                client.call("fails", (), {}, 10.0)
            wait_until(lambda: "0 connections" in repr(server))
    assert len(noted) == 1


@pytest.fixture
def service(runtime_dir, tmp_path, monkeypatch):
    """A supervised process with a model whose GPU can be broken, once `marker` exists."""
    monkeypatch.setattr(supervisor, "BACKOFF_SECONDS", (0.01, 0.02))
    config = ServiceConfig(
        "vae",
        device="cpu",
        port=0,
        comfyui=str(tmp_path / "marker"),
        runtime_dir=str(runtime_dir),
        log_level="ERROR",
    )
    supervised = Supervisor(
        ServeConfig((config,), grace=30.0), (sys.executable, "-m", "tests.services")
    )
    with running(supervised):
        yield supervised


@pytest.mark.parametrize("by", ["socket", "port"])
def test_the_same_proxy_works_again_after_a_fault(service, tmp_path, by):
    (tmp_path / "marker").touch()
    before = service.ready["vae"]
    address = before["socket"] if by == "socket" else f"127.0.0.1:{before['port']}"
    with luna_mp.connect(vae=address) as luna:
        with pytest.raises(errors.RemoteFailure, match=LOST):
            luna.vae.decode(INFINITE)
        assert luna.vae.decode(ZEROS).eq(1).all()
        assert luna.vae.status()["pid"] != before["pid"]


def test_waiting_calls_fail_within_a_second_of_a_fault(service, tmp_path):
    failures = []

    def decode(latent):
        try:
            luna.vae.decode(latent)
        except errors.LunaError as exc:
            failures.append(exc)

    def in_line():
        return len(luna.status("vae")["queue"]["line"])

    with luna_mp.connect() as luna:
        threads = [threading.Thread(target=decode, args=(x,)) for x in (INFINITE, ZEROS, ZEROS)]
        for number, thread in enumerate(threads, start=1):
            thread.start()
            wait_until(lambda number=number: in_line() == number)
        (tmp_path / "marker").touch()
        for thread in threads:
            thread.join(1.0)
            assert not thread.is_alive()
    assert len(failures) == 3
    assert all(isinstance(exc, (errors.Broken, errors.RemoteFailure)) for exc in failures)


def test_a_fault_ends_the_process_with_a_status_of_its_own(service, tmp_path, caplog):
    (tmp_path / "marker").touch()
    with luna_mp.connect() as luna:
        with pytest.raises(errors.RemoteFailure):
            luna.vae.decode(INFINITE)
        wait_until(lambda: "the vae service died (exit status 4)" in caplog.text)
