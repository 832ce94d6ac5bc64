"""Processes told apart by pid and birth: pids are used again, and clocks are set meanwhile."""

from __future__ import annotations

import psutil

__all__ = ("born", "is_running")


def born(pid: int) -> float:
    """When a process began, in seconds: whoever asks, and whenever, is told the same.

    On Linux they count from the boot. psutil adds the time of that, which moves whenever the clock
    is set. Raises `psutil.NoSuchProcess`.
    """
    # In this order: older psutils add the time of the boot that was asked for last.
    boot = psutil.boot_time() if psutil.LINUX else 0.0
    return psutil.Process(pid).create_time() - boot


def is_running(pid: int, birth: float) -> bool:
    """Whether that very process runs; one that was killed and that nobody has reaped does not.

    Raises `psutil.AccessDenied` or `OSError` where that cannot be told.
    """
    try:
        # The system's clock counts in hundredths.
        return abs(born(pid) - birth) < 1.0 and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
