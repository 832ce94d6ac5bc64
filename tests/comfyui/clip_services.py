"""A service with a text encoder."""

from __future__ import annotations

import pytest

from tests.comfyui import clip_makers, services


@pytest.fixture(scope="module")
def serving(comfy, folder, tmp_path_factory):
    default = clip_makers.write("clip_l", folder / "default.safetensors")
    directory = tmp_path_factory.mktemp("run")
    with services.serve(folder, directory, clip="cpu", clip_models=str(default)) as running:
        yield running


@pytest.fixture(scope="module")
def service(comfy, serving):
    found = comfy.Service(services.connected(serving, role="clip"), "the CLIP service")
    yield found
    found.close()
