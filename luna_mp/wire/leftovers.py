"""What a killed process leaves in shared memory that no system takes back."""

from __future__ import annotations

from pathlib import Path

__all__ = ("remove_leftovers",)

SHARED_MEMORY = Path("/dev/shm")


def remove_leftovers(pid: int) -> None:
    """Remove what a process that has ended left in /dev/shm; after an orderly end that is nothing.

    torch_PID_RANDOM_NUMBER  torch's counters of what it exported (MapAllocator): removed when the
                             last user ends in order, which a killed one never does
    cuda.shm.GPU.HEXPID.N    the CUDA driver's own
    """
    for pattern in (f"torch_{pid}_*", f"cuda.shm.*.{pid:x}.*"):
        for path in SHARED_MEMORY.glob(pattern):
            path.unlink(missing_ok=True)
