"""Processes told apart by pid and birth: pids are used again, and clocks are set meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

__all__ = ("born", "is_running")

STARTED = 19  # field of /proc/PID/stat, counted from the state on, which follows the name


def born(pid: int) -> float:
    """When a process began, in seconds: on Linux and Windows all are told the same, at any time.

    On Linux they count from the boot, in ticks of the system's clock (proc_pid_stat(5)). psutil
    adds the time of the boot, which moves whenever the clock is set. Raises `psutil.NoSuchProcess`.
    """
    if not psutil.LINUX:
        return psutil.Process(pid).create_time()
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    return int(stat.rpartition(b")")[2].split()[STARTED]) / os.sysconf("SC_CLK_TCK")


def is_running(pid: int, birth: float) -> bool:
    """Whether that very process runs; one that was killed and that nobody has reaped does not.

    Raises `psutil.AccessDenied` or `OSError` where that cannot be told.
    """
    try:
        return born(pid) == birth and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
