"""Service processes whose GPU works long after the reply: `python -m tests.gpu.services`."""

from __future__ import annotations

import sys

import torch

from luna_mp.config import ServiceConfig
from luna_mp.devices import claim
from luna_mp.models.base import VaeModel, at_once
from luna_mp.service import main
from luna_mp.workers.vae import VaeWorker
from tests.workers.fakes import library

CYCLES = 3_000_000_000  # of the GPU's clock, which makes less than 2 GHz: more than 1.5 s


class SlowVae(VaeModel):
    """One more than the latent, seconds later; an infinite latent is a fault, as late."""

    dtype = torch.float32
    latent_channels, image_channels, spatial_dims, spatial_ratio = 4, 3, 2, 8

    def __init__(self, device):
        self.device = device
        self._table = torch.zeros(4, device=device)

    def decode(self, latent, place=at_once):
        # The copy waits for the GPU, which is not to have work before it.
        there = latent.to(self.device)
        torch.cuda._sleep(CYCLES)
        beyond = torch.where(there.isinf(), self._table.numel(), 0)
        return place(lambda: there + 1 + self._table[beyond])

    encode = decode_tiled = encode_tiled = decode

    def weight_bytes(self):
        return self._table.nbytes


def build(config: ServiceConfig) -> VaeWorker:
    vae = SlowVae(claim(config.device))
    # A kernel's first launch waits for the GPU.
    vae.decode(torch.zeros(1, 4, 64, 64))
    torch.cuda.synchronize()
    return VaeWorker(library(vae))


if __name__ == "__main__":
    sys.exit(main(build))
