"""Torch's files of counters, as both ends use them: they need shared memory and no GPU."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import pytest
import torch

from luna_mp.wire import counters

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torch shares GPUs on Linux only")


@pytest.fixture
def files():
    """Six, as torch makes them one after the other, with the first counter at one."""
    paths = [Path(f"/dev/shm/luna-mp-test-{os.getpid()}-{n}") for n in range(6)]
    for path in paths:
        path.write_bytes(bytes(counters.COUNTERS_START) + struct.pack("<q", 1))
    yield paths
    counters._counters.cache_clear()
    for path in paths:
        path.unlink()


def is_mapped(path):
    return str(path) in Path("/proc/self/maps").read_text()


def test_files_that_torch_is_done_with_are_not_kept_mapped(files):
    for path in files:
        assert counters.TorchCounter(f"/{path.name}".encode(), 0).value() == 1
    assert [is_mapped(path) for path in files] == [False] * 2 + [True] * 4


def test_counter_keeps_its_file_while_others_come(files):
    counter = counters.TorchCounter(f"/{files[0].name}".encode(), 0)
    for path in files:
        counters.TorchCounter(f"/{path.name}".encode(), 0)
    with files[0].open("r+b") as file:
        file.seek(counters.COUNTERS_START)
        file.write(struct.pack("<q", 0))
    assert counter.value() == 0


@pytest.fixture
def made(files, monkeypatch):
    """The counters that torch would have made, each in a file of its own."""
    made = []

    def make(self):
        name = f"/{files[len(made)].name}".encode()
        made.append(counters.TorchCounter(name, 0, None, self._spare))
        return made[-1]

    monkeypatch.setattr(counters.Counters, "_made", make)
    return made


def test_counter_that_is_retired_is_the_next_one_s(made):
    book = counters.Counters(torch.device("cpu"))
    first, second = book.take(), book.take()
    for counter in (first, second):
        counters.let_go(counter.file, counter.slot)
        counter.retire()
    assert [book.take(), book.take()] == [first, second]
    assert [first.value(), second.value()] == [1, 1]
    assert len(made) == 2


def test_counter_of_what_was_given_up_counts_nothing_else(made):
    """A worker that was stopped goes on, and lets go of what was taken back from it."""
    book = counters.Counters(torch.device("cpu"))
    first = book.take()
    first.release()
    first.retire()
    second = book.take()
    counters.let_go(first.file, first.slot)
    assert second.value() == 1


def test_counter_that_was_let_go_of_too_often_counts_nothing_else(made):
    book = counters.Counters(torch.device("cpu"))
    first = book.take()
    for _ in range(2):
        counters.let_go(first.file, first.slot)
    first.retire()
    assert first.value() == 0
    assert book.take() is not first


def test_counters_that_count_nothing_are_let_go_of(made):
    book = counters.Counters(torch.device("cpu"))
    first = book.take()
    counters.let_go(first.file, first.slot)
    first.retire()
    book.forget()
    assert book.take() is not first


def test_client_lets_go_of_what_a_service_has_that_goes_on(files):
    name = f"/{files[0].name}".encode()
    counter = counters.TorchCounter(name, 0)
    counters.let_go(name, 0)
    assert counter.value() == 0


def test_client_with_another_dev_shm_is_told():
    with pytest.raises(RuntimeError, match=r"cannot be opened .*: run both with one /dev/shm"):
        counters.reach(b"/luna-mp-test-that-is-elsewhere")


def test_client_writes_to_no_file_but_torch_s(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    counters.let_go(f"/../..{path}".encode(), 0)
    assert path.read_bytes() == bytes(4096)


def test_client_lets_go_of_what_a_service_had_that_has_gone():
    counters.let_go(b"/luna-mp-test-that-has-gone", 0)
