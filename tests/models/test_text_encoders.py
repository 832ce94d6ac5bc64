from __future__ import annotations

import shutil

import pytest
import torch

from luna_mp.errors import BadConfig, BadModel
from luna_mp.models import ModelSpec, load_clip
from luna_mp.models.diffusers import DTYPE_ARGUMENT
from tests.models.contract import check_clip

PROMPTS = ("a red cat, on a hill.", "", "cat " * 700)


def load(*paths, **options):
    return load_clip(ModelSpec(paths=tuple(map(str, paths)), **options), "cpu")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()


@pytest.mark.parametrize("prompt", PROMPTS)
@torch.inference_mode()
def test_sd1_is_the_pipelines_encode_prompt(sd1, prompt):
    folder, pipeline = sd1
    expected, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
    assert same(load(folder).encode(prompt).cond, expected)


@torch.inference_mode()
def test_sd1_pools_at_the_end_token(sd1):
    folder, pipeline = sd1
    ids = pipeline.tokenizer("a cat", padding="max_length", return_tensors="pt").input_ids
    expected = pipeline.text_encoder(ids).pooler_output
    assert torch.equal(load(folder).encode("a cat").pooled, expected)


@pytest.mark.parametrize("prompt", PROMPTS)
@torch.inference_mode()
def test_sdxl_is_the_pipelines_encode_prompt(sdxl, prompt):
    folder, pipeline = sdxl
    cond, _, pooled, _ = pipeline.encode_prompt(
        prompt, device="cpu", do_classifier_free_guidance=False
    )
    result = load(folder).encode(prompt)
    assert same(result.cond, cond)
    assert same(result.pooled, pooled)


@pytest.mark.parametrize("prompt", PROMPTS)
@torch.inference_mode()
def test_flux_is_the_pipelines_encode_prompt(flux, prompt):
    folder, pipeline = flux
    cond, pooled, _ = pipeline.encode_prompt(prompt, prompt, device="cpu")
    result = load(folder).encode(prompt)
    assert same(result.cond, cond)
    assert same(result.pooled, pooled)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@torch.inference_mode()
def test_half_precision_is_that_of_a_pipeline_loaded_so(flux, dtype):
    folder, pipeline = flux
    half = type(pipeline).from_pretrained(
        folder,
        scheduler=None,
        transformer=None,
        **{DTYPE_ARGUMENT: getattr(torch, dtype)},
    )
    cond, pooled, _ = half.encode_prompt("a cat", "a cat", device="cpu")
    result = load(folder, dtype=dtype).encode("a cat")
    assert same(result.cond, cond)
    assert same(result.pooled, pooled)


@pytest.mark.parametrize("family", ["sd1", "sdxl", "flux"])
def test_a_pipeline_keeps_the_contract(family, request):
    folder, _ = request.getfixturevalue(family)
    check_clip(load(folder))


def test_component_folders_find_the_tokenizers_beside_them(sdxl):
    folder, _ = sdxl
    parts = load(folder / "text_encoder", folder / "text_encoder_2")
    assert parts.convention == "sdxl"
    assert torch.equal(parts.encode("a cat").cond, load(folder).encode("a cat").cond)


def test_the_second_encoder_alone_is_the_refiner(sdxl):
    folder, _ = sdxl
    clip = load(folder / "text_encoder_2")
    assert clip.convention == "sdxl"
    assert torch.equal(clip.encode("a cat").cond, load(folder).encode("a cat").cond[..., 16:])


def test_single_files_are_read_with_the_config_beside_them(flux, tmp_path):
    folder, _ = flux
    for index, part in enumerate(("text_encoder", "text_encoder_2")):
        name = ("clip", "t5")[index]
        shutil.copy(folder / part / "model.safetensors", tmp_path / f"{name}.safetensors")
        shutil.copy(folder / part / "config.json", tmp_path / f"{name}.json")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(folder / name, tmp_path / name)
    clip = load(tmp_path / "clip.safetensors", tmp_path / "t5.safetensors")
    assert clip.convention == "flux"
    assert torch.equal(clip.encode("a cat").cond, load(folder).encode("a cat").cond)


def test_a_sharded_encoder_in_a_variant_is_found(flux, tmp_path):
    folder, pipeline = flux
    shutil.copytree(folder, tmp_path / "copy")
    target = tmp_path / "copy" / "text_encoder_2"
    (target / "model.safetensors").unlink()
    pipeline.text_encoder_2.save_pretrained(target, variant="fp16", max_shard_size="4KB")
    assert len(list(target.glob("*.safetensors"))) > 1
    clip = load(tmp_path / "copy")
    assert torch.equal(clip.encode("a cat").cond, load(folder).encode("a cat").cond)


def test_tokens_are_those_that_each_encoder_reads(flux):
    folder, pipeline = flux
    tokens = load(folder).tokenize("a cat")
    assert {name: len(ids) for name, ids in tokens.items()} == {
        "text_encoder": 77,
        "text_encoder_2": 512,
    }
    assert tokens["text_encoder_2"][:6] == pipeline.tokenizer_2("a cat").input_ids[:6]


def test_dropped_tokens_are_counted(sd1):
    folder, pipeline = sd1
    clip = load(folder)
    words = (77 - 2) // (len(pipeline.tokenizer("cat").input_ids) - 2)
    whole = len(pipeline.tokenizer("cat " * (words + 9), verbose=False).input_ids)
    assert clip.encode("cat " * words).extras == {}
    assert clip.encode("cat " * (words + 9)).extras == {"truncated": whole - 77}


def test_weights_have_no_grad_and_the_model_is_in_eval_mode(sdxl):
    folder, _ = sdxl
    for encoder in load(folder).encoders:
        assert not encoder.model.training
        assert not any(p.requires_grad for p in encoder.model.parameters())


def test_weight_bytes_are_those_of_all_encoders(sdxl):
    folder, pipeline = sdxl
    models = (pipeline.text_encoder, pipeline.text_encoder_2)
    least = sum(p.numel() * 4 for model in models for p in model.parameters())
    assert least <= load(folder).weight_bytes() < least + 4096


def test_an_unknown_type_is_refused_with_those_there_are(sd1):
    with pytest.raises(BadModel, match="auto, sd1, sdxl, flux"):
        load(sd1[0], type="sd9")


def test_a_type_that_the_encoders_do_not_make_is_refused(sd1):
    with pytest.raises(BadModel, match="CLIPTextModelWithProjection"):
        load(sd1[0], type="sdxl")


def test_an_unknown_dtype_is_refused_with_those_there_are(sd1):
    with pytest.raises(BadConfig, match="auto, float16, bfloat16 or float32"):
        load(sd1[0], dtype="float12")


def test_an_unknown_pipeline_needs_the_type_named(sd1, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(sd1[0], folder)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "OtherPipeline"))
    with pytest.raises(BadModel, match="OtherPipeline.*name the type"):
        load(folder)
    assert load(folder, type="sd1").convention == "sd1"
