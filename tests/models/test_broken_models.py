"""Every broken input is a `BadModel` that names the path and says what to do."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from luna_mp.errors import BadModel
from luna_mp.models import ModelSpec, load_clip, load_vae


def refused(load, *paths, match):
    with pytest.raises(BadModel, match=match) as caught:
        load(ModelSpec(paths=tuple(map(str, paths))), "cpu")
    text = str(caught.value)
    assert str(paths[0]) in text
    assert "expected" in text and "; " in text


@pytest.fixture
def vae(sd1, tmp_path):
    return shutil.copytree(sd1[0] / "vae", tmp_path / "vae")


@pytest.fixture
def pipeline(sd1, tmp_path):
    return shutil.copytree(sd1[0], tmp_path / "pipeline")


def change(config, **fields):
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))


@pytest.mark.parametrize("load", [load_clip, load_vae])
def test_a_path_with_nothing_there(load, tmp_path):
    refused(load, tmp_path / "absent", match="nothing there")


@pytest.mark.parametrize("load", [load_clip, load_vae])
def test_a_folder_without_config(load, tmp_path):
    refused(load, tmp_path, match="without config.json")


@pytest.mark.parametrize("load", [load_clip, load_vae])
def test_a_text_file_named_safetensors(load, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_text("I am a letter, not a model.")
    refused(load, file, match="27 bytes that are not a whole safetensors file")


@pytest.mark.parametrize("load", [load_clip, load_vae])
def test_a_pickled_file(load, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.ckpt")
    refused(load, tmp_path / "model.ckpt", match="convert the weights to safetensors")


def test_a_folder_with_pickled_weights_only(vae):
    (vae / "diffusion_pytorch_model.safetensors").rename(vae / "diffusion_pytorch_model.bin")
    refused(load_vae, vae, match="pickled files can run code")


def test_a_truncated_weight_file(vae):
    file = vae / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadModel, match="copy the file again"):
        load_vae(ModelSpec(paths=(str(vae),)), "cpu")


def test_an_empty_weight_file(vae):
    (vae / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(BadModel, match="found 0 bytes"):
        load_vae(ModelSpec(paths=(str(vae),)), "cpu")


def test_a_weight_file_without_config(vae):
    (vae / "config.json").unlink()
    refused(load_vae, vae / "diffusion_pytorch_model.safetensors", match="weights without a config")


def test_a_config_that_is_no_json(vae):
    (vae / "config.json").write_text("{broken")
    with pytest.raises(BadModel, match="unreadable file"):
        load_vae(ModelSpec(paths=(str(vae),)), "cpu")


@pytest.mark.parametrize("name", ["AutoencoderOfTomorrow", "UNet2DConditionModel", None, 3])
def test_a_config_of_a_class_that_is_no_autoencoder(vae, name):
    change(vae / "config.json", _class_name=name)
    with pytest.raises(BadModel, match=f"_class_name {name!r}"):
        load_vae(ModelSpec(paths=(str(vae),)), "cpu")


def test_a_config_of_another_size_than_the_weights(vae):
    change(vae / "config.json", block_out_channels=[16, 64])
    refused(load_vae, vae, match="config and weights belong together")


def test_weights_of_another_model_than_the_config(sd1, tmp_path):
    shutil.copy(sd1[0] / "vae" / "config.json", tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    shutil.copy(sd1[0] / "text_encoder" / "model.safetensors", weights)
    refused(load_vae, tmp_path, match="config and weights belong together")
    shutil.copy(tmp_path / "config.json", tmp_path / "odd.json")
    refused(load_vae, weights.rename(tmp_path / "odd.safetensors"), match="belong together")


def test_a_pipeline_without_a_vae(pipeline):
    change(pipeline / "model_index.json", vae=[None, None])
    refused(load_vae, pipeline, match="whose vae is")


def test_a_pipeline_without_text_encoders(pipeline):
    change(pipeline / "model_index.json", text_encoder=[None, None])
    refused(load_clip, pipeline, match="without text encoders")


def test_a_pipeline_without_its_tokenizer(pipeline):
    shutil.rmtree(pipeline / "tokenizer")
    with pytest.raises(BadModel, match="put the tokenizer's folder there"):
        load_clip(ModelSpec(paths=(str(pipeline),)), "cpu")


def test_a_tokenizer_of_a_class_that_is_not_expected(pipeline):
    change(pipeline / "model_index.json", tokenizer=["mine", "AutoTokenizer"])
    with pytest.raises(BadModel, match="AutoTokenizer"):
        load_clip(ModelSpec(paths=(str(pipeline),)), "cpu")


def test_a_broken_tokenizer(pipeline):
    for file in (pipeline / "tokenizer").iterdir():
        file.write_text("not what it should be")
    with pytest.raises(BadModel, match="tokenizer"):
        load_clip(ModelSpec(paths=(str(pipeline),)), "cpu")


def test_a_text_encoder_with_missing_tensors(pipeline):
    change(pipeline / "text_encoder" / "config.json", num_hidden_layers=4)
    with pytest.raises(BadModel, match="weights without"):
        load_clip(ModelSpec(paths=(str(pipeline),)), "cpu")


def test_a_vae_where_a_text_encoder_should_be(sd1):
    refused(load_clip, sd1[0] / "vae", match="a text encoder None")


def test_a_text_encoder_where_a_vae_should_be(sd1):
    refused(load_vae, sd1[0] / "text_encoder", match="_class_name None")


def test_an_index_that_leads_out_of_its_folder(vae):
    weights = vae / "diffusion_pytorch_model.safetensors"
    weights.rename(vae.parent / "other.safetensors")
    index = vae / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(BadModel, match="file names beside it"):
        load_vae(ModelSpec(paths=(str(vae),)), "cpu")


def test_two_paths_for_one_vae(sd1):
    with pytest.raises(BadModel, match="2 paths"):
        load_vae(ModelSpec(paths=(str(sd1[0]), str(sd1[0]))), "cpu")
