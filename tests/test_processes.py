"""Which process is which, whatever the clock says."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import psutil
import pytest

from luna_mp.processes import born, is_running


@pytest.fixture
def clock_set_ahead(monkeypatch, tmp_path):
    """By an hour: the kernel's time of the boot moves with it, and psutil reads that."""

    def move():
        lines = Path("/proc/stat").read_text()
        moved = re.sub(r"btime (\d+)", lambda time: f"btime {int(time[1]) + 3600}", lines)
        (tmp_path / "stat").write_text(moved)
        (tmp_path / str(os.getpid())).symlink_to(f"/proc/{os.getpid()}")
        monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))

    return move


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system keeps the time itself")
def test_process_is_the_same_after_the_clock_was_set(clock_set_ahead):
    birth, told = born(os.getpid()), psutil.Process().create_time()
    clock_set_ahead()
    assert psutil.Process().create_time() == pytest.approx(told + 3600)
    assert is_running(os.getpid(), birth)


def test_process_of_another_birth_is_another():
    assert not is_running(os.getpid(), born(os.getpid()) - 60)


def test_process_that_nobody_has_heard_of_is_not_running():
    assert not is_running(1 << 30, 1.0)
