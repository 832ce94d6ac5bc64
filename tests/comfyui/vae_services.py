"""A service with a small VAE."""

from __future__ import annotations

import pytest

from tests.comfyui import services, vae_makers


@pytest.fixture(scope="module")
def serving(comfy, folder, tmp_path_factory):
    default = vae_makers.write("taesd", folder / "default.safetensors")
    directory = tmp_path_factory.mktemp("run")
    with services.serve(folder, directory, vae="cpu", vae_models=str(default)) as running:
        yield running


@pytest.fixture(scope="module")
def service(comfy, serving):
    found = comfy.Service(services.connected(serving), "the VAE service")
    yield found
    found.close()
