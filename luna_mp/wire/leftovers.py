"""What a killed process leaves in shared memory that no system takes back."""

from __future__ import annotations

from pathlib import Path

__all__ = ("remove_counters",)

SHARED_MEMORY = Path("/dev/shm")


def remove_counters(pid: int) -> None:
    """Remove the files in which torch counts a process's exports; the process must have ended.

    They are named torch_PID_RANDOM_NUMBER (torch's MapAllocator). Torch removes them itself when
    the last of all their users ends in order; one that was killed never does.
    """
    for path in SHARED_MEMORY.glob(f"torch_{pid}_*"):
        path.unlink(missing_ok=True)
