"""ComfyUI in this process, and services that have the weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import luna_mp
from luna_mp.client import open_endpoint
from luna_mp.endpoint import Endpoint
from tests.comfyui import shrunken

COMFYUI = shrunken.comfyui()


@pytest.fixture(scope="session")
def comfy():
    """ComfyUI's modules, and ours that need them: not before a test asks for them."""
    from luna_mp.models.comfy_import import import_comfy

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
    return tmp_path_factory.mktemp("models")


def serve(folder, directory, **options):
    """A service with a default model, and one more at a time from `folder`."""
    directory.chmod(0o700)
    return luna_mp.serve(
        comfyui=COMFYUI,
        allow=(str(folder),),
        max_models=1,
        runtime_dir=str(directory),
        log_level="ERROR",
        **options,
    )


def connected(serving, kind: type[Endpoint] = Endpoint, role: str = "vae") -> Endpoint:
    """A client of a service, of its own; `kind` may be a fake."""
    settings = serving._config.services[0]
    endpoint = open_endpoint(role, runtime_dir=settings.runtime_dir)
    endpoint.__class__ = kind
    return endpoint
