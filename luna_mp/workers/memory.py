"""A device's memory: let go of it, and say how it is used."""

from __future__ import annotations

import gc

import torch

__all__ = ("drop_workspaces", "free", "used")


def free(device: torch.device) -> None:
    """Give cached memory back, so that the next try finds all there is."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def drop_workspaces() -> None:
    """Give back cuBLAS's scratch memory: torch keeps some 30 MB of it for each thread that calls.

    What the work in the queue still uses stays its own: the allocator reuses it in stream order.
    """
    torch._C._cuda_clearCublasWorkspaces()


def used(device: torch.device) -> dict[str, int]:
    """Bytes for `status`: this process's tensors, their peak, and what the card has left."""
    if device.type != "cuda":
        return {}
    left, total = torch.cuda.mem_get_info(device)
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "peak": torch.cuda.max_memory_allocated(device),
        "free": left,
        "total": total,
    }
