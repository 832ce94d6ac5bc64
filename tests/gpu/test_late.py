"""The reply leaves when the work is queued: what comes of calls whose service ends before the GPU.

Every wait of a client ends, and no stream of its own process is left waiting.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest
import torch

import luna_mp
from luna_mp import errors
from luna_mp.config import ServeConfig, ServiceConfig
from luna_mp.supervisor import Supervisor
from tests.gpu.test_sharing import client, said
from tests.helpers import wait_until
from tests.test_supervisor import running

pytestmark = pytest.mark.gpu

# Large enough to be copied by the service, for a client that wants it on its host.
ZEROS = torch.zeros(1, 4, 256, 256)
INFINITE = torch.full_like(ZEROS, float("inf"))


@pytest.fixture
def service(runtime_dir):
    config = ServiceConfig(
        "vae", device="cuda", port=0, runtime_dir=str(runtime_dir), log_level="ERROR"
    )
    command = (sys.executable, "-m", "tests.gpu.services")
    supervised = Supervisor(ServeConfig((config,), grace=10.0), command)
    with running(supervised):
        yield supervised


class Decoding(threading.Thread):
    """One call on a thread of its own, and what came of it when."""

    def __init__(self, luna, latent=ZEROS, **options):
        super().__init__()
        self._luna = luna
        self._latent = latent
        self._options = options
        self.outcome = None
        self.start()

    def run(self):
        try:
            self.outcome = self._luna.vae.decode(self._latent, **self._options)
        except errors.LunaError as exc:
            self.outcome = exc
        self.ended = time.monotonic()


def replies(luna, count):
    """Whether that many replies have left: their turns end at once after them."""
    methods = luna.status("vae")["queue"]["methods"]
    return "decode" in methods and methods["decode"]["calls"] >= count


def arrived(luna):
    """How many calls the service has read, done or not."""
    queue = luna.status("vae")["queue"]
    return len(queue["line"]) + queue["methods"]["decode"]["calls"]


@pytest.mark.parametrize("device", ["", "cpu"])
@pytest.mark.parametrize("allocator", ["native", "async", "no bindings"])
def test_call_of_a_service_killed_after_its_reply_fails_and_the_next_one_works(
    service, allocator, device
):
    with luna_mp.connect(gpu=False) as watch, client("late", device, allocator=allocator) as late:
        assert said(late) == {"carrier": "cuda"}
        wait_until(lambda: replies(watch, 1))
        killed = time.monotonic()
        os.kill(service.ready["vae"]["pid"], signal.SIGKILL)
        first = said(late)
        assert first["error"] == "Broken"
        assert "lost during decode" in first["text"]
        assert first["ended"] - killed < 1.0
        assert said(late) == {"sum": ZEROS.numel(), "own": 1.0, "carrier": "cuda"}


def test_waiting_calls_fail_within_a_second_of_the_kill(service):
    with luna_mp.connect() as luna:
        calls = [Decoding(luna) for _ in range(4)]
        # One has its reply, one waits with its input for the GPU, and two are in line.
        wait_until(lambda: replies(luna, 1) and arrived(luna) == 4)
        killed = time.monotonic()
        os.kill(service.ready["vae"]["pid"], signal.SIGKILL)
        for call in calls:
            call.join(5)
        waiting = [call for call in calls if call.ended > killed]
        assert len(waiting) >= 2
        for call in waiting:
            assert isinstance(call.outcome, errors.Broken)
            assert call.ended - killed < 1.0
        assert torch.ones(3, device="cuda").sum().item() == 3


def test_fault_of_late_work_fails_its_call_and_the_service_comes_back(service):
    before = service.ready["vae"]["pid"]
    with luna_mp.connect() as luna:
        call = Decoding(luna, INFINITE)
        call.join(10)
        assert isinstance(call.outcome, (errors.Broken, errors.RemoteFailure))
        assert luna.vae.decode(ZEROS).sum().item() == ZEROS.numel()
        assert luna.carriers == {"vae": "cuda"}
        assert luna.vae.status()["pid"] != before


def test_service_that_is_stopped_finishes_what_its_gpu_works_on(service):
    with luna_mp.connect() as luna:
        call = Decoding(luna)
        wait_until(lambda: replies(luna, 1))
        luna.stop("vae")
        call.join(10)
        assert call.outcome.sum().item() == ZEROS.numel()


def test_deadline_ends_a_call_whose_work_is_queued_and_its_memory_comes_back(service):
    with luna_mp.connect() as luna:
        with pytest.raises(errors.TimedOut):
            luna.vae.decode(ZEROS, timeout=0.5)
        wait_until(lambda: luna.status("vae")["leases"] == {}, 1.0)
        assert luna.vae.decode(ZEROS).sum().item() == ZEROS.numel()


def test_connecting_does_not_wait_for_the_gpu_to_be_done(service):
    with luna_mp.connect() as luna:
        call = Decoding(luna)
        wait_until(lambda: replies(luna, 1))
        with luna_mp.connect() as other:
            assert other.carriers == {"vae": "cuda"}
            assert call.is_alive()
        call.join(10)
        assert call.outcome.sum().item() == ZEROS.numel()
