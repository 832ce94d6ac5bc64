"""Torch's files of counters, as the lease book reads them: they need shared memory and no GPU."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import pytest

from luna_mp.wire import cuda

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torch shares GPUs on Linux only")


@pytest.fixture
def files():
    """Three, as torch makes them one after the other, with the first counter at one."""
    paths = [Path(f"/dev/shm/luna-mp-test-{os.getpid()}-{n}") for n in range(3)]
    for path in paths:
        path.write_bytes(bytes(cuda.COUNTERS_START) + struct.pack("<q", 1))
    yield paths
    cuda._counters.cache_clear()
    for path in paths:
        path.unlink()


def is_mapped(path):
    return str(path) in Path("/proc/self/maps").read_text()


def test_files_that_torch_is_done_with_are_not_kept_mapped(files):
    for path in files:
        assert cuda._TorchCounter(f"/{path.name}".encode(), 0).value() == 1
    assert [is_mapped(path) for path in files] == [False, False, True]


def test_counter_keeps_its_file_while_others_come(files):
    counter = cuda._TorchCounter(f"/{files[0].name}".encode(), 0)
    for path in files:
        cuda._TorchCounter(f"/{path.name}".encode(), 0)
    with files[0].open("r+b") as file:
        file.seek(cuda.COUNTERS_START)
        file.write(struct.pack("<q", 0))
    assert counter.value() == 0
