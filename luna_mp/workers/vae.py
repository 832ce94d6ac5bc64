"""The VAE worker: checks what it is given, decodes and encodes, and survives a full card."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from luna_mp.errors import OutOfMemory, Rejected
from luna_mp.faults import is_out_of_memory
from luna_mp.models.base import VaeModel
from luna_mp.workers import memory
from luna_mp.workers.queue import Call
from luna_mp.workers.worker import Worker

__all__ = ("VaeWorker",)

logger = logging.getLogger(__name__)

Op = Callable[[torch.Tensor], torch.Tensor]


class VaeWorker(Worker[VaeModel]):
    """Shapes and dtypes are those of `VaeModel`."""

    def calls(self) -> dict[str, Callable[..., Any]]:
        return {**super().calls(), "decode": self.decode, "encode": self.encode}

    def status(self, call: Call) -> dict[str, Any]:
        model = self.library.default
        if model is None:
            return super().status(call)
        shape = {
            "latent_channels": model.latent_channels,
            "image_channels": model.image_channels,
            "spatial_dims": model.spatial_dims,
            "spatial_ratio": model.spatial_ratio,
        }
        return {**super().status(call), "vae": shape}

    def decode(
        self,
        call: Call,
        latent: torch.Tensor,
        model: dict[str, Any] | None = None,
        tiled: bool = False,
    ) -> torch.Tensor:
        """Image for a latent. Raises `Rejected` for one that the model cannot take."""
        _check_tensor(latent, "latent")
        _, vae = self.take(call, model)
        _check_latent(latent, vae)
        whole = partial(vae.decode, place=call.place)
        in_tiles = partial(vae.decode_tiled, place=call.place)
        return _attempt(whole, in_tiles, latent, vae, tiled)

    def encode(
        self,
        call: Call,
        image: torch.Tensor,
        model: dict[str, Any] | None = None,
        tiled: bool = False,
    ) -> torch.Tensor:
        """Latent for an image. Raises `Rejected` for one that the model cannot take."""
        _check_tensor(image, "image")
        _, vae = self.take(call, model)
        _check_image(image, vae)
        return _attempt(vae.encode, vae.encode_tiled, image, vae, tiled)


def _attempt(
    whole: Op, in_tiles: Op, tensor: torch.Tensor, vae: VaeModel, tiled: bool
) -> torch.Tensor:
    """Run; where memory is short once more in tiles, then give up with the figures."""
    if not tiled:
        try:
            return whole(tensor)
        except (RuntimeError, MemoryError) as exc:
            if not is_out_of_memory(exc):
                raise
            logger.warning("out of memory at %s, once more in tiles", list(tensor.shape))
    # Out of the handler: its traceback would keep the first try's tensors alive.
    memory.free(vae.device)
    try:
        return in_tiles(tensor)
    except (RuntimeError, MemoryError) as exc:
        if not is_out_of_memory(exc):
            raise
        memory.free(vae.device)
        raise OutOfMemory(
            f"a tensor of shape {list(tensor.shape)} does not fit on {vae.device}, not even in "
            f"tiles: {exc}"
        ) from exc


def _check_tensor(value: object, name: str) -> None:
    if not isinstance(value, torch.Tensor):
        raise Rejected(f"{name} is a {type(value).__name__}; it takes a tensor")
    if not value.is_floating_point() or value.itemsize < 2:
        raise Rejected(f"{name} is {value.dtype}; it takes float16, bfloat16, float32 or float64")
    if not value.numel():
        raise Rejected(f"{name} of shape {list(value.shape)} is empty")


def _check_latent(latent: torch.Tensor, vae: VaeModel) -> None:
    rank = vae.spatial_dims + 2
    if latent.ndim != rank or latent.shape[1] != vae.latent_channels:
        raise Rejected(
            f"latent has shape {list(latent.shape)}; this VAE takes {rank} dimensions, "
            f"[batch, {vae.latent_channels} channels, …, height, width]"
        )


def _check_image(image: torch.Tensor, vae: VaeModel) -> None:
    rank = vae.spatial_dims + 2
    if image.ndim != rank or image.shape[-1] != vae.image_channels:
        raise Rejected(
            f"image has shape {list(image.shape)}; this VAE takes {rank} dimensions, "
            f"[batch, …, height, width, {vae.image_channels} channels]"
        )
    if min(image.shape[-3:-1]) < vae.spatial_ratio:
        raise Rejected(
            f"image has {image.shape[-3]}×{image.shape[-2]} pixels; this VAE takes at least "
            f"{vae.spatial_ratio} along each edge"
        )
