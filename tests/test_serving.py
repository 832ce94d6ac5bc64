"""Real services with real models: same bits, in order, and alive after whatever happens."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import ExitStack

import psutil
import pytest
import torch

import luna_mp
from luna_mp import errors
from luna_mp.models import ModelSpec, load_clip, load_vae
from luna_mp.models.demo import demo_folder, demo_image
from luna_mp.wire.layout import memory_of
from tests.clients import client, go
from tests.helpers import wait_until
from tests.same import assert_same

PROMPTS = ["a red fox, film grain", "", "word " * 10_000, "ünïcödé 狐 🦊", "x" * 100_000]


@pytest.fixture(scope="module")
def services(tmp_path_factory):
    folder = tmp_path_factory.mktemp("services")
    folder.chmod(0o700)
    models = tmp_path_factory.mktemp("models")
    options = {"runtime_dir": str(folder), "allow": (str(models), str(demo_folder()))}
    with luna_mp.serve(clip="cpu", vae="cpu", log_level="WARNING", **options) as running:
        yield running


@pytest.fixture(params=["shm", "inline"])
def luna(services, request):
    options = {}
    if request.param == "inline":
        options = {role: f"127.0.0.1:{ready['port']}" for role, ready in services.ready.items()}
    with services.connect(**options) as connected:
        assert connected.carriers == {"clip": request.param, "vae": request.param}
        yield connected


@pytest.fixture(scope="module")
def vae():
    return load_vae(ModelSpec(), "cpu")


@pytest.fixture(scope="module")
def clip():
    return load_clip(ModelSpec(), "cpu")


@torch.inference_mode()
def test_image_is_encoded_and_decoded_to_the_same_bits(luna, vae):
    latent = luna.vae.encode(demo_image())
    assert_same(latent, vae.encode(demo_image()))
    assert_same(luna.vae.decode(latent), vae.decode(latent))


@torch.inference_mode()
@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (1, 4, 33, 17)])
def test_decode_has_the_same_bits(luna, vae, shape, tiled):
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = vae.decode_tiled(latent) if tiled else vae.decode(latent)
    assert_same(luna.vae.decode(latent, tiled=tiled), expected)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_latents_of_any_dtype_have_the_same_bits(luna, vae, dtype):
    latent = torch.randn(1, 4, 8, 8).to(dtype)
    assert_same(luna.vae.decode(latent), vae.decode(latent))


@torch.inference_mode()
def test_strides_of_the_input_count(luna, vae):
    latent = torch.randn(1, 4, 8, 8).to(memory_format=torch.channels_last)
    image = demo_image().movedim(-1, 1).contiguous().movedim(1, -1)
    assert_same(luna.vae.decode(latent), vae.decode(latent))
    assert_same(luna.vae.encode(image), vae.encode(image))


@torch.inference_mode()
@pytest.mark.parametrize("prompt", PROMPTS, ids=["plain", "empty", "long", "unicode", "one word"])
def test_prompt_has_the_same_bits(luna, clip, prompt):
    for _ in range(2):  # the second time it comes from the service's memory
        got, expected = luna.clip.encode(prompt), clip.encode(prompt)
        assert_same(got.cond, expected.cond)
        assert_same(got.pooled, expected.pooled)
        assert got.extras == expected.extras
    assert luna.clip.tokenize(prompt) == clip.tokenize(prompt)


@torch.inference_mode()
def test_a_model_loaded_later_has_the_same_bits(luna):
    path = demo_folder() / "vae"
    latent = torch.randn(1, 4, 8, 8)
    other = luna.vae.load(path, dtype="bfloat16")
    expected = load_vae(ModelSpec((str(path),), dtype="bfloat16"), "cpu").decode(latent)
    assert_same(other.decode(latent), expected)
    assert not torch.equal(luna.vae.decode(latent), expected)
    if luna.carriers["vae"] == "shm":
        assert other.unload()
        assert not other.unload()


def test_results_are_writable_and_private(luna):
    latent = torch.zeros(1, 4, 8, 8)
    first = luna.vae.decode(latent)
    kept = first.clone()
    first.zero_()
    assert_same(luna.vae.decode(latent), kept)
    cond = luna.clip.encode("private").cond
    cond.zero_()
    assert luna.clip.encode("private").cond.any()


@pytest.mark.parametrize(
    ("latent", "message"),
    [
        (torch.zeros(4, 8, 8), r"shape \[4, 8, 8\]; this VAE takes 4 dimensions"),
        (torch.zeros(1, 5, 8, 8), r"shape \[1, 5, 8, 8\].* 4 channels"),
        (torch.zeros(1, 4, 8, 8, dtype=torch.int64), "torch.int64; it takes float16"),
        (torch.zeros(0, 4, 8, 8), "is empty"),
        ([1.0], "a list; it takes a tensor"),
    ],
    ids=["rank", "channels", "dtype", "empty", "list"],
)
def test_bad_latent_is_refused_with_the_value_and_the_limit(luna, latent, message):
    with pytest.raises(errors.Rejected, match=message):
        luna.vae.decode(latent)
    assert luna.vae.decode(torch.zeros(1, 4, 1, 1)).shape == (1, 8, 8, 3)


@torch.inference_mode()
def test_nan_gives_what_the_model_gives(luna, vae):
    latent = torch.full((1, 4, 4, 4), float("nan"))
    assert_same(luna.vae.decode(latent), vae.decode(latent))


@pytest.mark.parametrize("name", ["missing.safetensors", "text.safetensors", "../../etc/passwd"])
def test_what_is_no_model_is_refused(luna, services, tmp_path_factory, name):
    folder = next(tmp_path_factory.getbasetemp().glob("models*"))
    (folder / "text.safetensors").write_text("not a model")
    with pytest.raises(errors.BadModel, match=name.split("/")[-1]):
        luna.vae.load(folder / name)


def test_eight_processes_are_served_one_at_a_time_in_order(services, monkeypatch):
    monkeypatch.setenv("LUNA_MP_RUNTIME_DIR", str(services._config.services[0].runtime_dir))
    processes, calls = 8, 20
    with services.connect() as luna:
        before = luna.status("vae")["queue"]["methods"].get("decode", {"calls": 0})["calls"]
        with ExitStack() as stack:
            clients = [stack.enter_context(client("decode_many", calls)) for _ in range(processes)]
            assert [process.wait(100) for process in clients] == [0] * processes
        queue = luna.status("vae")["queue"]
    assert queue["methods"]["decode"]["calls"] - before == processes * calls
    ran = sorted(queue["recent"][-processes * calls :], key=lambda ticket: ticket["started"])
    assert len({ticket["client"] for ticket in ran}) == processes
    arrivals = [ticket["arrived"] for ticket in ran]
    assert arrivals == sorted(arrivals)
    for earlier, later in zip(ran, ran[1:], strict=False):
        assert earlier["finished"] <= later["started"]


def test_status_tells_who_is_served_and_how(services, luna):
    luna.vae.decode(torch.zeros(1, 4, 1, 1))
    status = luna.status("vae")
    [mine] = [each for each in status["clients"] if each["pid"] == os.getpid()]
    assert mine["carrier"] == luna.carriers["vae"]
    assert mine["calls"] >= 1
    assert status["vae"]["spatial_ratio"] == 8
    assert status["queue"]["depth"] == 0


def test_a_remote_client_cannot_stop_the_service(services, luna):
    if luna.carriers["vae"] == "shm":
        pytest.skip("a local client may")
    with pytest.raises(errors.Rejected, match="'stop' is not a call"):
        luna.stop("vae")


def test_waiting_call_of_a_killed_client_never_runs(services, monkeypatch):
    monkeypatch.setenv("LUNA_MP_RUNTIME_DIR", str(services._config.services[0].runtime_dir))
    with services.connect() as luna, client("decode_slowly") as first:
        with client("decode_slowly") as second:
            go(first)
            wait_until(lambda: len(luna.status("vae")["queue"]["line"]) == 1)
            dropped = luna.status("vae")["queue"]["dropped"]
            go(second)
            wait_until(lambda: len(luna.status("vae")["queue"]["line"]) == 2)
            second.kill()
            wait_until(lambda: luna.status("vae")["queue"]["dropped"] == dropped + 1)
        first.wait(60)
        assert first.returncode == 0


def test_call_that_is_given_up_in_the_queue_never_runs(services, monkeypatch):
    monkeypatch.setenv("LUNA_MP_RUNTIME_DIR", str(services._config.services[0].runtime_dir))
    with services.connect() as luna, client("decode_slowly") as first:
        go(first)
        wait_until(lambda: len(luna.status("vae")["queue"]["line"]) == 1)
        dropped = luna.status("vae")["queue"]["dropped"]
        with pytest.raises(errors.TimedOut, match=r"vae.decode took longer than 0.1 s"):
            luna.vae.decode(torch.zeros(1, 4, 1, 1), timeout=0.1)
        wait_until(lambda: luna.status("vae")["queue"]["dropped"] == dropped + 1)
        first.wait(60)


def kill(pid: int) -> None:
    """Kill, and wait until the process has let go of its sockets."""
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie")


@pytest.fixture
def own(runtime_dir):
    """Services that a test may kill."""
    with luna_mp.serve(clip="cpu", vae="cpu", log_level="ERROR", runtime_dir=runtime_dir) as own:
        yield own


def test_client_goes_on_after_its_service_was_killed(own):
    with own.connect() as luna:
        before = luna.vae.decode(torch.zeros(1, 4, 4, 4))
        kill(own.ready["vae"]["pid"])
        after = luna.vae.decode(torch.zeros(1, 4, 4, 4))
        assert_same(after, before)


def test_waiting_call_fails_at_once_when_the_service_is_killed(own):
    failures = []

    def decode():
        try:
            luna.vae.decode(torch.zeros(4, 4, 64, 64))
        except errors.LunaError as exc:
            failures.append(exc)

    with own.connect() as luna:
        thread = threading.Thread(target=decode)
        thread.start()
        wait_until(lambda: len(luna.status("vae")["queue"]["line"]) == 1)
        os.kill(own.ready["vae"]["pid"], signal.SIGKILL)
        thread.join(1.0)
        assert not thread.is_alive()
    assert isinstance(failures[0], errors.Broken)
    assert "the vae service was lost during decode" in str(failures[0])


def test_killed_client_leaves_nothing_in_the_service(own):
    service = psutil.Process(own.ready["vae"]["pid"])
    with own.connect() as luna:
        luna.vae.decode(torch.zeros(1, 4, 32, 32))
        before = (service.num_fds(), service.num_threads())
        for _ in range(5):
            with client("hold") as process:
                assert process.stdout is not None
                assert process.stdout.readline().startswith("holding")
                process.kill()
        wait_until(lambda: len(luna.status("vae")["clients"]) == 1)
        wait_until(lambda: (service.num_fds(), service.num_threads()) <= before)


def test_tensors_outlive_the_service(own):
    with own.connect() as luna:
        image = luna.vae.decode(torch.zeros(1, 4, 32, 32))
        kept = image.clone()
        own.stop()
    assert_same(image, kept)
    assert bytes(memory_of(image, 16))


def test_services_end_with_their_owner(own):
    pids = [ready["pid"] for ready in own.ready.values()]
    own.stop()
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_asking_a_service_to_stop_ends_both(own, runtime_dir):
    with own.connect() as luna:
        luna.stop("vae")
    wait_until(lambda: not own._thread.is_alive())
    own.stop()
    assert sorted(path.name for path in runtime_dir.iterdir()) == ["authkey"]


def test_connect_says_how_to_start_a_service(runtime_dir):
    with pytest.raises(errors.Unavailable, match="luna-mp serve"):
        luna_mp.connect()


def test_boot_failure_says_why(runtime_dir, tmp_path):
    (tmp_path / "model.safetensors").write_text("not a model")
    with pytest.raises(errors.BootFailed, match=r"the vae service did not start: .*model.safet"):
        luna_mp.serve(vae="cpu", vae_models=str(tmp_path / "model.safetensors"))


def test_taken_port_is_told(own):
    port = own.ready["vae"]["port"]
    with pytest.raises(errors.BootFailed, match=f"127.0.0.1:{port}: Address already in use"):
        luna_mp.serve(vae="cpu", vae_port=port)


def test_device_that_is_not_there_is_told_with_those_that_are(runtime_dir):
    with pytest.raises(errors.BootFailed, match=r"device 'cuda:97' is not there; there are cpu"):
        luna_mp.serve(vae="cuda:97")
