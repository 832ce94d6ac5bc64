"""Which process is which, whatever the clock says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from luna_mp.processes import born, is_running


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system keeps the time itself")
def test_process_is_the_same_after_the_clock_was_set(monkeypatch, tmp_path):
    """The kernel's time of the boot moves with the clock, and psutil reads that."""
    birth, boot = born(os.getpid()), psutil.boot_time()
    moved = re.sub(r"btime \d+", f"btime {boot + 3600:.0f}", Path("/proc/stat").read_text())
    (tmp_path / "stat").write_text(moved)
    (tmp_path / str(os.getpid())).symlink_to(f"/proc/{os.getpid()}")
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    assert psutil.boot_time() == boot + 3600
    assert is_running(os.getpid(), birth)


def test_births_are_in_seconds():
    first = born(os.getpid())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        told = psutil.Process(process.pid).create_time() - psutil.Process().create_time()
        assert born(process.pid) - first == pytest.approx(told, abs=0.05)


def test_process_of_another_birth_is_another():
    assert not is_running(os.getpid(), born(os.getpid()) - 0.5)


def test_process_that_nobody_has_heard_of_is_not_running():
    assert not is_running(1 << 30, 1.0)
