"""A service with a real autoencoder on the GPU; without a GPU all of this is skipped."""

from __future__ import annotations

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


@pytest.fixture
def service(vae_folder, runtime_dir):
    options = {"vae_models": str(vae_folder), "vae_dtype": "float16", "log_level": "ERROR"}
    options["allow"] = (str(vae_folder),)
    with luna_mp.serve(vae="cuda", runtime_dir=runtime_dir, **options) as running:
        yield running
