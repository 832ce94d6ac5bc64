"""Copies into memory of the host, for carriers that take tensors there."""

from __future__ import annotations

import ctypes
from functools import partial

import torch

from luna_mp.wire.carrier import Outgoing

__all__ = ("bring",)

#: bytes; below, to wake torch's threads costs more than they save: on many cores milliseconds
THREADED_FROM = 16 << 20


def bring(run: torch.Tensor, target: torch.Tensor, out: Outgoing) -> None:
    """Copy `run` to `target`, both uint8 [n], at the latest before the message leaves.

    Off a GPU that follows the work that was queued so far, and nobody's that is queued after it.
    """
    if run.is_cuda:
        after = torch.cuda.current_stream(run.device).record_event()
        out.before.append(partial(_copy_off, run, target, after))
    elif run.numel() < THREADED_FROM:
        ctypes.memmove(target.data_ptr(), run.data_ptr(), run.numel())
    else:
        target.copy_(run)


def _copy_off(run: torch.Tensor, target: torch.Tensor, after: torch.cuda.Event) -> None:
    # Torch has a pool of them: no other connection's copy is waited for.
    stream = torch.cuda.Stream(run.device)
    stream.wait_event(after)
    # The target may have been made in this mode, outside of which it cannot be written.
    with torch.inference_mode(), torch.cuda.stream(stream):
        target.copy_(run, non_blocking=True)
    # Also keeps the run's memory until it was read.
    stream.synchronize()
