"""The state of torch's random generators, taken from one process to another and back.

Some autoencoders draw noise: what they draw must be what they would have drawn in the caller.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ("capture", "install")


def capture(device: torch.device) -> dict[str, torch.Tensor]:
    """States of the CPU's generator and, where `device` is a GPU, of that one's; uint8 each."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def install(state: dict[str, Any], device: torch.device) -> None:
    """Continue from `state`; a GPU's state says nothing to a CPU, and the other way round."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
