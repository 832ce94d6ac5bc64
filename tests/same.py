"""What "the same bits" means here."""

from __future__ import annotations

import torch


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal in values (NaN included), dtype, device, shape and strides."""
    assert got.dtype == expected.dtype
    assert got.device == expected.device
    assert got.shape == expected.shape
    assert got.stride() == expected.stride()
    assert torch.equal(bits(got), bits(expected))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
