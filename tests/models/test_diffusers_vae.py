from __future__ import annotations

import shutil

import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    AutoencoderTiny,
)
from diffusers.image_processor import VaeImageProcessor
from safetensors.torch import load_file, save_file

from luna_mp.errors import BadModel, RemoteFailure
from luna_mp.models import ModelSpec, load_vae
from tests.models import makers
from tests.models.contract import check_tiles, check_vae


def load(path, **options):
    return load_vae(ModelSpec(paths=(str(path),), **options), "cpu")


def asymmetric():
    return AsymmetricAutoencoderKL(
        down_block_out_channels=(32,), up_block_out_channels=(32,), latent_channels=3
    )


def tiny():
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8)
    )


def deep_compression():
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )


def wan():
    return AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


MAKERS = {
    "AutoencoderKL": makers.vae,
    "AsymmetricAutoencoderKL": asymmetric,
    "AutoencoderTiny": tiny,
    "AutoencoderDC": deep_compression,
    "AutoencoderKLWan": wan,
}


@pytest.fixture(scope="module", params=MAKERS)
def saved(request, tmp_path_factory):
    """Folder and model of one class."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("vae")
    model = MAKERS[request.param]().eval()
    model.save_pretrained(folder)
    return folder, model


def test_every_class_keeps_the_contract(saved):
    check_vae(load(saved[0]))


def test_tiles_keep_the_contract_where_there_are_tiles(saved):
    folder, model = saved
    vae = load(folder)
    if isinstance(model, AsymmetricAutoencoderKL):
        with pytest.raises(RemoteFailure, match="AsymmetricAutoencoderKL cannot work in tiles"):
            check_tiles(vae)
    else:
        check_tiles(vae)
    assert not getattr(vae.model, "use_tiling", False)


@torch.inference_mode()
def test_decode_is_the_image_processors(saved):
    folder, model = saved
    vae = load(folder)
    frames = (1,) if vae.spatial_dims == 3 else ()
    latent = torch.randn(2, vae.latent_channels, *frames, 6, 8)
    expected = VaeImageProcessor().denormalize(model.decode(latent).sample)
    image = vae.decode(latent)
    assert torch.equal(image, expected.movedim(1, -1))
    assert image.stride() == expected.movedim(1, -1).stride()


@torch.inference_mode()
def test_encode_is_the_mode_of_the_posterior(sd1):
    folder, pipeline = sd1
    image = torch.rand(2, 16, 24, 3)
    pixels = VaeImageProcessor.normalize(image.movedim(-1, 1))
    expected = pipeline.vae.encode(pixels).latent_dist.mode()
    latent = load(folder).encode(image)
    assert torch.equal(latent, expected)
    assert latent.stride() == expected.stride()


def test_tiles_are_those_of_diffusers(sd1):
    folder, pipeline = sd1
    vae = load(folder)
    with torch.inference_mode():
        latent = torch.randn(1, 3, 24, 24)
        expected = pipeline.vae.tiled_decode(latent).sample
        image = vae.decode_tiled(latent)
    assert torch.equal(image, VaeImageProcessor.denormalize(expected).movedim(1, -1))


def test_tiling_is_off_again_after_a_failure(sd1):
    vae = load(sd1[0])
    with pytest.raises(RuntimeError), torch.inference_mode():
        vae.decode_tiled(torch.randn(1, 5, 24, 24))
    assert vae.model.use_tiling is False


def test_what_a_model_is_like_comes_from_the_model(saved):
    folder, model = saved
    vae = load(folder)
    ratios = {"AutoencoderKL": 2, "AsymmetricAutoencoderKL": 1, "AutoencoderDC": 2}
    assert vae.spatial_ratio == ratios.get(type(model).__name__, 8)
    assert vae.spatial_dims == (3 if isinstance(model, AutoencoderKLWan) else 2)
    assert vae.image_channels == 3
    assert vae.weight_bytes() == sum(p.numel() * 4 for p in model.state_dict().values())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_in_the_named_dtype_and_images_in_float32(sd1, dtype):
    vae = load(sd1[0], dtype=dtype)
    with torch.inference_mode():
        image = vae.decode(torch.randn(1, 3, 8, 8))
        latent = vae.encode(image)
    assert vae.dtype == latent.dtype == getattr(torch, dtype)
    assert image.dtype == torch.float32


def test_weights_stored_as_half_are_float32_on_the_cpu(tmp_path):
    makers.vae().half().save_pretrained(tmp_path)
    assert load(tmp_path).dtype == torch.float32


def test_weights_have_no_grad_and_the_model_is_in_eval_mode(sd1):
    model = load(sd1[0]).model
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_pipeline_component_and_file_give_the_same_bits(sd1, tmp_path):
    folder, _ = sd1
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, tmp_path / "mine.safetensors")
    shutil.copy(folder / "vae" / "config.json", tmp_path / "mine.json")
    latent = torch.randn(1, 3, 8, 8)
    paths = (folder, folder / "vae", weights, tmp_path / "mine.safetensors")
    with torch.inference_mode():
        images = [load(path).decode(latent) for path in paths]
    assert all(torch.equal(images[0], image) for image in images[1:])


def test_a_variant_is_read_where_there_is_no_plain_file(tmp_path):
    model = makers.vae()
    model.save_pretrained(tmp_path, variant="fp16")
    latent = torch.randn(1, 3, 8, 8)
    with torch.inference_mode():
        assert load(tmp_path).decode(latent).shape[1] == 16


@torch.inference_mode()
def test_a_file_with_the_original_projects_names_is_read(tmp_path):
    model = makers.vae(use_quant_conv=False, use_post_quant_conv=False)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(_original_names(load_file(weights)), tmp_path / "ldm.safetensors")
    latent = torch.randn(1, 3, 8, 8)
    assert torch.equal(
        load(tmp_path / "ldm.safetensors").decode(latent), load(weights).decode(latent)
    )


def test_a_decoder_that_wants_more_than_a_latent_is_refused(tmp_path):
    AutoencoderKLTemporalDecoder(block_out_channels=(32,)).save_pretrained(tmp_path)
    with pytest.raises(BadModel, match="num_frames"):
        load(tmp_path)


def _original_names(weights):
    """The names of the latent diffusion project, for a model of two levels."""
    pairs = (
        ("down_blocks.0.resnets.", "down.0.block."),
        ("down_blocks.1.resnets.", "down.1.block."),
        ("down_blocks.0.downsamplers.0", "down.0.downsample"),
        ("up_blocks.0.resnets.", "up.1.block."),
        ("up_blocks.1.resnets.", "up.0.block."),
        ("up_blocks.0.upsamplers.0", "up.1.upsample"),
        ("mid_block.resnets.0", "mid.block_1"),
        ("mid_block.resnets.1", "mid.block_2"),
        ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
        ("mid_block.attentions.0.to_q", "mid.attn_1.q"),
        ("mid_block.attentions.0.to_k", "mid.attn_1.k"),
        ("mid_block.attentions.0.to_v", "mid.attn_1.v"),
        ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
        ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
    )
    renamed = {}
    for key, value in weights.items():
        for ours, theirs in pairs:
            key = key.replace(ours, theirs)
        is_linear = "attn_1" in key and value.ndim == 2
        renamed[key] = value[:, :, None, None].contiguous() if is_linear else value
    return renamed
