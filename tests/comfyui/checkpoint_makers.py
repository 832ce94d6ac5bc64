"""A whole SD 1.5 checkpoint and a LoRA for it: real architectures, seeded random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from luna_mp.models.comfy_import import import_comfy

#: ComfyUI's own description of SD 1.5, which it finds by these shapes
_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "num_heads": 8,
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "context_dim": 768,
    "use_linear_in_transformer": False,
    "legacy": False,
}
_RANK = 4


def write_checkpoint(path: Path, comfyui: str) -> None:
    """About 2 GB in float16."""
    comfy = import_comfy(comfyui, torch.device("cpu"))
    from comfy import ops
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    vae = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3}
    vae |= {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": []}
    parts = {
        "model.diffusion_model.": UNetModel(**_UNET, operations=ops.disable_weight_init),
        "first_stage_model.": AutoencoderKL(ddconfig=vae | {"dropout": 0.0}, embed_dim=4),
        "cond_stage_model.": comfy.sd1_clip.SD1ClipModel().clip_l,
    }
    generator = torch.Generator().manual_seed(11)
    state = {
        prefix + key: random(key, value, generator)
        for prefix, module in parts.items()
        for key, value in module.state_dict().items()
        if value.is_floating_point()
    }
    save_file(state, path)


def write_lora(path: Path, seed: int = 12) -> None:
    """For the text encoder and for a part of the diffusion model."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        f"lora_te_text_model_encoder_layers_{layer}_{name}": shape
        for layer in range(12)
        for name, shape in (("mlp_fc1", (3072, 768)), ("self_attn_q_proj", (768, 768)))
    }
    shapes["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"] = (1280, 768)
    state = {}
    for name, (rows, columns) in shapes.items():
        state[f"{name}.lora_up.weight"] = torch.randn(rows, _RANK, generator=generator) * 0.1
        state[f"{name}.lora_down.weight"] = torch.randn(_RANK, columns, generator=generator) * 0.1
        state[f"{name}.alpha"] = torch.tensor(float(_RANK))
    save_file(state, path)


def random(key: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Norms are about one, biases about zero; the rest keeps its input's scale."""
    noise = torch.randn(like.shape, generator=generator)
    if like.ndim < 2:
        middle = float("norm" in key and key.endswith("weight")) if like.ndim else 4.6
        return (middle + 0.05 * noise).to(torch.float16)
    fan_in = like[0].numel() if "embedding" not in key else 100
    return (noise / fan_in**0.5).to(torch.float16)
