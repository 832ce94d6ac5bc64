"""Files of VAEs that ComfyUI knows by their keys, with seeded random weights.

ComfyUI itself builds the networks: it is given the keys that it looks at, and no more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file


class Family(NamedTuple):
    """`keys` are those by which `comfy.sd.VAE` knows it; `latent` is a small one of its latents."""

    keys: dict[str, tuple[int, ...]]
    latent: tuple[int, ...]
    config: dict[str, Any] = {}


_KL_KEYS: dict[str, tuple[int, ...]] = {"encoder.down.2.downsample.conv.weight": (512, 512, 3, 3)}
#: of LTXV the smallest that still scales by 8, 32 and 32
_LTXV_BLOCKS: dict[str, Any] = {
    "encoder_blocks": [["res_x", {"num_layers": 1}], *[["compress_all", {}]] * 3],
    # ComfyUI goes through these from the last one
    "decoder_blocks": [
        *[["compress_all", {"residual": False}]] * 3,
        ["res_x", {"num_layers": 1, "inject_noise": True}],
    ],
}
LTXV: dict[str, Any] = {
    "dims": 3,
    "latent_channels": 128,
    "norm_layer": "pixel_norm",
    "patch_size": 4,
    "latent_log_var": "uniform",
    "timestep_conditioning": True,
    **_LTXV_BLOCKS,
}
FAMILIES = {
    "sd1": Family(
        {
            **_KL_KEYS,
            "decoder.conv_in.weight": (512, 4, 3, 3),
            "post_quant_conv.weight": (4, 4, 1, 1),
        },
        (1, 4, 8, 8),
    ),
    "flux": Family({**_KL_KEYS, "decoder.conv_in.weight": (512, 16, 3, 3)}, (1, 16, 8, 8)),
    "upscaler": Family(
        {"decoder.conv_in.weight": (512, 4, 3, 3), "post_quant_conv.weight": (4, 4, 1, 1)},
        (1, 4, 16, 16),
    ),
    "taesd": Family({"taesd_decoder.1.weight": (64, 4, 3, 3)}, (1, 4, 8, 8)),
    "wan": Family(
        {
            "decoder.middle.0.residual.0.gamma": (384, 1, 1, 1),
            "decoder.head.0.gamma": (96, 1, 1, 1),
            "encoder.conv1.weight": (96, 3, 3, 3, 3),
            "decoder.head.2.weight": (3, 96, 3, 3, 3),
        },
        (1, 16, 2, 8, 8),
    ),
    "ltxv": Family(
        {"decoder.up_blocks.0.res_blocks.0.conv1.conv.weight": (128, 128, 3, 3, 3)},
        (1, 128, 2, 3, 3),
        LTXV,
    ),
    "svd": Family({"decoder.mid.block_1.mix_factor": (1,)}, (1, 4, 8, 8)),
    "stage_a": Family({"vquantizer.codebook.weight": (8192, 4)}, (1, 4, 16, 16)),
    "hunyuan": Family(
        {
            "decoder.conv_in.conv.weight": (512, 16, 3, 3, 3),
            "post_quant_conv.weight": (16, 16, 1, 1, 1),
        },
        (1, 16, 2, 4, 4),
    ),
    "cosmos": Family({"decoder.unpatcher3d.wavelets": (2,)}, (1, 16, 2, 8, 8)),
    "audio": Family({"decoder.layers.1.layers.0.beta": (2048,)}, (1, 64, 6)),
}


def write(family: str, path: Path, seed: int = 3) -> Path:
    """Write a VAE of that family."""
    import comfy.sd

    keys, _, config = FAMILIES[family]
    metadata = {"config": json.dumps({"vae": config})} if config else None
    hints = {key: torch.zeros(shape) for key, shape in keys.items()}
    network = comfy.sd.VAE(sd=hints, metadata=metadata).first_stage_model
    generator = torch.Generator().manual_seed(seed)
    state = {
        key: _values(key, tensor, generator).half() if tensor.is_floating_point() else tensor
        for key, tensor in {**hints, **network.state_dict()}.items()
    }
    save_file(state, path, metadata)
    return path


def read(path: Path) -> Any:
    """The VAE in that file as ComfyUI loads it, in this process."""
    import comfy.sd
    import comfy.utils

    state, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    return comfy.sd.VAE(sd=state, metadata=metadata)


def latent(family: str, batch: int = 1, size: tuple[int, ...] = ()) -> torch.Tensor:
    """Noise of the family's small size, or of another one: frames, height and width."""
    _, channels, *small = FAMILIES[family].latent
    shape = (batch, channels, *(size or small))
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def _values(key: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Such that what goes through the network keeps about its size."""
    noise = torch.randn(tensor.shape, generator=generator)
    if tensor.ndim > 1 and tensor[0].numel() > 1:
        return noise / tensor[0].numel() ** 0.5
    if key.endswith(("bias", "alpha", "beta", "shift")):
        return noise * 0.1
    return 1 + noise * 0.1
