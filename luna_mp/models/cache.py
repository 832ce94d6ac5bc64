"""What was encoded before: conditioning by model and prompt."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch

from luna_mp.models.base import Conditioning

__all__ = ("Cache",)


class Cache:
    """At most `most` bytes, the least used forgotten first. Threads may share it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0
        self._hits = 0
        self._entries: OrderedDict[tuple[Any, ...], Conditioning] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[Any, ...]) -> Conditioning | None:
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._hits += 1
                self._entries.move_to_end(key)
            return found

    def put(self, key: tuple[Any, ...], value: Conditioning) -> None:
        size = _size(value)
        with self._lock:
            # One that another thread has put in meanwhile is the same.
            if size > self._most or key in self._entries:
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
