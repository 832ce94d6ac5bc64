"""How one service ends: both of its servers at once."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

import luna_mp
from luna_mp.config import ServiceConfig
from luna_mp.service import Service
from luna_mp.workers.vae import VaeWorker
from tests.helpers import wait_until
from tests.workers.fakes import FakeVae, library


class SlowVae(FakeVae):
    """Answers once it may."""

    def __init__(self):
        super().__init__()
        self.may_go_on = threading.Event()

    def _answer(self, what, tensor):
        assert self.may_go_on.wait(10.0)
        return super()._answer(what, tensor)


@pytest.fixture
def vae():
    return SlowVae()


@pytest.fixture
def service(vae, runtime_dir):
    config = ServiceConfig(role="vae", device="cpu", runtime_dir=str(runtime_dir))
    running = Service(config, lambda config: VaeWorker(library(vae)))
    yield running
    vae.may_go_on.set()
    running.close(1.0)


def test_a_service_that_ends_admits_nobody_while_a_call_by_tcp_is_under_way(service, vae):
    ready = service.start()
    results = []
    with luna_mp.connect(vae=f"127.0.0.1:{ready['port']}") as luna:
        latent = torch.zeros(1, 4, 8, 8)
        working = threading.Thread(target=lambda: results.append(luna.vae.decode(latent)))
        working.start()
        wait_until(lambda: luna.vae.status()["queue"]["line"])
        closing = threading.Thread(target=service.close, args=(10.0,))
        closing.start()
        wait_until(lambda: not Path(ready["socket"]).exists(), 5.0)
        vae.may_go_on.set()
        working.join()
        closing.join()
    assert torch.equal(results[0], latent + 1)
