"""The services on two GPUs, and clients that count them otherwise."""

from __future__ import annotations

import pytest
import torch

import luna_mp
from tests.gpu import clients
from tests.gpu.test_sharing import client, said

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.fixture(scope="module")
def both(vae_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    folder.chmod(0o700)
    options = {"vae_models": str(vae_folder), "vae_dtype": "float16", "log_level": "ERROR"}
    with luna_mp.serve(clip="cuda:1", vae="cuda:0", runtime_dir=str(folder), **options) as running:
        yield running


@pytest.fixture
def services(both, monkeypatch):
    """Two services that stay alive; clients in other processes find them."""
    monkeypatch.setenv("LUNA_MP_RUNTIME_DIR", both._config.services[0].runtime_dir)
    return both


@pytest.fixture(scope="module")
def image(both):
    """Fingerprint of the image that every client is to get."""
    with both.connect() as luna:
        return clients.bits(luna.vae.decode(clients.latent(), device="cpu"))


def test_vae_comes_by_cuda_and_clip_from_the_other_gpu_by_shm(services):
    with services.connect() as luna:
        assert luna.carriers == {"clip": "shm", "vae": "cuda"}
        assert "and this process computes on" in luna.reasons["clip"]
        assert luna.clip.encode("a fox").cond.device.type == "cpu"
        assert str(luna.vae.decode(clients.latent()).device) == "cuda:0"


@pytest.mark.parametrize(
    ("visible", "device", "carriers"),
    [
        ("0,1", "cuda:0", {"clip": "shm", "vae": "cuda"}),
        ("1,0", "cuda:1", {"clip": "shm", "vae": "cuda"}),
        ("1,0", "cuda:0", {"clip": "cuda", "vae": "shm"}),
        ("1", "cuda:0", {"clip": "cuda", "vae": "shm"}),
    ],
)
@pytest.mark.parametrize("allocator", ["native", "async"])
def test_gpus_are_told_apart_however_a_client_counts_them(
    services, image, visible, device, carriers, allocator, monkeypatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with client("elsewhere", device, allocator=allocator) as process:
        got = said(process)
    assert got["carriers"] == carriers, got["reasons"]
    assert got["bits"] == image
    assert got["device"] == (device if carriers["vae"] == "cuda" else "cpu")
    # a GPU that it does not compute on is not opened
    assert got["others"] == 0
