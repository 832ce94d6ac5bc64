"""Services that a running ComfyUI starts, shows and unloads by the pack's own nodes."""

from __future__ import annotations

import re

import pytest

from tests.comfyui import comfy_server, services, vae_makers
from tests.comfyui.test_workflow import named

comfy = services.comfy

pytestmark = [pytest.mark.comfyui, pytest.mark.timeout(300)]

VAE = "small.safetensors"


@pytest.fixture(scope="module")
def server(comfy, tmp_path_factory):
    """A ComfyUI of its own, for which no service runs."""
    base = tmp_path_factory.mktemp("comfyui")
    comfy_server.lay_out(base)
    vae_makers.write("taesd", base / "models/vae" / VAE)
    runtime = tmp_path_factory.mktemp("run")
    runtime.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUNA_MP_RUNTIME_DIR", str(runtime))
        with comfy_server.running(comfy_server.environment(), base, "--cpu") as running:
            yield running


@pytest.fixture(scope="module")
def started(server):
    entry = server.run(
        named({"start": ("LunaServiceStart", {"clip_device": "", "vae_device": "cpu"})})
    )
    assert entry["status"]["status_str"] == "success", server.error(entry)["exception_message"]
    return entry["outputs"]["start"]["text"][0]


def decoding(mode, width):
    return named(
        {
            "load": ("LunaDaemonVAELoader", {"vae_name": VAE, "mode": mode}),
            "empty": ("EmptyLatentImage", {"width": width, "height": 64, "batch_size": 1}),
            "decode": ("VAEDecode", {"samples": ["empty", 0], "vae": ["load", 0]}),
            "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": mode}),
        }
    )


def shared(width):
    return named(
        {
            "empty": ("EmptyLatentImage", {"width": width, "height": 64, "batch_size": 1}),
            "decode": ("LunaSharedVAEDecode", {"samples": ["empty", 0]}),
            "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "shared"}),
        }
    )


def status(server):
    entry = server.run(named({"status": ("LunaServiceStatus", {})}))
    return entry["outputs"]["status"]["text"][0]


def test_without_a_service_the_node_says_how_to_start_one(server):
    for workflow in (decoding("service", 64), shared(64)):
        error = server.error(server.run(workflow))
        assert "luna-mp serve" in error["exception_message"]


def test_without_a_service_auto_loads_here(server):
    here, local = (server.pictures(server.run(decoding(m, 72))) for m in ("auto", "local"))
    assert here == local
    assert "the vae is loaded in this ComfyUI" in server.log()


def test_services_started_by_a_node_serve_this_comfyui(server, started):
    assert "vae" in started
    remote, local = (server.pictures(server.run(decoding(m, 80))) for m in ("service", "local"))
    assert remote == local
    assert VAE in status(server)


def test_a_node_that_needs_a_default_model_says_what_is_missing(server, started):
    error = server.error(server.run(shared(88)))
    assert "this service has no model of its own" in error["exception_message"]


def test_what_was_unloaded_is_loaded_again_when_it_is_asked_for(server, started):
    server.run(decoding("service", 96))
    path = re.search(rf"/\S*{VAE}", status(server)).group()
    server.run(named({"unload": ("LunaServiceUnload", {"service": "vae", "path": path})}))
    assert VAE not in status(server)
    remote, local = (server.pictures(server.run(decoding(m, 104))) for m in ("service", "local"))
    assert remote == local
