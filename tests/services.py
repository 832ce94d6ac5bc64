"""Real service processes with models that are none: `python -m tests.services`."""

from __future__ import annotations

import sys
from pathlib import Path

from luna_mp.config import ServiceConfig
from luna_mp.service import main
from luna_mp.workers.vae import VaeWorker
from tests.helpers import wait_until
from tests.workers.fakes import FakeVaeOnBrokenGpu, library


class Vae(FakeVaeOnBrokenGpu):
    """Waits with each latent that breaks the GPU until the file named by its settings is there."""

    def __init__(self, may_go_on: Path) -> None:
        super().__init__()
        self._may_go_on = may_go_on

    def _answer(self, what, tensor):
        if tensor.isinf().any():
            wait_until(self._may_go_on.exists)
        return super()._answer(what, tensor)


def build(config: ServiceConfig) -> VaeWorker:
    return VaeWorker(library(Vae(Path(config.comfyui))))


if __name__ == "__main__":
    sys.exit(main(build))
