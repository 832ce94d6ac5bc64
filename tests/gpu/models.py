"""A real autoencoder at SDXL's configuration, with random weights; made where it is needed."""

from __future__ import annotations

from pathlib import Path

import torch

__all__ = ("sdxl_vae",)


def sdxl_vae(folder: Path, dtype: torch.dtype = torch.float16) -> Path:
    """Write diffusers' `AutoencoderKL` as SDXL has it, from a fixed seed; returns its folder."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    path = folder / f"sdxl-{str(dtype).removeprefix('torch.')}"
    if not path.exists():
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[128, 256, 512, 512],
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=32,
            sample_size=1024,
        )
        vae.to(dtype).save_pretrained(path)
    return path
