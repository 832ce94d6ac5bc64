"""Copies that wake none of torch's threads and keep strides, for carriers and caches."""

from __future__ import annotations

import ctypes
from functools import partial

import torch

from luna_mp.wire import layout
from luna_mp.wire.carrier import Outgoing

__all__ = ("bring", "bring_off", "copied", "queue_off")

#: bytes; below, to wake torch's threads costs more than they save: on many cores milliseconds
THREADED_FROM = 16 << 20


def bring(how: layout.Layout, source: torch.Tensor, target: int) -> None:
    """Copy what `layout.describe` gave, of the CPU, to that address."""
    size = how.nbytes
    if size < THREADED_FROM:
        ctypes.memmove(target, source.data_ptr(), size)
    else:
        there = (ctypes.c_ubyte * size).from_address(target)
        torch.frombuffer(there, dtype=torch.uint8).copy_(layout.run_of(how, source))


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """The same in memory of its own, also with the same strides, which `clone` may change."""
    how, source = layout.describe(tensor)
    if source.device.type != "cpu":
        return layout.restore(how, layout.run_of(how, source).clone())
    run = torch.empty(how.nbytes, dtype=torch.uint8)
    bring(how, source, run.data_ptr())
    return layout.restore(how, run)


def bring_off(run: torch.Tensor, target: torch.Tensor, out: Outgoing) -> None:
    """Copy `run`, of a GPU, to `target`, both uint8 [n], before the message leaves.

    That follows the work that was queued so far, and nobody's that is queued after it.
    """
    if out.is_leaving:
        target.copy_(run)
        return
    after = torch.cuda.current_stream(run.device).record_event()
    out.before.append(partial(_copy_off, run, target, after))


def queue_off(run: torch.Tensor, target: torch.Tensor, out: Outgoing) -> None:
    """Like `bring_off`, but the copy is only queued: whoever reads `target` waits for it."""
    target.copy_(run, non_blocking=True)


def _copy_off(run: torch.Tensor, target: torch.Tensor, after: torch.cuda.Event) -> None:
    # Torch has a pool of them: no other connection's copy is waited for.
    stream = torch.cuda.Stream(run.device)
    stream.wait_event(after)
    with torch.cuda.stream(stream):
        target.copy_(run, non_blocking=True)
    # Also keeps the run's memory until it was read.
    stream.synchronize()
