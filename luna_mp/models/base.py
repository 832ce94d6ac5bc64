"""What a CLIP and a VAE must be able to do, whatever library they come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

__all__ = ("ClipModel", "Conditioning", "Model", "ModelSpec", "Place", "VaeModel", "at_once")

#: runs the last step of a result, so that the caller chooses whose memory the result lies in
Place = Callable[[Callable[[], torch.Tensor]], torch.Tensor]


def at_once(step: Callable[[], torch.Tensor]) -> torch.Tensor:
    """In whatever memory comes."""
    return step()


@dataclass(frozen=True)
class ModelSpec:
    """Names a model: its files or its folder, and how to read them.

    `paths`   one folder, or one to four weight files (the parts of a composed text encoder)
    `type`    the model family's convention ("sd1", "sdxl", "flux", …), or "auto"
    `dtype`   a torch dtype's name ("float16"), or "auto": what the source thinks best
    `source`  "diffusers", "comfyui", "demo", or "auto": what the paths look like
    """

    paths: tuple[str, ...] = ()
    type: str = "auto"
    dtype: str = "auto"
    source: str = "auto"


class Conditioning(NamedTuple):
    """What a text encoder makes of a prompt.

    `cond`    float [1, tokens, width]
    `pooled`  float [1, width of the pooled output], or None for encoders without one
    `extras`  further entries of the source's own, tensors or plain data
    """

    cond: torch.Tensor
    pooled: torch.Tensor | None
    extras: dict[str, Any]


class Model(ABC):
    """What every model has: weights in one dtype on one device."""

    device: torch.device
    dtype: torch.dtype

    @abstractmethod
    def weight_bytes(self) -> int:
        """Bytes that the weights take on the device."""


class VaeModel(Model):
    """An autoencoder on its device. Callers hold `torch.inference_mode()` and a lock.

    Latents are as the autoencoder takes them, unscaled, [B, latent_channels, *spatial];
    images are float 0..1, [B, H, W, image_channels] ([B, T, H, W, C] where `spatial_dims` is 3).
    Both may lie on any device and in any floating dtype; results lie on `device`.
    """

    latent_channels: int
    image_channels: int
    spatial_dims: int
    #: pixels along one edge for each element of a latent
    spatial_ratio: int

    @abstractmethod
    def decode(self, latent: torch.Tensor, place: Place = at_once) -> torch.Tensor:
        """Image, float32, for a latent. Raises `torch.OutOfMemoryError`.

        A model may leave `place` unused; what it places is made there, and nothing else holds it.
        """

    @abstractmethod
    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """Mode of the posterior, in `dtype`, for an image. Raises `torch.OutOfMemoryError`."""

    @abstractmethod
    def decode_tiled(self, latent: torch.Tensor, place: Place = at_once) -> torch.Tensor:
        """Like `decode` in overlapping tiles: less memory, other bits."""

    @abstractmethod
    def encode_tiled(self, image: torch.Tensor) -> torch.Tensor:
        """Like `encode` in overlapping tiles: less memory, other bits."""


class ClipModel(Model):
    """One text encoder, or several that make one conditioning. Callers hold inference mode."""

    @abstractmethod
    def tokenize(self, text: str) -> dict[str, list[int]]:
        """Token ids of a prompt for each encoder, as the model would read them."""

    @abstractmethod
    def encode(self, text: str) -> Conditioning:
        """Conditioning of one prompt, on `device`; an empty prompt is a prompt."""
