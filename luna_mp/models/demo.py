"""Small models that ship as code: for a first look, tests, and machines with nothing on them.

The weights are made on first use, from a fixed seed and by hand, and kept in the user's cache as a
pipeline-style folder (`model_index.json`, `vae`, `text_encoder`, `tokenizer`). They are untrained:
what the text encoder says means nothing, and the autoencoder gives a picture back blurred.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import platformdirs
import torch

from luna_mp.errors import BadConfig

__all__ = ("demo_folder", "demo_image")

#: part of the folder's name; raise it whenever a byte of the models changes
_RECIPE = 2
_CACHE_VARIABLE = "LUNA_MP_CACHE_DIR"
_IMAGE_EDGE = 256


def demo_folder() -> Path:
    """The folder of the demo models, made now if it is not there (about a second).

    It lies in the user's cache directory, or in the one that `LUNA_MP_CACHE_DIR` names. Several
    processes may call this at once. Raises `BadConfig` where the directory cannot be written.
    """
    cache = Path(os.environ.get(_CACHE_VARIABLE) or platformdirs.user_cache_dir("luna-mp"))
    folder = cache / f"demo-{_RECIPE}"
    if (folder / "model_index.json").is_file():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache))
        try:
            _write(draft)
            _publish(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)  # gone already where it was published
    except OSError as exc:
        reason = exc.strerror or str(exc)
        raise BadConfig(
            f"cannot write the demo models (6 MB) to {cache}: {reason}; "
            f"free some space there, or name a writable directory in {_CACHE_VARIABLE}"
        ) from exc
    return folder


def demo_image() -> torch.Tensor:
    """A picture to try things on: float32 0..1, [1, 256, 256, 3], contiguous, on the CPU."""
    edge = torch.linspace(0, 1, _IMAGE_EDGE)
    y, x = torch.meshgrid(edge, edge, indexing="ij")
    image = torch.stack((0.25 + 0.5 * x, 0.35 + 0.4 * y, 0.85 - 0.5 * y), dim=-1)
    shapes: tuple[tuple[torch.Tensor, tuple[float, float, float]], ...] = (
        ((x - 0.32) ** 2 + (y - 0.36) ** 2 < 0.04, (0.95, 0.80, 0.15)),
        (((x - 0.70).abs() < 0.17) & ((y - 0.64).abs() < 0.17), (0.80, 0.10, 0.20)),
        ((x - y).abs() < 0.03, (0.97, 0.97, 0.97)),
        ((x < 0.30) & (y > 0.75), (0.05, 0.15, 0.10)),
    )
    for inside, colour in shapes:
        image[inside] = torch.tensor(colour)
    return image.unsqueeze(0)


def _write(folder: Path) -> None:
    # the recipes import diffusers and transformers, which `demo_image` has no use for
    from luna_mp.models.demo_recipe import write_text_encoder, write_tokenizer, write_vae

    vocabulary = write_tokenizer(folder / "tokenizer")
    write_text_encoder(folder / "text_encoder", vocabulary)
    write_vae(folder / "vae")
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _publish(draft: Path, folder: Path) -> None:
    """Rename `draft` to `folder`, unless another process was first."""
    try:
        draft.rename(folder)
    except OSError:
        # the systems disagree on the errno for a folder in the way; that it is whole decides
        if not (folder / "model_index.json").is_file():
            raise
