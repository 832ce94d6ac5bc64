"""Fixtures of the VAE tests: ComfyUI in this process, and a service that has the weights."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

import luna_mp
from luna_mp.client import open_endpoint
from luna_mp.endpoint import Endpoint

COMFYUI = os.environ.get("COMFYUI_PATH", "")
if not COMFYUI:
    pytest.skip("COMFYUI_PATH names no ComfyUI", allow_module_level=True)
pytest.importorskip("torchvision", reason="this ComfyUI cannot be imported: no torchvision")


@pytest.fixture(scope="session")
def comfy():
    """ComfyUI's modules, and ours that need them: not before a test asks for them."""
    from luna_mp.models.comfy import import_comfy

    import_comfy(COMFYUI, torch.device("cpu"))
    # ComfyUI's directory comes first now: `nodes` is its module
    import comfy.model_management
    import comfy.sd
    import comfy.utils

    import nodes
    from luna_mp.integrations import comfyui, comfyui_service

    return SimpleNamespace(
        management=comfy.model_management,
        sd=comfy.sd,
        utils=comfy.utils,
        nodes=nodes,
        remote=comfyui,
        Service=comfyui_service.Service,
    )


@pytest.fixture
def inference():
    """As around every node of ComfyUI's."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """From here the service loads what it is asked for."""
    return tmp_path_factory.mktemp("vaes")


@pytest.fixture(scope="module")
def serving(comfy, folder, tmp_path_factory):
    """A service with a small VAE, and one more at a time from `folder`."""
    from tests.comfyui import vae_makers

    directory = tmp_path_factory.mktemp("run")
    directory.chmod(0o700)
    with luna_mp.serve(
        vae="cpu",
        comfyui=COMFYUI,
        vae_models=str(vae_makers.write("taesd", folder / "default.safetensors")),
        allow=(str(folder),),
        max_models=1,
        runtime_dir=str(directory),
        log_level="ERROR",
    ) as running:
        yield running


def connected(serving, kind: type[Endpoint] = Endpoint, role: str = "vae") -> Endpoint:
    """A client of a service, of its own; `kind` may be a fake."""
    settings = serving._config.services[0]
    endpoint = open_endpoint(role, runtime_dir=settings.runtime_dir)
    endpoint.__class__ = kind
    return endpoint


@pytest.fixture(scope="module")
def service(comfy, serving):
    found = comfy.Service(connected(serving), "the VAE service")
    yield found
    found.close()
