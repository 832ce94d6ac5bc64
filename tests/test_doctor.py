"""What `luna-mp doctor` finds, by its lines, with services in processes of their own."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from importlib.util import find_spec

import pytest
import torch
from click.testing import CliRunner

import luna_mp
from luna_mp import doctor
from luna_mp.cli import main
from luna_mp.wire import handshake

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes, signals and scripts")


def run(*arguments: str):
    return CliRunner().invoke(main, ["doctor", *arguments])


def line(output: str, subject: str) -> str:
    """The only line about a subject."""
    (found,) = re.findall(rf"^(\w+ +{re.escape(subject)}: .*)$", output, re.MULTILINE)
    return found


@pytest.fixture
def vae(runtime_dir):
    with luna_mp.serve(vae="cpu", log_level="WARNING") as running:
        yield running.ready["vae"]


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a script in the place of the driver's own; what it is given is what it does."""

    def put(script: str) -> None:
        file = tmp_path / "nvidia-smi"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return put


def test_nothing_running_is_a_note_that_says_how_to_start(runtime_dir):
    result = run()
    assert result.exit_code == 0
    assert re.match("note .*`luna-mp serve`", line(result.output, "services"))


def test_no_key_is_made(runtime_dir):
    assert line(run().output, "authkey").startswith("note")
    assert list(runtime_dir.iterdir()) == []


def test_service_says_its_carrier_and_why_it_is_no_faster_one(vae):
    result = run()
    assert result.exit_code == 0
    assert re.fullmatch("note +vae: shm, because cuda: .+", line(result.output, "vae"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this process has a GPU")
def test_reason_for_a_client_without_a_gpu_is_the_clients_own(vae):
    output = run().output
    _, _, why = line(output, "gpu").partition("none, because ")
    assert line(output, "vae").endswith(f"cuda: {why}")


def test_service_that_does_not_answer_is_a_problem(vae, monkeypatch):
    monkeypatch.setattr(handshake, "SECONDS", 0.2)
    os.kill(vae["pid"], signal.SIGSTOP)
    try:
        result = run()
    finally:
        os.kill(vae["pid"], signal.SIGCONT)
    assert result.exit_code == 1
    assert re.match("problem .* took longer than 0.2 s$", line(result.output, "vae"))


def test_json_says_the_same(vae):
    report = json.loads(run("--json").output)
    (found,) = [finding for finding in report["findings"] if finding["subject"] == "vae"]
    assert report["ok"] and found["mark"] == "note"
    assert found["data"]["carrier"] == "shm" and found["data"]["address"] == vae["socket"]
    assert f"shm, because {found['data']['reason']}" == found["text"]


def test_directory_that_others_can_enter_is_a_problem(runtime_dir):
    runtime_dir.chmod(0o755)
    result = run()
    assert result.exit_code == 1
    assert re.match("problem .*chmod 700", line(result.output, "runtime directory"))


def test_key_that_others_can_read_is_a_problem(runtime_dir):
    key = runtime_dir / "authkey"
    key.write_text("0" * 64)
    key.chmod(0o644)
    result = run()
    assert result.exit_code == 1
    assert re.match("problem .*chmod 600", line(result.output, "authkey"))


def test_key_is_shown_by_place_and_mode_only(runtime_dir):
    key = runtime_dir / "authkey"
    key.write_text("5ec2e7" * 11)
    key.chmod(0o600)
    output = run().output
    assert line(output, "authkey").endswith(f"{key}, mode 0600")
    assert "5ec2e7" not in output


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_allocator_is_what_the_environment_asks_for(runtime_dir, monkeypatch, name):
    for other in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "max_split_size_mb:64, backend:cudaMallocAsync")
    assert "allocator: cudaMallocAsync," in line(run().output, "allocator")


@pytest.mark.skipif(find_spec("cuda") is not None, reason="cuda-bindings are installed")
def test_missing_bindings_are_a_note_that_says_what_to_install(runtime_dir):
    found = line(run().output, "cuda-bindings")
    assert found.startswith("note") and found.endswith("pip install cuda-bindings")


def test_driver_is_what_nvidia_smi_says(runtime_dir, nvidia_smi):
    nvidia_smi("echo 'GPU-1, 1000, 580.159.04'; echo 'GPU-2, [N/A], 580.159.04'")
    assert line(run().output, "driver").endswith("driver: 580.159.04, 2 GPU(s)")


def test_driver_that_fails_is_a_note_with_its_words(runtime_dir, nvidia_smi):
    nvidia_smi("echo 'Driver/library version mismatch'; exit 18")
    assert re.match("note .*'Driver/library version mismatch'", line(run().output, "driver"))


def test_driver_that_hangs_is_given_up(runtime_dir, nvidia_smi, monkeypatch):
    monkeypatch.setattr(doctor, "SMI_SECONDS", 0.1)
    nvidia_smi("exec sleep 60")
    assert re.match("note .* timed out after 0.1 seconds", line(run().output, "driver"))


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="this system has no /dev/shm")
@pytest.mark.parametrize(("limit", "mark"), [(0, "ok"), (1 << 60, "note")])
def test_small_shared_memory_is_a_note(runtime_dir, monkeypatch, limit, mark):
    monkeypatch.setattr(doctor, "SMALL_SHM", limit)
    assert line(run().output, "/dev/shm").startswith(mark)
