"""What stands in for a model: typed calls over an endpoint."""

from __future__ import annotations

import logging
import os
from typing import Any, TypeVar

import torch

from luna_mp.endpoint import Endpoint
from luna_mp.errors import Rejected
from luna_mp.models.base import Conditioning

__all__ = ("ClipProxy", "Proxy", "VaeProxy")

logger = logging.getLogger(__name__)

CALL_SECONDS = 600.0
#: where results are wanted: wherever they come by the fastest way, or on the CPU
DEVICES = ("", "cpu")
CONNECT_SECONDS = 10.0

P = TypeVar("P", bound="Proxy")


class Proxy:
    """Stands in for a model: the service's default one, or the one that `load` named."""

    def __init__(self, endpoint: Endpoint, model: dict[str, Any] | None = None) -> None:
        self._endpoint = endpoint
        self._model = model

    def __repr__(self) -> str:
        name = ", ".join(self._model["paths"]) if self._model else "default"
        return f"<{type(self).__name__} {name} by {self._endpoint.carrier}>"

    def _call(
        self, method: str, *args: Any, timeout: float, device: str = "", **kwargs: Any
    ) -> Any:
        if device not in DEVICES:
            raise Rejected(f"device={device!r:.60}; it takes one of {DEVICES}")
        if self._model is not None:
            # By description, not by handle: a restarted service loads it again by itself.
            kwargs["model"] = self._model
        return self._endpoint.call(method, args, kwargs, timeout, device)

    def load(
        self: P,
        path: Any,
        *,
        type: str = "auto",
        dtype: str = "auto",
        source: str = "auto",
        timeout: float = CALL_SECONDS,
    ) -> P:
        """A proxy for another model: a folder, a file, or the files of a composed text encoder.

        Raises `BadModel` where there is none or where `serve --allow` does not reach.
        """
        paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
        options = {"type": type, "dtype": dtype, "source": source}
        model = {"paths": [os.fspath(p) for p in paths], **options}
        self._endpoint.call("load", (), {"model": model}, timeout)
        return self.__class__(self._endpoint, model)

    def unload(self, timeout: float = CONNECT_SECONDS) -> bool:
        """Let a service of this machine drop what `load` brought; False: it was not there."""
        was_there: bool = self._endpoint.call("unload", (self._model,), {}, timeout)
        return was_there

    def status(self, timeout: float = CONNECT_SECONDS) -> dict[str, Any]:
        """What the service runs, for whom and how much: plain data."""
        status: dict[str, Any] = self._endpoint.call("status", (), {}, timeout)
        return status


class VaeProxy(Proxy):
    """A VAE in another process. Tensors come and go on the CPU unless a carrier can do better."""

    def decode(
        self,
        latent: torch.Tensor,
        *,
        tiled: bool = False,
        device: str = "",
        timeout: float = CALL_SECONDS,
    ) -> torch.Tensor:
        """Image, float32 [B, H, W, C] 0..1, for a latent as the autoencoder takes it, unscaled.

        `tiled` decodes in overlapping tiles; so does the service once when memory is short.
        `device="cpu"` wants the image on the CPU; otherwise it stays on the service's GPU where
        that is shared (see `Luna.carriers`).
        Raises `Rejected` for a latent that the model cannot take, `OutOfMemory`, `RemoteFailure`,
        `TimedOut` after `timeout` seconds, `Broken` and `Unavailable`.
        """
        image: torch.Tensor = self._call(
            "decode", latent, tiled=tiled, device=device, timeout=timeout
        )
        return image

    def encode(
        self,
        image: torch.Tensor,
        *,
        tiled: bool = False,
        device: str = "",
        timeout: float = CALL_SECONDS,
    ) -> torch.Tensor:
        """Mode of the posterior, unscaled, in the model's dtype, for an image [B, H, W, C] 0..1.

        Raises what `decode` raises.
        """
        latent: torch.Tensor = self._call(
            "encode", image, tiled=tiled, device=device, timeout=timeout
        )
        return latent


class ClipProxy(Proxy):
    """Text encoders in another process."""

    def encode(self, text: str, *, device: str = "", timeout: float = CALL_SECONDS) -> Conditioning:
        """Conditioning of a prompt: cond [1, tokens, width], pooled or None, extras.

        Raises `Rejected` for what is not a prompt, and what `VaeProxy.decode` raises.
        """
        conditioning = Conditioning(*self._call("encode", text, device=device, timeout=timeout))
        if dropped := conditioning.extras.get("truncated"):
            logger.warning("the prompt is longer than the model reads: %s tokens cut", dropped)
        return conditioning

    def tokenize(self, text: str, *, timeout: float = CALL_SECONDS) -> dict[str, list[int]]:
        """Token ids of a prompt for each encoder."""
        tokens: dict[str, list[int]] = self._call("tokenize", text, timeout=timeout)
        return tokens
