"""Names for contents: equal data gets an equal name, wherever it lies."""

from __future__ import annotations

import hashlib
import json
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
    """A name for plain data with tensors in it; lists and tuples of the same items are equal."""
    return hashlib.sha256(json.dumps(value, default=_named).encode()).hexdigest()


def _named(value: object) -> dict[str, str]:
    if isinstance(value, torch.Tensor):
        return {"tensor": digest(value)}
    raise TypeError(f"a {type(value).__name__} has no name for its content")
