"""A whole workflow through a running ComfyUI, with its own loaders and with luna-mp's."""

from __future__ import annotations

import io
import json
import os
import signal

import pytest
from PIL import Image

import luna_mp
from tests.comfyui import checkpoint_makers, comfy_server, shrunken
from tests.helpers import wait_until

pytestmark = [pytest.mark.comfyui, pytest.mark.timeout(900)]

DEVICE = os.environ.get("LUNA_MP_TEST_DEVICE", "cpu")
FLAGS = ("--cpu",) if DEVICE == "cpu" else ()


@pytest.fixture(scope="module")
def comfyui():
    return comfy_server.environment()


@pytest.fixture(scope="module")
def base(comfyui, tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    comfy_server.lay_out(base)
    checkpoint_makers.write_checkpoint(
        base / "models/checkpoints/whole.safetensors", shrunken.comfyui()
    )
    checkpoint_makers.write_lora(base / "models/loras/style.safetensors")
    return base


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    path.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUNA_MP_RUNTIME_DIR", str(path))
        yield path


@pytest.fixture(scope="module")
def services(base, comfyui, runtime):
    models = (str(base / "models/checkpoints/whole.safetensors"),)
    with luna_mp.serve(
        clip=DEVICE,
        vae=DEVICE,
        comfyui=comfyui,
        clip_models=models,
        vae_models=models,
        allow=[str(base / "models")],
        runtime_dir=str(runtime),
        log_level="WARNING",
    ) as serving:
        yield serving


@pytest.fixture(scope="module")
def server(base, comfyui, runtime, services):
    with comfy_server.running(comfyui, base, *FLAGS) as running:
        yield running


def workflow(loader, prompt="a (red:1.2) cat", seed=1, **inputs):
    """Checkpoint, LoRA, clip skip, two prompts, two steps, decode, save."""
    sampler = {"seed": seed, "steps": 2, "cfg": 4.0, "sampler_name": "euler", "denoise": 1.0}
    nodes = {
        "load": (loader, {"ckpt_name": "whole.safetensors", **inputs}),
        "lora": (
            "LoraLoader",
            {"model": ["load", 0], "clip": ["load", 1], "lora_name": "style.safetensors"}
            | {"strength_model": 0.6, "strength_clip": 0.8},
        ),
        "skip": ("CLIPSetLastLayer", {"clip": ["lora", 1], "stop_at_clip_layer": -2}),
        "yes": ("CLIPTextEncode", {"text": prompt, "clip": ["skip", 0]}),
        "no": ("CLIPTextEncode", {"text": "a dog", "clip": ["skip", 0]}),
        "empty": ("EmptyLatentImage", {"width": 128, "height": 64, "batch_size": 1}),
        "sample": (
            "KSampler",
            {"model": ["lora", 0], "positive": ["yes", 0], "negative": ["no", 0]}
            | {"latent_image": ["empty", 0], "scheduler": "normal", **sampler},
        ),
        "decode": ("VAEDecode", {"samples": ["sample", 0], "vae": ["load", 2]}),
        "probe": ("LunaTestHoldings", {"after": ["decode", 0]}),
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": loader}),
    }
    return named(nodes)


def named(nodes):
    """In the form that the server takes."""
    return {name: {"class_type": kind, "inputs": ins} for name, (kind, ins) in nodes.items()}


def test_the_same_png_bytes_with_local_loaders_and_with_the_services(server):
    local = server.pictures(server.run(workflow("CheckpointLoaderSimple")))
    remote = server.pictures(server.run(workflow("LunaCheckpointLoader", mode="service")))
    assert len(local) == 1
    assert local == remote
    # and there is something in it that could differ
    assert len(Image.open(io.BytesIO(local[0])).getcolors(1 << 20)) > 1000


def test_the_process_lacks_exactly_the_encoder_and_the_vae(server):
    def holdings(loader, **inputs):
        server.forget()
        entry = server.run(workflow(loader, **inputs))
        return json.loads(entry["outputs"]["probe"]["text"][0])

    local = holdings("CheckpointLoaderSimple")
    remote = holdings("LunaCheckpointLoader", mode="service")
    parts = [local["models"].pop(name) for name in ("SD1ClipModel", "AutoencoderKL")]
    assert min(parts) > 100e6
    # a byte stands for a model that is elsewhere
    weights = {name: size for name, size in remote["models"].items() if size > 1}
    assert weights == local["models"]
    if DEVICE != "cpu":
        saved = local["allocated"] - remote["allocated"]
        assert abs(saved - sum(parts)) < 0.02 * sum(parts)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: LUNA_MP_TEST_DEVICE")
def test_the_vae_comes_by_the_cuda_carrier_under_stock_comfyui(server, services):
    server.run(workflow("LunaCheckpointLoader", mode="service"))
    with services.connect(gpu=False) as luna:
        clients = luna.status("vae")["clients"]
    assert [c["carrier"] for c in clients if c["pid"] == server.pid] == ["cuda"]


def test_every_node_of_the_pack_is_there_with_its_help(server):
    nodes = {n: i for n, i in server.get("/object_info").items() if i["category"][:4] == "luna"}
    assert len(nodes) == 13
    for name, info in nodes.items():
        assert info["description"], name
        for group in ("required", "optional"):
            for key, spec in info["input"].get(group, {}).items():
                assert spec[1].get("tooltip"), (name, key)


def decoding(**size):
    """No sampling, and a decode that takes a while."""
    return {
        "load": ("LunaCheckpointLoader", {"ckpt_name": "whole.safetensors", "mode": "service"}),
        "empty": ("EmptyLatentImage", size),
        "decode": ("VAEDecode", {"samples": ["empty", 0], "vae": ["load", 2]}),
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "decoded"}),
    }


def in_line(luna):
    """The calls that wait for the VAE, or run."""
    return [call["method"] for call in luna.status("vae")["queue"]["line"]]


def test_a_service_killed_in_mid_workflow_fails_the_node_clearly_and_the_next_run_works(
    server, services
):
    before = services.ready["vae"]["pid"]
    with services.connect(gpu=False) as luna:
        number = server.queue(named(decoding(width=768, height=768, batch_size=8)))
        wait_until(lambda: "comfyui_network" in in_line(luna), 240)
        os.kill(before, signal.SIGKILL)
    error = server.error(server.finished(number))
    assert error["node_type"] == "VAEDecode"
    assert "the vae service was lost during comfyui_network" in error["exception_message"]
    wait_until(lambda: services.ready["vae"].get("pid", before) != before, 120)
    again = server.run(workflow("LunaCheckpointLoader", mode="service", prompt="after", seed=2))
    expected = server.run(workflow("CheckpointLoaderSimple", prompt="after", seed=2))
    assert server.pictures(again) == server.pictures(expected)
