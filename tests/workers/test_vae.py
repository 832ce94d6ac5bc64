"""The VAE worker against a full card."""

from __future__ import annotations

import pytest
import torch

from luna_mp.errors import OutOfMemory
from luna_mp.workers.vae import VaeWorker
from tests.workers.fakes import FakeVae, called, library

LATENT = torch.zeros(1, 4, 8, 8)
FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("full", FULL, ids=["CUDA", "CPU", "Python"])
def test_a_call_that_does_not_fit_is_made_once_more_in_tiles(full):
    vae = FakeVae(full)
    assert called(VaeWorker(library(vae)).decode, LATENT).eq(1).all()
    assert vae.asked == ["decode", "decode_tiled"]


def test_a_call_that_fits_in_no_way_is_told_and_the_next_works():
    vae = FakeVae(FULL[0], FULL[0])
    worker = VaeWorker(library(vae))
    with pytest.raises(OutOfMemory, match=r"\[1, 4, 8, 8\] does not fit on cpu, not even in tiles"):
        called(worker.decode, LATENT)
    assert called(worker.decode, LATENT).eq(1).all()


def test_tiles_that_were_asked_for_are_not_tried_whole():
    vae = FakeVae()
    called(VaeWorker(library(vae)).encode, torch.zeros(1, 8, 8, 3), tiled=True)
    assert vae.asked == ["encode_tiled"]


def test_other_errors_of_the_model_are_its_own():
    vae = FakeVae(RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        called(VaeWorker(library(vae)).decode, LATENT)
    assert vae.asked == ["decode"]
