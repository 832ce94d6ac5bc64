"""Fixtures that every test may ask for, and what must be left behind by none."""

from __future__ import annotations

import gc
import os
import re

# Before torch is imported: processes side by side would fight for the cores, and on a CPU the
# number of threads shows in the last bits, so that ours and the services' must be one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import threading
import time
from pathlib import Path

import psutil
import pytest
import torch


def held() -> dict[str, set[str]]:
    """What this process holds that could leak: children, threads, sockets, shared memory."""
    descriptors = Path("/proc/self/fd")
    links = {os.readlink(fd) for fd in descriptors.iterdir() if fd.is_symlink()}
    return {
        "processes": {str(child.pid) for child in psutil.Process().children(recursive=True)},
        # tqdm's own, which transformers starts and nobody can end.
        "threads": {thread.name for thread in threading.enumerate()} - {"tqdm_monitor"},
        "descriptors": {link for link in links if link.startswith(("socket:", "/memfd:luna"))},
        "shared memory": set(filter(is_ours, os.listdir("/dev/shm"))),
    }


def is_ours(file: str) -> bool:
    """Not those of other programs that run beside the tests.

    Nor the CUDA driver's, of clients that tests killed, which are not ours to remove.
    """
    creator = re.match(r"torch_(\d+)_", file)
    if creator is None or not psutil.pid_exists(int(creator[1])):
        return not file.startswith("cuda.shm")
    family = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    return int(creator[1]) in family


def left_over(before: dict[str, set[str]]) -> dict[str, set[str]]:
    return {kind: more for kind, now in held().items() if (more := now - before[kind])}


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind():
    if not os.path.isdir("/proc/self/fd"):
        yield
        return
    # The CUDA driver opens a socket of its own when it is first asked anything.
    torch.cuda.is_available()
    before = held()
    yield
    end = time.monotonic() + 10
    while (left := left_over(before)) and time.monotonic() < end:
        # ComfyUI's objects refer to each other in circles
        gc.collect()
        time.sleep(0.05)
    assert not left, "the tests left something behind"


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory):
    """The demo models are made once for the whole run, and not in the user's own cache."""
    if "LUNA_MP_CACHE_DIR" not in os.environ:
        os.environ["LUNA_MP_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def runtime_dir(tmp_path_factory, monkeypatch):
    """A runtime directory of the test's own, short enough for sockets; clients find it."""
    path = tmp_path_factory.mktemp("run", numbered=True)
    path.chmod(0o700)
    monkeypatch.setenv("LUNA_MP_RUNTIME_DIR", str(path))
    monkeypatch.delenv("LUNA_MP_AUTHKEY", raising=False)
    return path


@pytest.fixture
def no_collector():
    """What refers to itself stays: only what nothing refers to is gone."""
    gc.disable()
    yield
    gc.enable()
