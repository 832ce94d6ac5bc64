"""Tiny random models, saved as diffusers and transformers save theirs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FluxPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from luna_mp.models.demo_recipe import write_tokenizer


def vae(**changes):
    torch.manual_seed(1)
    config = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 8,
        "sample_size": 16,
        "latent_channels": 3,
    }
    return AutoencoderKL(**{**config, **changes}).eval()


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    write_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder)


def t5_tokenizer(folder: Path) -> T5TokenizerFast:
    letters = [(c, -3.0) for c in "abcdefghijklmnopqrstuvwxyz,."]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    backend = Tokenizer(Unigram(pieces, unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return T5TokenizerFast.from_pretrained(folder)


def clip_encoder(tokenizer, projected: bool = False, width: int = 16):
    torch.manual_seed(2 + projected)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        projection_dim=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5_encoder(tokenizer):
    torch.manual_seed(4)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    return T5EncoderModel(config).eval()


def sd1_pipeline(folder: Path) -> StableDiffusionPipeline:
    """Saved at `folder`; the unet and the scheduler are left out."""
    tokenizer = clip_tokenizer(folder.with_name(folder.name + "-tokenizer"))
    pipeline = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return pipeline


def sdxl_pipeline(folder: Path) -> StableDiffusionXLPipeline:
    tokenizer = clip_tokenizer(folder.with_name(folder.name + "-tokenizer"))
    pipeline = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip_encoder(tokenizer),
        text_encoder_2=clip_encoder(tokenizer, projected=True, width=20),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=None,
        scheduler=None,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return pipeline


def flux_pipeline(folder: Path) -> FluxPipeline:
    clip = clip_tokenizer(folder.with_name(folder.name + "-clip"))
    t5 = t5_tokenizer(folder.with_name(folder.name + "-t5"))
    pipeline = FluxPipeline(
        scheduler=None,
        vae=vae(),
        text_encoder=clip_encoder(clip),
        tokenizer=clip,
        text_encoder_2=t5_encoder(t5),
        tokenizer_2=t5,
        transformer=None,
    )
    pipeline.save_pretrained(folder)
    return pipeline
