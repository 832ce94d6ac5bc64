"""Copies off a GPU for carriers that take tensors to the host.

They follow the work that was queued so far, and nobody's that is queued after it.
"""

from __future__ import annotations

from functools import cache, partial

import torch

from luna_mp.wire.carrier import Outgoing

__all__ = ("bring",)


def bring(run: torch.Tensor, target: torch.Tensor, out: Outgoing) -> None:
    """Copy `run` to `target` in the memory of the host, at the latest before the message leaves."""
    if not run.is_cuda:
        target.copy_(run)
        return
    after = torch.cuda.current_stream(run.device).record_event()
    out.before.append(partial(_copy, run, target, after))


def _copy(run: torch.Tensor, target: torch.Tensor, after: torch.cuda.Event) -> None:
    stream = _stream(run.device)
    stream.wait_event(after)
    with torch.cuda.stream(stream):
        target.copy_(run, non_blocking=True)
    # Also keeps the run's memory until it was read.
    stream.synchronize()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
