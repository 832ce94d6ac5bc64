"""Files for ComfyUI's loaders: SD 1.x's own architectures, which it knows by their keys."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel


def write(folder: Path) -> dict[str, tuple[str, ...]]:
    """Write a VAE and a text encoder with seeded random weights; returns options of `serve`."""
    torch.manual_seed(3)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )
    )
    for name, model in (("vae", vae), ("clip_l", clip)):
        # As checkpoints have it; transformers 5 leaves the prefix out.
        prefix = "text_model." if model is clip and not hasattr(clip, "text_model") else ""
        state = {prefix + key: value.half() for key, value in model.state_dict().items()}
        save_file(state, folder / f"{name}.safetensors")
    return {
        "clip_models": (str(folder / "clip_l.safetensors"),),
        "vae_models": (str(folder / "vae.safetensors"),),
    }
