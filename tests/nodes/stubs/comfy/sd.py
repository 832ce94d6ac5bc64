"""Two of the families, of which one has the same name as one of ours; models that are text."""

import enum
from typing import Any


class CLIPType(enum.Enum):
    STABLE_DIFFUSION = 1
    FLUX = 2


class CLIP:
    pass


class VAE:
    pass


def load_clip(paths: list[str], *, embedding_directory: list[str], clip_type: CLIPType) -> str:
    return f"local {clip_type.name} of {' '.join(paths)}, embeddings {embedding_directory}"


def load_checkpoint_guess_config(
    path: str, *, output_clip: bool, output_vae: bool, embedding_directory: Any
) -> tuple[str, str | None, str | None, None]:
    return (
        f"model of {path}, output_clip={output_clip}, output_vae={output_vae}",
        "local clip" if output_clip else None,
        "local vae" if output_vae else None,
        None,
    )
