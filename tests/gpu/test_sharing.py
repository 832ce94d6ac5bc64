"""One GPU, several processes: right values under every allocator, and memory that comes back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psutil
import pytest
import torch

import luna_mp
from luna_mp import errors
from luna_mp.models import ModelSpec, load_vae
from luna_mp.wire import cuda_client
from luna_mp.wire.leases import IDLE_SECONDS
from tests.gpu import clients
from tests.gpu.clients import EDGE
from tests.gpu.exporting import CYCLES
from tests.helpers import wait_until
from tests.same import assert_same

pytestmark = pytest.mark.gpu

ALLOCATORS = {
    "native": "backend:native",
    "expandable": "expandable_segments:True",
    "async": "backend:cudaMallocAsync",
    "no bindings": "backend:native",
    "async, no bindings": "backend:cudaMallocAsync",
}
SHARING = [name for name in ALLOCATORS if name != "async, no bindings"]
ROUNDS = 3
SLACK = 128 << 20  # bytes, of the gigabytes that a service takes, for what is cached elsewhere
WITHOUT_BINDINGS = """
import runpy, sys
sys.modules["cuda.bindings"] = None
runpy.run_module("tests.gpu.clients", run_name="__main__")
"""


@contextmanager
def client(name, *arguments, allocator="native"):
    """A job of tests/gpu/clients.py in a process of its own, under an allocator.

    With "no bindings" torch's import is all there is.
    """
    conf = ALLOCATORS[allocator]
    env = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": conf, "PYTORCH_ALLOC_CONF": conf}
    how = ["-c", WITHOUT_BINDINGS] if "no bindings" in allocator else ["-m", "tests.gpu.clients"]
    command = [sys.executable, *how, name, *map(str, arguments)]
    with subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process):
    line = process.stdout.readline()
    assert line, f"the client ended with status {process.wait()}"
    return json.loads(line)


@pytest.fixture
def vae(vae_folder):
    with torch.inference_mode():
        yield load_vae(ModelSpec((str(vae_folder),), dtype="float16"), "cuda:0")


@torch.inference_mode()
@pytest.mark.parametrize("edge", [EDGE, 2 * EDGE], ids=["copied here", "copied there"])
@pytest.mark.parametrize("allocator", SHARING)
def test_every_allocator_sends_and_receives_the_right_values(service, vae, allocator, edge):
    """`edge`: the image is small, or large enough for the service to bring it to the host."""
    expected = {}
    for sent in ("cpu", "cuda"):
        for wanted in ("gpu", "cpu"):
            image = vae.decode(clients.latent(sent, edge))
            again = vae.encode(image)
            both = [image, again, vae.decode(again), vae.decode(again[:, :, 8:24, 8:24])]
            device = {"gpu": "cuda:0", "cpu": "cpu"}[wanted]
            expected[f"{sent} to {wanted}"] = [
                [device if i == 0 else "cuda:0", clients.bits(t)] for i, t in enumerate(both)
            ]
    with client("matrix", ROUNDS, edge, allocator=allocator) as process:
        got = said(process)
    assert got["carriers"] == {"vae": "cuda"}, got["reasons"]
    # The image, if it is on the GPU, and its latent and a view of that: of tensors sent twice.
    assert got["by_name"] == ROUNDS * 2 * (3 + 2)
    assert got["backend"] == ("cudaMallocAsync" if allocator == "async" else "native")
    assert got["results"] == expected


def test_a_client_that_cannot_open_memory_says_what_is_missing(service):
    with client("elsewhere", "cuda:0", allocator="async, no bindings") as process:
        got = said(process)
    assert got["carriers"] == {"vae": "shm"}
    assert "pip install cuda-bindings" in got["reasons"]["vae"]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("edge", [64, 128, 192, 256])
def test_decode_and_encode_have_the_same_bits(service, vae_folder, edge, dtype):
    local = load_vae(ModelSpec((str(vae_folder),), dtype=dtype), "cuda:0")
    latent = clients.latent(edge=edge)
    with service.connect() as luna:
        served = luna.vae.load(vae_folder, dtype=dtype) if dtype != "float16" else luna.vae
        image = served.decode(latent)
        expected = local.decode(latent)
        assert_same(image, expected)
        assert_same(served.encode(image), local.encode(expected))


@torch.inference_mode()
@pytest.mark.parametrize("by", ["shm", "inline"])
def test_clients_that_share_no_gpu_get_the_same_bits_on_the_cpu(service, vae, by):
    address = {"vae": f"127.0.0.1:{service.ready['vae']['port']}"} if by == "inline" else {}
    with service.connect(gpu=False, **address) as luna:
        assert luna.carriers["vae"] == by
        for edge in (8, 32, 128):
            latent = clients.latent(edge=edge)
            assert_same(luna.vae.decode(latent), vae.decode(latent).cpu())


@torch.inference_mode()
def test_results_on_the_host_are_there_when_each_call_returns(service, vae):
    latents = [factor * clients.latent(edge=64) for factor in (1.0, 0.5, 0.25)]
    expected = [vae.decode(latent).cpu() for latent in latents]
    with service.connect() as luna:
        # One is dropped before the next comes, so it lies where another one lay.
        for latent, image in 4 * list(zip(latents, expected, strict=True)):
            got = luna.vae.decode(latent, device="cpu")
            assert_same(got, image)
            # the service's copy: one that is made here is pinned
            assert not got.is_pinned()


@torch.inference_mode()
def test_results_on_the_host_may_be_dropped_while_they_are_sent_to_the_gpu(service, vae):
    latents = [factor * clients.latent(edge=64) for factor in (1.0, 0.5)]
    expected = [vae.decode(latent) for latent in latents]
    with service.connect() as luna:
        luna.vae.decode(latents[0], device="cpu")
        torch.cuda._sleep(CYCLES)
        sent = []
        for latent in latents:
            image = luna.vae.decode(latent, device="cpu")
            sent.append(image.to("cuda", non_blocking=True))
            del image
    for got, right in zip(sent, expected, strict=True):
        assert_same(got, right)


@torch.inference_mode()
@pytest.mark.parametrize(("edge", "count"), [(8, 70), (48, 70), (304, 2)])
def test_results_on_the_host_may_be_many_small_or_large(service, vae, edge, count):
    latent = clients.latent(edge=edge)
    with service.connect() as luna:
        held = [luna.vae.decode(latent, device="cpu") for _ in range(count)]
    expected = vae.decode(latent).cpu()
    for got in held:
        assert_same(got, expected)


def test_killed_client_gives_its_gigabyte_back(service):
    with service.connect() as luna:
        luna.vae.decode(clients.latent(edge=128))
        wait_until(lambda: luna.status("vae")["leases"] == {})
        before = luna.status("vae")["memory"]["allocated"]
        with client("hold", 1024) as process:
            assert said(process)["carrier"] == "cuda"
            held = luna.status("vae")["memory"]["allocated"] - before
            assert held >= 1 << 30
            os.kill(process.pid, signal.SIGKILL)
            # Within a second of the process's end, which itself takes the driver a while.
            wait_until(lambda: not is_alive(process.pid))
            wait_until(lambda: luna.status("vae")["memory"]["allocated"] <= before, 1.0)


@pytest.mark.parametrize("allocator", ["native", "async"])
def test_dropped_results_come_back(service, allocator):
    with service.connect() as luna:
        with client("matrix", 20, allocator=allocator) as process:
            said(process)
            wait_until(lambda: luna.status("vae")["leases"] == {})


def test_client_that_disconnects_keeps_right_values(service):
    with service.connect() as luna:
        image = luna.vae.decode(clients.latent())
        kept = image.clone()
    with service.connect() as other:
        for edge in (16, 32, 32, 64):
            other.vae.decode(clients.latent(edge=edge))
        assert torch.equal(image, kept)


def test_same_proxy_works_after_the_service_was_killed(own):
    with own.connect() as luna:
        before = luna.vae.decode(clients.latent()).clone()
        os.kill(own.ready["vae"]["pid"], signal.SIGKILL)
        # While the process ends, which takes the driver a while, calls are still lost.
        image = wait_until(lambda: decoded(luna), 60)
        assert torch.equal(image[0], before)
        assert luna.carriers == {"vae": "cuda"}


def test_results_of_a_service_that_was_killed_stay_right_and_keep_no_more_of_its_vram(own):
    with own.connect() as luna:
        image = luna.vae.decode(clients.latent())
        kept = image.clone()
        large = [luna.vae.decode(clients.latent(edge=128)) for _ in range(32)]
        size = sum(each.nbytes for each in large)
        free, _ = torch.cuda.mem_get_info()
        # Where they lay stays mapped for the next.
        del large
        os.kill(own.ready["vae"]["pid"], signal.SIGKILL)
        # The next service takes as much as this one did, but for those.
        again = wait_until(lambda: decoded(luna, edge=128), 60)[0]
        assert luna.carriers == {"vae": "cuda"}
        assert again.is_cuda
        assert torch.equal(image, kept)
        wait_until(lambda: torch.cuda.mem_get_info()[0] > free + size - SLACK)


def test_vram_of_a_dead_service_is_not_kept_by_its_clients(own):
    pid = own.ready["vae"]["pid"]
    with own.connect() as luna:
        image = luna.vae.decode(clients.latent(edge=128))
        del image
        free, _ = torch.cuda.mem_get_info()
        used = luna.status("vae")["memory"]["allocated"]
        own.stop()
        assert not is_alive(pid)
        wait_until(lambda: torch.cuda.mem_get_info()[0] >= free + used)


def test_greedy_client_waits_and_is_told_and_others_go_on(vae_folder, runtime_dir):
    share = 64 << 20
    options = {"vae_models": str(vae_folder), "vae_dtype": "float16", "log_level": "ERROR"}
    with luna_mp.serve(
        vae="cuda", runtime_dir=runtime_dir, vae_max_leased=share, **options
    ) as service:
        with client("asked") as other, service.connect() as luna, ThreadPoolExecutor() as threads:
            assert said(other) == {"carrier": "cuda"}
            held = []
            while sum(image.nbytes for image in held) < share:
                held.append(luna.vae.decode(clients.latent(edge=128)))
            waiting = threads.submit(luna.vae.decode, clients.latent(edge=128))
            for _ in range(3):
                other.stdin.write("decode\n")
                other.stdin.flush()
                assert said(other) == {"device": "cuda:0"}
            assert not waiting.done()
            assert luna.vae.decode(clients.latent(), device="cpu").device.type == "cpu"
            with pytest.raises(errors.OutOfMemory, match=f"its share is {share}"):
                waiting.result(60)
            leases = luna.vae.status()["leases"]
            assert leases[str(os.getpid())]["bytes"] == sum(image.nbytes for image in held)
            held.clear()
            assert luna.vae.decode(clients.latent()).is_cuda


def test_call_that_does_not_fit_is_told_and_the_next_works(own):
    with own.connect() as luna:
        image = luna.vae.decode(clients.latent()).cpu()
        free, _ = torch.cuda.mem_get_info()
        hog = torch.empty(free - (256 << 20), dtype=torch.uint8, device="cuda")
        with pytest.raises(errors.OutOfMemory, match="not even in tiles"):
            luna.vae.decode(clients.latent(edge=256))
        del hog
        torch.cuda.empty_cache()
        assert luna.vae.decode(clients.latent(edge=256)).is_cuda
        assert torch.equal(luna.vae.decode(clients.latent()).cpu(), image)
        assert luna.carriers == {"vae": "cuda"}


@torch.inference_mode()
def test_worker_that_stays_lets_go_of_memory_that_was_given_back(service, vae):
    """The card has it again; and what comes next is right."""
    with service.connect() as luna:
        for edge in (256, 128, 256):
            latent = clients.latent(edge=edge)
            image = luna.vae.decode(latent)
            assert_same(image, vae.decode(latent))
            size = image.nbytes
            # What this process caches is no part of the figures.
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info()
            del image
            wait_until(lambda free=free, size=size: torch.cuda.mem_get_info()[0] >= free + size)


@torch.inference_mode()
def test_worker_that_kept_memory_mapped_which_was_given_back_gets_right_results(
    service, vae, monkeypatch
):
    """As one that was stopped for a while."""
    monkeypatch.setattr(cuda_client, "REST_SECONDS", 3600.0)
    with service.connect() as luna:
        for number, edge in enumerate((128, 128, 64, 128)):
            latent = clients.latent(edge=edge) / (1 + number)
            assert_same(luna.vae.decode(latent), vae.decode(latent))
            wait_for_idle(luna)


@pytest.mark.parametrize("number", [0, 1])
def test_results_come_after_the_service_gave_its_memory_back(vae_folder, runtime_dir, number):
    if torch.cuda.device_count() <= number:
        pytest.skip("needs two GPUs")
    options = {"vae_models": str(vae_folder), "vae_dtype": "float16", "log_level": "ERROR"}
    device = f"cuda:{number}"
    with luna_mp.serve(vae=device, runtime_dir=runtime_dir, **options) as service:
        found = []
        with service.connect(gpu=False) as watch:
            for _ in range(2):
                with client("elsewhere", device) as process:
                    found.append(said(process))
                wait_for_idle(watch)
    assert [each["carriers"] for each in found] == [{"vae": "cuda"}] * 2, found
    assert found[0]["bits"] == found[1]["bits"]


def wait_for_idle(luna):
    """Until the service has given the memory of its results back to the card."""
    wait_until(lambda: luna.status("vae")["leases"] == {})
    idle = luna.status("vae")["uptime"] + IDLE_SECONDS + 1
    wait_until(lambda: luna.status("vae")["uptime"] > idle)


def decoded(luna, edge=EDGE):
    try:
        return [luna.vae.decode(clients.latent(edge=edge))]
    except errors.Broken:
        return None


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
