"""Files for ComfyUI's loaders: SD 1.x's and SDXL's architectures, which it knows by their keys."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection


def write(folder: Path) -> dict[str, tuple[str, ...]]:
    """Write a VAE and a text encoder with seeded random weights; returns options of `serve`."""
    torch.manual_seed(3)
    return {
        "clip_models": (_save(folder, "clip_l", _clip_l()),),
        "vae_models": (_save(folder, "vae", _vae()),),
    }


def write_sdxl(folder: Path) -> dict[str, tuple[str, ...]]:
    """The same in SDXL's sizes: two text encoders, some 1.8 GB in all."""
    torch.manual_seed(4)
    return {
        "clip_models": (_save(folder, "clip_l", _clip_l()), _save(folder, "clip_g", _clip_g())),
        "vae_models": (_save(folder, "vae", _vae()),),
    }


def _vae() -> torch.nn.Module:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
    )


def _clip_l() -> torch.nn.Module:
    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )
    )


def _clip_g() -> torch.nn.Module:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=20,
            hidden_act="gelu",
            projection_dim=1280,
        )
    )


def _save(folder: Path, name: str, model: torch.nn.Module) -> str:
    """As checkpoints have it; transformers 5 leaves one prefix out."""
    is_bare = any(key.startswith("encoder.layers.") for key in model.state_dict())
    state = {
        f"text_model.{key}" if is_bare and not key.startswith("text_projection") else key: value
        for key, value in model.state_dict().items()
    }
    path = folder / f"{name}.safetensors"
    save_file({key: value.half() for key, value in state.items()}, path)
    return str(path)
