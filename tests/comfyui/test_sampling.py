"""A VAE in a service that a ControlNet calls from inside the sampler."""

from __future__ import annotations

import pytest
import torch

from tests.comfyui import services, vae_makers, vae_services
from tests.comfyui.checkpoint_makers import random
from tests.same import assert_same

comfy = services.comfy
folder = services.folder
inference = services.inference
serving = vae_services.serving
service = vae_services.service

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.usefixtures("inference"),
    pytest.mark.timeout(300),
]

#: a small one of SD 1.5's architecture
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "num_heads": 8,
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "transformer_depth": [1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "use_linear_in_transformer": False,
    "legacy": False,
}
CPU = torch.device("cpu")


def filled(network: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        parameter.copy_(random(name, parameter, generator))
    return network


@pytest.fixture
def model(comfy):
    """MODEL, as a loader gives it."""
    from comfy import model_base, model_patcher, supported_models

    unet = UNET | {"out_channels": 4, "transformer_depth_output": [1] * 4, "dtype": torch.float32}
    base = model_base.BaseModel(supported_models.SD15(unet), device=CPU)
    filled(base.diffusion_model, 1)
    return model_patcher.ModelPatcher(base, CPU, CPU)


@pytest.fixture
def control(comfy):
    """One whose hint is a latent, as those of SD3 and Flux are."""
    from comfy import cldm, controlnet, latent_formats, ops

    network = cldm.cldm.ControlNet(
        **UNET, hint_channels=4, dtype=torch.float32, operations=ops.disable_weight_init
    )
    return controlnet.ControlNet(
        filled(network, 2), latent_format=latent_formats.SD15(), load_device=CPU
    )


def conditioning(seed: int):
    return [[torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(seed)), {}]]


def test_controlnet_that_encodes_while_sampling_gives_the_same_bits(
    comfy, folder, service, model, control
):
    path = vae_makers.write("sd1", folder / "sd1.safetensors")
    remote, _ = comfy.remote.load_vae(service, [str(path)])
    hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(3))
    latent = {"samples": torch.zeros(1, 4, 8, 8)}

    def sample(vae, strength=0.9):
        node = comfy.nodes.ControlNetApplyAdvanced()
        conditions = node.apply_controlnet(
            conditioning(4), conditioning(5), control, hint, strength, 0.0, 1.0, vae=vae
        )
        run = comfy.nodes.KSampler().sample
        return run(model, 7, 3, 4.0, "euler", "normal", *conditions, latent)[0]["samples"]

    local, found = sample(vae_makers.read(path)), sample(remote)
    assert_same(found, local)
    assert bool(torch.isfinite(local).all())
    # and the hint shows
    assert not torch.equal(sample(remote, strength=0.0), local)
    assert_same(remote.decode(found), vae_makers.read(path).decode(local))
