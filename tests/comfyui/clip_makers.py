"""Files of text encoders in the sizes of the shrunken ComfyUI, with seeded random weights."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.comfyui import shrunken
from tests.comfyui.checkpoint_makers import random

#: what a loader is given, by family: parts, and the name of its type
FAMILIES = {
    "sd1": (("clip_l",), "stable_diffusion"),
    "sdxl": (("clip_l", "clip_g"), "stable_diffusion"),
    "sd3": (("clip_l", "clip_g", "t5xxl"), "sd3"),
    "flux": (("clip_l", "t5xxl"), "flux"),
    "lumina": (("gemma",), "lumina2"),
}
_SENTENCES = "a cat on a red hill, two dogs at noon, the sea under snow, some words of no meaning. "


def write(part: str, path: Path, seed: int = 21) -> Path:
    """Write one text encoder in float16, as the files that ComfyUI's users have hold it."""
    generator = torch.Generator().manual_seed(seed)
    network = _network(part)
    state = {key: random(key, value, generator) for key, value in network.state_dict().items()}
    if part == "gemma":
        state["spiece_model"] = _pieces()
    save_file(state, path)
    return path


def write_embedding(path: Path, vectors: int) -> None:
    """A textual inversion for SD 1.x."""
    values = torch.randn(vectors, 768, generator=torch.Generator().manual_seed(8))
    save_file({"emb_params": values * 0.1}, path)


def _network(part: str) -> Any:
    from comfy import sd1_clip, sdxl_clip
    from comfy.text_encoders import lumina2, sd3_clip

    kinds = {
        "clip_l": sd1_clip.SDClipModel,
        "clip_g": sdxl_clip.SDXLClipG,
        "t5xxl": sd3_clip.T5XXLModel,
        "gemma": partial(lumina2.Gemma2_2BModel, attention_mask=False),
    }
    return kinds[part](dtype=torch.float16).transformer


def _pieces() -> torch.Tensor:
    """A tokenizer, which Gemma's files hold beside the weights: uint8."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([_SENTENCES] * 20),
        model_writer=written,
        vocab_size=shrunken.GEMMA_PIECES,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
    )
    return torch.frombuffer(bytearray(written.getvalue()), dtype=torch.uint8)
