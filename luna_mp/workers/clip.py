"""The CLIP worker: tokenizes, encodes, and remembers what it encoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from luna_mp.errors import OutOfMemory, Rejected
from luna_mp.faults import is_out_of_memory
from luna_mp.models.base import ClipModel, Conditioning
from luna_mp.models.cache import Cache
from luna_mp.models.library import Library
from luna_mp.workers import memory
from luna_mp.workers.queue import Call
from luna_mp.workers.worker import Worker

__all__ = ("ClipWorker",)

MAX_PROMPT = 1 << 20  # characters


class ClipWorker(Worker[ClipModel]):
    """`cache_bytes`: how much conditioning is remembered, the least used forgotten first."""

    def __init__(self, library: Library[ClipModel], cache_bytes: int) -> None:
        super().__init__(library)
        self.cache = Cache(cache_bytes)

    def calls(self) -> dict[str, Callable[..., Any]]:
        return {**super().calls(), "encode": self.encode, "tokenize": self.tokenize}

    def status(self, call: Call) -> dict[str, Any]:
        return {**super().status(call), "cache": self.cache.to_data()}

    def tokenize(
        self, call: Call, text: str, model: dict[str, Any] | None = None
    ) -> dict[str, list[int]]:
        """Token ids of a prompt for each encoder."""
        _check(text)
        _, clip = self.take(call, model, gives_tensors=False)
        return clip.tokenize(text)

    def encode(
        self, call: Call, text: str, model: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, Any]]:
        """Conditioning of a prompt, as a plain tuple."""
        _check(text)
        key, clip = self.take(call, model)
        found = self.cache.get((key, text))
        if found is None:
            found = self._encode(clip, text)
            self.cache.put((key, text), found)
        return tuple(found)  # type: ignore[return-value]

    def _encode(self, clip: ClipModel, text: str) -> Conditioning:
        try:
            return clip.encode(text)
        except (RuntimeError, MemoryError) as exc:
            if not is_out_of_memory(exc):
                raise
            memory.free(clip.device)
            raise OutOfMemory(
                f"a prompt of {len(text)} characters does not fit on {clip.device}: {exc}"
            ) from exc


def _check(text: object) -> None:
    if not isinstance(text, str):
        raise Rejected(f"a prompt is a {type(text).__name__}; it takes a string")
    if len(text) > MAX_PROMPT:
        raise Rejected(f"a prompt of {len(text)} characters; the limit is {MAX_PROMPT}")
