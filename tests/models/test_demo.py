from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from luna_mp.errors import BadConfig
from luna_mp.models import ModelSpec, load_clip, load_vae
from luna_mp.models.demo import demo_folder, demo_image
from tests.models.contract import check_clip, check_tiles, check_vae


@pytest.fixture(scope="module")
def vae():
    return load_vae(ModelSpec(), "cpu")


def test_the_vae_keeps_the_contract(vae):
    check_vae(vae)
    check_tiles(vae)


def test_the_text_encoder_keeps_the_contract():
    check_clip(load_clip(ModelSpec(), "cpu"))


def test_the_image_is_a_picture():
    image = demo_image()
    assert image.shape == (1, 256, 256, 3)
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    assert 0 <= image.min() < 0.1 and 0.9 < image.max() <= 1
    assert len(image.flatten(0, 2).unique(dim=0)) > 1000


@torch.inference_mode()
def test_the_picture_comes_back_blurred(vae):
    image = demo_image()
    back = vae.decode(vae.encode(image))
    assert (back - image).abs().mean() < 0.06
    blur = torch.nn.functional.avg_pool2d(image.movedim(-1, 1), 8)
    seen = torch.nn.functional.avg_pool2d(back.movedim(-1, 1), 8)
    assert torch.corrcoef(torch.stack((blur.flatten(), seen.flatten())))[0, 1] > 0.95


@torch.inference_mode()
def test_a_decode_takes_well_under_a_second(vae):
    latent = torch.randn(1, 4, 32, 32)
    vae.decode(latent)
    started = time.process_time()
    vae.decode(latent)
    assert time.process_time() - started < 1.0


def test_two_processes_may_make_the_models_at_once(tmp_path):
    code = "from luna_mp.models.demo import demo_folder; print(demo_folder())"
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "LUNA_MP_CACHE_DIR": str(tmp_path / "cache")}
    makers = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [maker.communicate(timeout=100)[0].strip() for maker in makers]
    assert [maker.returncode for maker in makers] == [0, 0]
    assert outputs[0] == outputs[1]
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [outputs[0].split("/")[-1]]


def test_the_same_bytes_are_made_every_time(tmp_path, monkeypatch):
    first = demo_folder()
    monkeypatch.setenv("LUNA_MP_CACHE_DIR", str(tmp_path))
    again = demo_folder()
    assert again != first
    files = [path.relative_to(first) for path in first.rglob("*") if path.is_file()]
    assert len(files) == 8
    for file in files:
        assert (first / file).read_bytes() == (again / file).read_bytes(), file


def test_a_cache_that_cannot_be_written_is_named_with_its_variable(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LUNA_MP_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(BadConfig, match="file/cache.*LUNA_MP_CACHE_DIR"):
        demo_folder()
