"""What happens to a call: interrupts, progress, lack of memory, a service that dies."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import luna_mp
from luna_mp.endpoint import Endpoint
from luna_mp.errors import LunaError, OutOfMemory, Rejected
from tests.clients import client, go
from tests.comfyui import services, vae_makers, vae_services
from tests.helpers import wait_until
from tests.same import assert_same

comfy = services.comfy
folder = services.folder
inference = services.inference
serving = vae_services.serving
service = vae_services.service

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.usefixtures("inference"),
    pytest.mark.timeout(300),
]

#: one that takes several tiles of 64
WIDE = (1, 4, 34, 66)


@pytest.fixture
def vae(comfy, service):
    yield comfy.remote.load_vae(service)[0]
    comfy.management.interrupt_current_processing(False)


@pytest.fixture
def local(comfy, folder):
    return vae_makers.read(folder / "default.safetensors")


@pytest.fixture
def progress(comfy, monkeypatch):
    """Sets the hook that ComfyUI's own server sets; newer versions tell it of each step at most."""
    for limit in ("INTERVAL", "PERCENT"):
        monkeypatch.setattr(comfy.utils, f"PROGRESS_THROTTLE_MIN_{limit}", 0, raising=False)
    yield comfy.utils.set_progress_bar_global_hook
    comfy.utils.set_progress_bar_global_hook(None)


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def queue(service) -> dict:
    """What the service says of its line; asked on a connection of its own."""
    return service._endpoint.call("status", (), {}, 10.0)["queue"]


def ran(service) -> int:
    """Calls to networks that have run."""
    return queue(service)["methods"].get("comfyui_network", {"calls": 0})["calls"]


class Background(threading.Thread):
    """Runs `work` as a node would; `result` or `error` is what came of it, `ended` when."""

    def __init__(self, work) -> None:
        super().__init__()
        self._work = work
        self.result = self.error = None
        self.ended = 0.0

    def run(self) -> None:
        try:
            with torch.inference_mode():
                self.result = self._work()
        except BaseException as exc:  # an interrupt of ComfyUI's may be no Exception
            self.error = exc
        self.ended = time.monotonic()


@pytest.fixture
def busy(serving, service, monkeypatch):
    """The service is at a long call of another process."""
    monkeypatch.setenv("LUNA_MP_RUNTIME_DIR", serving._config.services[0].runtime_dir)
    with client("decode_slowly") as other:
        go(other)
        wait_until(lambda: len(queue(service)["line"]) == 1, 30.0)
        yield other
    wait_until(lambda: not queue(service)["line"], 60.0)


def test_interrupt_ends_a_waiting_call_and_withdraws_it(comfy, service, vae, busy):
    dropped = queue(service)["dropped"]
    waiting = Background(lambda: vae.decode(noise(1, 4, 8, 8)))
    waiting.start()
    wait_until(lambda: len(queue(service)["line"]) == 2)
    start = time.monotonic()
    comfy.management.interrupt_current_processing(True)
    waiting.join(10.0)
    assert isinstance(waiting.error, comfy.management.InterruptProcessingException)
    assert waiting.ended - start < 1.0
    wait_until(lambda: queue(service)["dropped"] == dropped + 1)
    assert not comfy.management.processing_interrupted()
    assert busy.poll() is None


def test_after_an_interrupt_the_next_call_is_served(comfy, vae, local):
    comfy.management.interrupt_current_processing(True)
    with pytest.raises(comfy.management.InterruptProcessingException):
        vae.decode(noise(1, 4, 8, 8))
    assert_same(vae.decode(noise(1, 4, 8, 8)), local.decode(noise(1, 4, 8, 8)))


def test_progress_is_told_for_each_tile(progress, vae, local):
    told = {}
    for name, each in (("local", local), ("remote", vae)):
        steps = told[name] = []
        progress(lambda value, total, *_, steps=steps, **__: steps.append((value, total)))
        each.decode_tiled(noise(1, 4, 16, 16), tile_x=8, tile_y=8, overlap=2)
    assert told["remote"] == told["local"]
    assert len(told["remote"]) == told["remote"][-1][1] > 10


def test_interrupt_ends_a_tiled_decode_between_two_tiles(comfy, service, progress, vae):
    def interrupt(value, *_, **__):
        if value == 2:
            comfy.management.interrupt_current_processing(True)

    before = ran(service)
    progress(interrupt)
    with pytest.raises(comfy.management.InterruptProcessingException):
        vae.decode_tiled(noise(1, 4, 16, 16), tile_x=8, tile_y=8, overlap=2)
    assert ran(service) == before + 2


class Small(Endpoint):
    """Of a service without memory for anything as large as `too_large`."""

    too_large: tuple[int, ...] = ()
    refused = 0

    def call(self, method, args, *more, **options):
        if method == "comfyui_network" and tuple(args[1].shape[2:]) == self.too_large:
            self.refused += 1
            raise OutOfMemory("it does not fit")
        return super().call(method, args, *more, **options)


@pytest.fixture
def small(comfy, serving):
    """A VAE in a service that has no memory for whole pictures, and its connection."""
    endpoint = services.connected(serving, Small)
    yield comfy.remote.load_vae(comfy.Service(endpoint, "the small service"))[0], endpoint
    endpoint.close()


def test_lack_of_memory_is_comfyuis_own_error(comfy, small):
    vae, endpoint = small
    endpoint.too_large = (8, 8)
    with pytest.raises(comfy.management.OOM_EXCEPTION, match="it does not fit"):
        vae.first_stage_model.decode(noise(1, 4, 8, 8))
    # once more after this process's cache was emptied
    assert endpoint.refused == 2


def test_picture_that_does_not_fit_is_decoded_in_tiles(small, local):
    vae, endpoint = small
    endpoint.too_large = WIDE[2:]
    assert_same(vae.decode(noise(*WIDE)), local.decode_tiled(noise(*WIDE)))
    assert endpoint.refused


def test_picture_that_does_not_fit_is_encoded_in_tiles(small, local):
    vae, endpoint = small
    pixels = noise(1, 264, 520, 3).sigmoid()
    endpoint.too_large = (264, 520)
    assert_same(vae.encode(pixels), local.encode_tiled(pixels))
    assert endpoint.refused


def test_killed_service_is_told_and_found_again(serving, service, vae):
    before = vae.decode(noise(1, 4, 8, 8))
    lost = Background(lambda: vae.decode(noise(4, 4, 64, 64)))
    lost.start()
    wait_until(lambda: len(queue(service)["line"]) == 1)
    os.kill(serving.ready["vae"]["pid"], signal.SIGKILL)
    lost.join(10.0)
    assert isinstance(lost.error, LunaError)
    assert "the vae service was lost during comfyui_network" in str(lost.error)
    assert_same(vae.decode(noise(1, 4, 8, 8)), before)


def test_file_that_changed_is_told_until_it_is_loaded_again(comfy, folder, service):
    path = vae_makers.write("taesd", folder / "changing.safetensors", seed=1)
    vae, _ = comfy.remote.load_vae(service, [str(path)])
    first = vae.decode(noise(1, 4, 8, 8))
    vae_makers.write("taesd", folder / "next.safetensors", seed=2).replace(path)
    with pytest.raises(Rejected, match=r"changing\.safetensors changed since it was loaded: run"):
        vae.decode(noise(1, 4, 8, 8))
    again, _ = comfy.remote.load_vae(service, [str(path)])
    second = again.decode(noise(1, 4, 8, 8))
    assert_same(second, vae_makers.read(path).decode(noise(1, 4, 8, 8)))
    assert not torch.equal(second, first)


def test_file_that_is_gone_is_told(comfy, folder, service):
    path = folder / "leaving.safetensors"
    shutil.copy(folder / "default.safetensors", path)
    vae, _ = comfy.remote.load_vae(service, [str(path)])
    path.unlink()
    with pytest.raises(Rejected, match=r"leaving\.safetensors' is not there"):
        vae.decode(noise(1, 4, 8, 8))


def test_file_outside_the_allowed_folders_is_refused(comfy, folder, service, tmp_path):
    path = shutil.copy(folder / "default.safetensors", tmp_path / "other.safetensors")
    with pytest.raises(Rejected, match="outside the directories"):
        comfy.remote.load_vae(service, [str(path)])


def test_copy_is_the_same_vae(vae):
    """Nodes copy deeply what holds a VAE; there is nothing in it to copy."""
    assert copy.deepcopy({"vae": vae})["vae"] is vae
    assert copy.deepcopy(vae.first_stage_model) is vae.first_stage_model


def test_model_with_the_vae_in_its_options_can_be_cloned(comfy, vae, local):
    model = local.patcher
    model.model_options["vae"] = vae
    held = model.clone().model_options["vae"]
    assert_same(held.decode(noise(1, 4, 8, 8)), local.decode(noise(1, 4, 8, 8)))


def test_patcher_of_the_vae_can_be_cloned(vae):
    clone = vae.patcher.clone()
    assert clone.model is vae.first_stage_model
    assert clone.clone_has_same_weights(vae.patcher)


@pytest.mark.parametrize(
    "work",
    [
        lambda vae: vae.get_sd(),
        lambda vae: vae.first_stage_model.load_state_dict({}),
        lambda vae: vae.first_stage_model.taesd_decoder(torch.zeros(1, 4, 8, 8)),
    ],
    ids=["save", "load", "run"],
)
def test_what_needs_the_weights_here_is_refused(vae, work):
    with pytest.raises(Rejected, match="load the model with mode 'local'"):
        work(vae)


def test_results_are_writable_and_private(vae):
    latent = noise(1, 4, 8, 8)
    first = vae.decode(latent)
    kept = first.clone()
    first.zero_()
    assert_same(vae.decode(latent), kept)
    found = vae.encode(kept)
    kept_latent = found.clone()
    found.fill_(1.0)
    assert_same(vae.encode(kept), kept_latent)


def test_what_is_given_stays_as_it_is(vae):
    latent, pixels = noise(1, 4, 8, 8), noise(1, 64, 64, 3).sigmoid()
    vae.decode(latent)
    vae.encode(pixels)
    assert torch.equal(latent, noise(1, 4, 8, 8))
    assert torch.equal(pixels, noise(1, 64, 64, 3).sigmoid())


def test_failure_in_the_service_is_told_with_its_reason(vae):
    with pytest.raises(LunaError, match="channels"):
        vae.decode(noise(1, 5, 8, 8))
    assert vae.decode(noise(1, 4, 8, 8)).shape == (1, 64, 64, 3)


def test_service_without_comfyui_says_how_to_start_one(comfy, runtime_dir):
    try:
        import diffusers.models.autoencoders.autoencoder_kl  # noqa: F401
    except (ImportError, RuntimeError) as exc:  # RuntimeError: what it needs itself is broken
        pytest.skip(f"the demo models need diffusers: {exc}")
    with luna_mp.serve(clip="cpu", log_level="ERROR", runtime_dir=str(runtime_dir)) as plain:
        endpoint = services.connected(plain, role="clip")
        try:
            with pytest.raises(Rejected, match="luna-mp serve --comfyui DIR"):
                comfy.remote.load_clip(comfy.Service(endpoint, "plain"))
        finally:
            endpoint.close()


@pytest.mark.parametrize("clients", [1, 3], ids=["one client", "three clients"])
def test_threads_at_once_get_each_its_own_result(comfy, serving, local, clients):
    endpoints = [services.connected(serving) for _ in range(clients)]
    vaes = [comfy.remote.load_vae(comfy.Service(e, f"{e.role}"))[0] for e in endpoints]

    def decode(seed: int) -> torch.Tensor:
        with torch.inference_mode():
            return vaes[seed % clients].decode(noise(1, 4, 8, 8, seed=seed))

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(decode, range(24)))
    for endpoint in endpoints:
        endpoint.close()
    for seed, picture in enumerate(found):
        assert_same(picture, local.decode(noise(1, 4, 8, 8, seed=seed)))
