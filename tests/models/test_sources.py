from __future__ import annotations

import subprocess
import sys

import pytest

from luna_mp.errors import BadConfig
from luna_mp.models import ModelSpec, load_clip, load_vae

LOADERS = pytest.mark.parametrize("load", [load_clip, load_vae])


@LOADERS
def test_an_unknown_source_is_refused_with_those_there_are(load):
    with pytest.raises(BadConfig, match="auto, comfyui, diffusers, demo"):
        load(ModelSpec(source="hub"), "cpu")


@LOADERS
@pytest.mark.parametrize("source", ["diffusers", "comfyui"])
def test_a_source_other_than_the_demo_needs_a_path(load, source):
    with pytest.raises(BadConfig, match="needs a model's path"):
        load(ModelSpec(source=source), "cpu", "/somewhere")


@LOADERS
def test_the_demo_takes_no_path(load):
    with pytest.raises(BadConfig, match="the demo model has no paths"):
        load(ModelSpec(paths=("x",), source="demo"), "cpu")


@LOADERS
def test_comfyuis_loaders_need_its_directory(load):
    with pytest.raises(BadConfig, match="needs ComfyUI's directory"):
        load(ModelSpec(paths=("x",), source="comfyui"), "cpu")


@LOADERS
def test_a_path_with_a_comfyui_directory_goes_to_comfyui(load, tmp_path):
    (tmp_path / "x.pt").touch()
    with pytest.raises(BadConfig, match="no ComfyUI in"):
        load(ModelSpec(paths=(str(tmp_path / "x.pt"),)), "cpu", str(tmp_path))


@LOADERS
@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(load, device, sd1):
    with pytest.raises(BadConfig, match=f"device '{device}'"):
        load(ModelSpec(paths=(str(sd1[0]),)), device)


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )


def test_importing_the_models_imports_no_library():
    result = run(
        "import sys, luna_mp.models, luna_mp.models.demo\n"
        "print(sorted({'diffusers', 'transformers', 'comfy'} & set(sys.modules)))"
    )
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_a_missing_library_names_the_extra_to_install(library, sd1):
    loader = "load_vae" if library == "diffusers" else "load_clip"
    result = run(
        f"import sys; sys.modules[{library!r}] = None\n"
        "from luna_mp.errors import BadConfig\n"
        f"from luna_mp.models import ModelSpec, {loader}\n"
        f"try: {loader}(ModelSpec(paths=({str(sd1[0])!r},)), 'cpu')\n"
        "except BadConfig as exc: print(exc)"
    )
    assert f"'{library}' is not installed" in result.stdout, result.stderr
    assert 'pip install "luna-mp[diffusers]"' in result.stdout
