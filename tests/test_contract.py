"""Every model source behind every carrier gives what the same model gives in process."""

from __future__ import annotations

import pytest
import torch

import luna_mp
from luna_mp.models import ModelSpec, load_clip, load_vae
from tests.comfyui import shrunken
from tests.models import makers
from tests.same import assert_same

PROMPTS = ("a red cat on a hill", "", "naïve 漢字 \n\t x", "long " * 2000)

pytestmark = [
    # A service of its own for each source: loading takes a while on a busy machine.
    pytest.mark.timeout(300),
]


def diffusers_folder(maker):
    def make(folder):
        makers_of = {"sd1": makers.sd1_pipeline, "sdxl": makers.sdxl_pipeline}
        {**makers_of, "flux": makers.flux_pipeline}[maker](folder)
        makers.vae().save_pretrained(folder / "vae")
        return {"clip_models": (str(folder),), "vae_models": (str(folder / "vae"),)}

    return make


def comfyui_files(folder):
    comfyui = shrunken.comfyui()
    from tests.models import comfy_makers

    folder.mkdir()
    options = comfy_makers.write(folder)
    return {"comfyui": comfyui, **options}


SOURCES = {
    "demo": lambda folder: {},
    "sd1": diffusers_folder("sd1"),
    "sdxl": diffusers_folder("sdxl"),
    "flux": diffusers_folder("flux"),
    "comfyui": comfyui_files,
}


@pytest.fixture(scope="module", params=SOURCES)
def source(request, tmp_path_factory):
    """Options of `serve`, and the services that run with them."""
    options = SOURCES[request.param](tmp_path_factory.mktemp("models") / request.param)
    directory = tmp_path_factory.mktemp("services")
    directory.chmod(0o700)
    with luna_mp.serve(
        clip="cpu", vae="cpu", runtime_dir=directory, log_level="ERROR", **options
    ) as services:
        yield options, services


@pytest.fixture(params=["shm", "inline"])
def luna(source, request):
    ready = source[1].ready
    tcp = {role: f"127.0.0.1:{ready[role]['port']}" for role in ready}
    with source[1].connect(**(tcp if request.param == "inline" else {})) as connected:
        assert set(connected.carriers.values()) == {request.param}
        yield connected


def spec(options, role):
    return ModelSpec(tuple(options.get(f"{role}_models", ())))


@torch.inference_mode()
def test_vae_behind_every_carrier_has_the_same_bits(source, luna):
    options, _ = source
    vae = load_vae(spec(options, "vae"), "cpu", options.get("comfyui", ""))
    noise = torch.randn(1, vae.latent_channels, 8, 8, generator=torch.Generator().manual_seed(7))
    image = luna.vae.decode(noise)
    assert_same(image, vae.decode(noise))
    assert_same(luna.vae.encode(image), vae.encode(vae.decode(noise)))


@torch.inference_mode()
def test_clip_behind_every_carrier_has_the_same_bits(source, luna):
    options, _ = source
    clip = load_clip(spec(options, "clip"), "cpu", options.get("comfyui", ""))
    for prompt in PROMPTS:
        got, expected = luna.clip.encode(prompt), clip.encode(prompt)
        assert_same(got.cond, expected.cond)
        assert (got.pooled is None) == (expected.pooled is None)
        if expected.pooled is not None:
            assert_same(got.pooled, expected.pooled)
        assert got.extras.keys() == expected.extras.keys()
        for name, value in expected.extras.items():
            if isinstance(value, torch.Tensor):
                assert_same(got.extras[name], value)
            else:
                assert got.extras[name] == value
