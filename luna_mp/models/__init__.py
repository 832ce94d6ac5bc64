"""Where CLIP and VAE come from: `load_clip` and `load_vae` pick the source for a `ModelSpec`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from luna_mp.errors import BadConfig
from luna_mp.models.base import ClipModel, Conditioning, ModelSpec, VaeModel

__all__ = ("ClipModel", "Conditioning", "ModelSpec", "VaeModel", "load_clip", "load_vae")

_SOURCES = ("auto", "comfyui", "diffusers", "demo")


def load_clip(spec: ModelSpec, device: str, comfyui: str = "") -> ClipModel:
    """Load a text encoder, or several that belong together, on `device` ("cpu", "cuda:0").

    `comfyui` is a ComfyUI checkout, needed by the source "comfyui". No grad, eval mode.
    Raises `BadModel` for what lies at the paths, `BadConfig` for everything else.
    """
    source = _source(spec, comfyui)
    if source == "comfyui":
        from luna_mp.models import comfy

        return comfy.load_clip(spec, device, comfyui)
    with _extra_installed():
        from luna_mp.models import transformers

        return transformers.load_clip(_with_paths(spec, source), device)


def load_vae(spec: ModelSpec, device: str, comfyui: str = "") -> VaeModel:
    """Load an autoencoder on `device`; everything else as for `load_clip`."""
    source = _source(spec, comfyui)
    if source == "comfyui":
        from luna_mp.models import comfy

        return comfy.load_vae(spec, device, comfyui)
    with _extra_installed():
        from luna_mp.models import diffusers

        return diffusers.load_vae(_with_paths(spec, source), device)


def _source(spec: ModelSpec, comfyui: str) -> str:
    if spec.source not in _SOURCES:
        raise BadConfig(f"unknown model source {spec.source!r}: use one of {', '.join(_SOURCES)}")
    if spec.source == "auto":
        return "demo" if not spec.paths else "comfyui" if comfyui else "diffusers"
    if spec.source == "demo" and spec.paths:
        raise BadConfig(f"the demo model has no paths, got {list(spec.paths)}: leave them out")
    if spec.source != "demo" and not spec.paths:
        raise BadConfig(f"the source {spec.source!r} needs a model's path: name one, or use demo")
    if spec.source == "comfyui" and not comfyui:
        raise BadConfig("the source 'comfyui' needs ComfyUI's directory: name it with comfyui=")
    return spec.source


def _with_paths(spec: ModelSpec, source: str) -> ModelSpec:
    if source != "demo":
        return spec
    from luna_mp.models.demo import demo_folder

    return replace(spec, paths=(str(demo_folder()),), source="diffusers")


@contextmanager
def _extra_installed() -> Iterator[None]:
    """Say which extra to install where an optional library is missing."""
    try:
        yield
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.startswith("luna_mp"):
            raise
        text = f"the library {exc.name!r} is not installed, and this model needs it"
        raise BadConfig(f'{text}: pip install "luna-mp[diffusers]"') from exc
