"""CLIP and T5 text encoders of the transformers library, used exactly as diffusers' pipelines do.

A convention says how the encoders' outputs become one conditioning:
    sd1   [CLIPTextModel]                               StableDiffusionPipeline.encode_prompt
    sdxl  [CLIPTextModel,] CLIPTextModelWithProjection  StableDiffusionXLPipeline.encode_prompt
    flux  CLIPTextModel, T5EncoderModel                 FluxPipeline.encode_prompt
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from luna_mp.models import files
from luna_mp.models.base import ClipModel, Conditioning, ModelSpec
from luna_mp.models.text_files import CLIP, PROJECTED, T5, EncoderFiles, find_encoders, load_parts

__all__ = ("Encoder", "TransformersClip", "load_clip")

#: tokens that FluxPipeline has T5 read unless told otherwise
_T5_TOKENS = 512


@dataclass(frozen=True)
class Encoder:
    """A text encoder with its tokenizer; `name` is its folder's in a pipeline."""

    name: str
    model: Any
    tokenizer: Any
    tokens: int

    def read(self, text: str) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Ids and mask, int64 [1, tokens], and how many tokens of the text were dropped."""
        inputs = self.tokenizer(
            [text],
            padding="max_length",
            max_length=self.tokens,
            truncation=True,
            return_tensors="pt",
        )
        # the length warning of the tokenizer is answered by the number that we return
        whole = len(self.tokenizer(text, verbose=False).input_ids)
        return inputs.input_ids, inputs.attention_mask, max(0, whole - self.tokens)


class TransformersClip(ClipModel):
    """One or two text encoders under one convention.

    `encode` puts the number of dropped tokens into `extras["truncated"]` where the prompt was too
    long for an encoder: the largest number, where there are two.
    """

    def __init__(self, encoders: list[Encoder], convention: str, device: torch.device) -> None:
        self.encoders = encoders
        self.convention = convention
        self.device = device
        self.dtype = encoders[-1].model.dtype

    def tokenize(self, text: str) -> dict[str, list[int]]:
        return {encoder.name: encoder.read(text)[0][0].tolist() for encoder in self.encoders}

    def encode(self, text: str) -> Conditioning:
        readings = [encoder.read(text) for encoder in self.encoders]
        ids = [reading[0].to(self.device) for reading in readings]
        if self.convention == "sd1":
            cond, pooled = self._sd1(ids[0], readings[0][1])
        elif self.convention == "sdxl":
            cond, pooled = self._sdxl(ids)
        else:
            cond, pooled = self._flux(*ids)
        dropped = max(reading[2] for reading in readings)
        return Conditioning(cond, pooled, {"truncated": dropped} if dropped else {})

    def weight_bytes(self) -> int:
        return files.weight_bytes(*(encoder.model for encoder in self.encoders))

    def _sd1(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        model = self.encoders[0].model
        is_masked = getattr(model.config, "use_attention_mask", False)
        output = model(ids, attention_mask=mask.to(self.device) if is_masked else None)
        return output[0].to(model.dtype), output.pooler_output.to(model.dtype)

    def _sdxl(self, ids: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = [
            encoder.model(encoder_ids, output_hidden_states=True)
            for encoder, encoder_ids in zip(self.encoders, ids, strict=True)
        ]
        cond = torch.concat([output.hidden_states[-2] for output in outputs], dim=-1)
        return cond.to(self.dtype), outputs[-1].text_embeds

    def _flux(
        self, clip_ids: torch.Tensor, t5_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        clip, t5 = (encoder.model for encoder in self.encoders)
        pooled = clip(clip_ids, output_hidden_states=False).pooler_output.to(clip.dtype)
        cond = t5(t5_ids, output_hidden_states=False)[0].to(t5.dtype)
        return cond, pooled


def load_clip(spec: ModelSpec, device: str) -> TransformersClip:
    """Load the text encoders at the paths of `spec`. Raises `BadModel`, `BadConfig`."""
    target = files.resolve_device(device)
    wanted = files.resolve_dtype(spec.dtype)
    parts, convention = find_encoders(spec)
    encoders = []
    for part in parts:
        stored = torch.float32 if target.type == "cpu" else part.component.stored_dtype()
        model, tokenizer = load_parts(part, wanted or stored)
        model = model.eval().requires_grad_(False).to(target)
        encoders.append(Encoder(part.name, model, tokenizer, _token_limit(part, model, tokenizer)))
    return TransformersClip(encoders, convention, target)


def _token_limit(part: EncoderFiles, model: Any, tokenizer: Any) -> int:
    if part.kind == T5:
        return _T5_TOKENS
    assert part.kind in (CLIP, PROJECTED)
    # a tokenizer saved without its limit names 1e30; CLIP has no positions beyond its own
    return int(min(tokenizer.model_max_length, model.config.max_position_embeddings))
