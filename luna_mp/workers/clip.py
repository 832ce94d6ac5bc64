"""The CLIP worker: tokenizes, encodes, and remembers what it encoded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from luna_mp.errors import OutOfMemory, Rejected
from luna_mp.faults import is_out_of_memory
from luna_mp.models.base import ClipModel, Conditioning
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
        self._cache = _Cache(cache_bytes)

    def calls(self) -> dict[str, Callable[..., Any]]:
        return {**super().calls(), "encode": self.encode, "tokenize": self.tokenize}

    def status(self, call: Call) -> dict[str, Any]:
        return {**super().status(call), "cache": self._cache.to_data()}

    def tokenize(
        self, call: Call, text: str, model: dict[str, Any] | None = None
    ) -> dict[str, list[int]]:
        """Token ids of a prompt for each encoder."""
        _check(text)
        with self._using(call, model) as (_, clip):
            return clip.tokenize(text)

    def encode(
        self, call: Call, text: str, model: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, Any]]:
        """Conditioning of a prompt, as a plain tuple."""
        _check(text)
        with self._using(call, model) as (key, clip):
            found = self._cache.get((key, text))
            if found is None:
                found = self._encode(clip, text)
                self._cache.put((key, text), found)
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


class _Cache:
    """Conditioning by model and prompt. The service's lock guards it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0
        self._hits = 0
        self._entries: OrderedDict[tuple[Any, ...], Conditioning] = OrderedDict()

    def get(self, key: tuple[Any, ...]) -> Conditioning | None:
        found = self._entries.get(key)
        if found is not None:
            self._hits += 1
            self._entries.move_to_end(key)
        return found

    def put(self, key: tuple[Any, ...], value: Conditioning) -> None:
        size = _size(value)
        if size > self._most:
            return
        self._entries[key] = value
        self._held += size
        while self._held > self._most:
            _, old = self._entries.popitem(last=False)
            self._held -= _size(old)

    def to_data(self) -> dict[str, int]:
        return {"entries": len(self._entries), "bytes": self._held, "hits": self._hits}


def _size(value: Conditioning) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in _tensors(tuple(value)))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _check(text: object) -> None:
    if not isinstance(text, str):
        raise Rejected(f"a prompt is a {type(text).__name__}; it takes a string")
    if len(text) > MAX_PROMPT:
        raise Rejected(f"a prompt of {len(text)} characters; the limit is {MAX_PROMPT}")
