"""A service with a real autoencoder on the GPU; without a GPU all of this is skipped."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

import luna_mp
from tests.gpu.models import sdxl_vae


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "/gpu/" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU that this torch can use"))


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory):
    return sdxl_vae(tmp_path_factory.mktemp("models"))


@contextmanager
def serving(vae_folder, directory):
    options = {"vae_models": str(vae_folder), "vae_dtype": "float16", "log_level": "ERROR"}
    options["allow"] = (str(vae_folder),)
    with luna_mp.serve(vae="cuda", runtime_dir=str(directory), **options) as running:
        yield running


@pytest.fixture(scope="module")
def shared(vae_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    folder.chmod(0o700)
    with serving(vae_folder, folder) as running:
        yield running


@pytest.fixture
def service(shared, monkeypatch):
    """A service that stays alive; clients in other processes find it."""
    monkeypatch.setenv("LUNA_MP_RUNTIME_DIR", shared._config.services[0].runtime_dir)
    return shared


@pytest.fixture
def own(vae_folder, runtime_dir):
    """A service that the test may kill."""
    with serving(vae_folder, runtime_dir) as running:
        yield running
