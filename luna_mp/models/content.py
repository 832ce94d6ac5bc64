"""Names for contents: equal data gets an equal name, wherever it lies."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

__all__ = ("digest", "fingerprint")


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and values; its strides and device do not count."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    name = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    name.update(flat.numpy().data)
    return name.hexdigest()


def fingerprint(value: Any) -> str:
    """A name for plain data with tensors in it."""
    return hashlib.sha256(repr(_plain(value)).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return ("tensor", digest(value))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    return value
