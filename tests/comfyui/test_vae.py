"""ComfyUI's own VAE nodes give the same with a VAE whose weights are in a service."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import pytest
import torch

from tests.comfyui import services, vae_makers, vae_services
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

PICTURES = ["taesd", "sd1", "flux"]
#: families that get the shortest test
OTHERS = ["upscaler", "svd", "stage_a", "hunyuan", "cosmos"]
VIDEOS = ["wan", "ltxv"]
SOUNDS = ["audio"]
READ_BY_NODES = (
    "downscale_ratio",
    "upscale_ratio",
    "latent_channels",
    "latent_dim",
    "output_channels",
    "downscale_index_formula",
    "upscale_index_formula",
    "extra_1d_channel",
    "crop_input",
    "not_video",
    "working_dtypes",
    "disable_offload",
    "vae_dtype",
    "output_device",
    "device",
)


class Pair(NamedTuple):
    """One file loaded here, and the same file loaded by the service."""

    family: str
    local: Any
    remote: Any

    def run(self, work) -> tuple[Any, Any]:
        """What `work` makes of either VAE, each from the same random state; it ends the same."""
        results = []
        states = []
        for vae in (self.local, self.remote):
            torch.manual_seed(11)
            results.append(work(vae))
            states.append(torch.get_rng_state())
        assert torch.equal(*states)
        return results[0], results[1]

    def check(self, work) -> Any:
        """Assert that both give the same, bit for bit; returns one of them."""
        local, remote = self.run(work)
        assert bool(torch.isfinite(local).all()) and float(local.std()) > 0
        assert_same(remote, local)
        return remote


@pytest.fixture(scope="module")
def pair(request, comfy, folder, service):
    with torch.inference_mode():
        path = vae_makers.write(request.param, folder / f"{request.param}.safetensors")
        remote, warnings = comfy.remote.load_vae(service, [str(path)])
        assert not warnings
        yield Pair(request.param, vae_makers.read(path), remote)
    # some are large
    path.unlink()


def each(*families: list[str]):
    return pytest.mark.parametrize("pair", sum(families, []), indirect=True, scope="module")


def image(height: int, width: int, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(1))


def mask(height: int, width: int) -> torch.Tensor:
    found = torch.zeros(1, height, width)
    found[:, height // 4 : height // 2, width // 3 :] = 1
    return found


def latents(pair: Pair, batch: int = 1, size: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    return {"samples": vae_makers.latent(pair.family, batch, size)}


@each(PICTURES, VIDEOS, OTHERS)
def test_decoding_and_then_encoding_gives_the_same_bits(comfy, pair):
    picture = pair.check(lambda vae: comfy.nodes.VAEDecode().decode(vae, latents(pair))[0])
    pair.check(lambda vae: comfy.nodes.VAEEncode().encode(vae, picture)[0]["samples"])


@each(PICTURES)
def test_encoding_and_then_decoding_gives_the_same_bits(comfy, pair):
    found = pair.check(lambda vae: comfy.nodes.VAEEncode().encode(vae, image(64, 64))[0]["samples"])
    pair.check(lambda vae: comfy.nodes.VAEDecode().decode(vae, {"samples": found})[0])


@each(PICTURES)
def test_batch_gives_the_same_bits(comfy, pair):
    picture = pair.check(lambda vae: comfy.nodes.VAEDecode().decode(vae, latents(pair, 3))[0])
    assert len(picture) == 3
    pair.check(lambda vae: comfy.nodes.VAEEncode().encode(vae, picture)[0]["samples"])


@each(PICTURES)
def test_pixels_that_are_no_multiple_are_cropped_alike(comfy, pair):
    found = pair.check(lambda vae: comfy.nodes.VAEEncode().encode(vae, image(70, 77))[0]["samples"])
    pair.check(lambda vae: comfy.nodes.VAEDecode().decode(vae, {"samples": found})[0])


@each(PICTURES)
def test_picture_with_transparency_is_encoded_alike(comfy, pair):
    pixels = torch.cat([image(64, 64), image(64, 64)[..., :1]], dim=-1)
    pair.check(lambda vae: comfy.nodes.VAEEncode().encode(vae, pixels)[0]["samples"])


@each(PICTURES)
def test_layout_of_the_pixels_counts(comfy, pair):
    pixels = image(64, 64).movedim(-1, 1).contiguous().movedim(1, -1)
    pair.check(lambda vae: comfy.nodes.VAEEncode().encode(vae, pixels)[0]["samples"])


@each(PICTURES)
def test_decoding_in_tiles_gives_the_same_bits(comfy, pair):
    noise = latents(pair, size=(9, 10))
    picture = pair.check(lambda vae: comfy.nodes.VAEDecodeTiled().decode(vae, noise, 64, 16)[0])
    pair.check(lambda vae: comfy.nodes.VAEEncode().encode(vae, picture)[0]["samples"])


@each(PICTURES)
def test_encoding_in_tiles_gives_the_same_bits(comfy, pair):
    found = pair.check(
        lambda vae: comfy.nodes.VAEEncodeTiled().encode(vae, image(76, 84), 64, 16)[0]["samples"]
    )
    pair.check(lambda vae: comfy.nodes.VAEDecode().decode(vae, {"samples": found})[0])


@each(PICTURES)
@pytest.mark.parametrize("grown", [0, 6])
def test_encoding_for_inpaint_gives_the_same_bits(comfy, pair, grown):
    def encode(vae):
        node = comfy.nodes.VAEEncodeForInpaint()
        return node.encode(vae, image(70, 77), mask(70, 77), grown)[0]

    local, remote = pair.run(encode)
    assert_same(remote["samples"], local["samples"])
    assert_same(remote["noise_mask"], local["noise_mask"])


@each(PICTURES)
def test_conditioning_for_inpaint_gives_the_same_bits(comfy, pair):
    def encode(vae):
        positive = [[torch.zeros(1, 1, 1), {}]]
        node = comfy.nodes.InpaintModelConditioning()
        (found, *_) = node.encode(positive, positive, image(70, 77), vae, mask(70, 77))
        return found[0][1]["concat_latent_image"]

    pair.check(encode)


@each(VIDEOS)
def test_video_in_tiles_gives_the_same_bits(comfy, pair):
    noise = latents(pair, size=(3, 4, 5))["samples"]
    sizes = {"tile_x": 3, "tile_y": 3, "overlap": 1, "tile_t": 2, "overlap_t": 1}
    video = pair.check(lambda vae: vae.decode_tiled(noise, **sizes))[0]
    unit = pair.local.spacial_compression_encode()
    sizes = {"tile_x": 3 * unit, "tile_y": 3 * unit, "overlap": unit, "tile_t": 9, "overlap_t": 2}
    pair.check(lambda vae: vae.encode_tiled(video, **sizes))


@each(VIDEOS)
def test_video_node_in_tiles_gives_the_same_bits(comfy, pair):
    size = 2 * pair.local.spacial_compression_encode()
    sizes = {"tile_size": size, "overlap": 0, "temporal_size": 8, "temporal_overlap": 4}
    noise = latents(pair, size=(2, 4, 4))
    frames = pair.check(lambda vae: comfy.nodes.VAEDecodeTiled().decode(vae, noise, **sizes)[0])
    pair.check(lambda vae: comfy.nodes.VAEEncodeTiled().encode(vae, frames, **sizes)[0]["samples"])


@each(["wan"])
def test_one_picture_through_a_video_vae_gives_the_same_bits(comfy, pair):
    found = pair.check(lambda vae: comfy.nodes.VAEEncode().encode(vae, image(70, 77))[0]["samples"])
    assert found.ndim == 5
    pair.check(lambda vae: comfy.nodes.VAEDecode().decode(vae, {"samples": found})[0])


@each(["ltxv"])
def test_noise_that_a_decoder_draws_is_the_callers(pair):
    """Another random state gives another picture, and the state goes on from there."""
    noise = latents(pair)["samples"]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = pair.remote.decode(noise)
    assert not torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(pair.remote.decode(noise), first)
    torch.set_rng_state(before)
    assert_same(pair.remote.decode(noise), first)


@each(["ltxv"])
def test_options_of_a_decoder_go_along(pair):
    options = {"timestep": 0.3, "noise_scale": 0.5}
    if "timestep" not in inspect.signature(pair.local.first_stage_model.decode).parameters:
        pytest.skip("this ComfyUI's decoders take no options")
    noise = latents(pair)["samples"]
    plain = pair.check(lambda vae: vae.decode(noise))
    assert not torch.equal(pair.check(lambda vae: vae.decode(noise, options)), plain)


@each(["ltxv", "taesd"])
def test_random_state_travels_again_only_where_a_network_draws(pair, monkeypatch):
    sent = []
    model = type(pair.remote.first_stage_model.remote)
    call = model.call

    def noted(self, method, *args, **options):
        sent.append(args[3] is not None)
        return call(self, method, *args, **options)

    monkeypatch.setattr(model, "call", noted)
    pair.remote.first_stage_model.calm.clear()
    for _ in range(2):
        pair.remote.decode(latents(pair)["samples"])
    assert sent == [True, pair.family == "ltxv"]


@each(["ltxv"])
def test_network_that_draws_only_now_is_asked_again_with_the_random_state(pair):
    pair.remote.first_stage_model.calm.add("decode")
    pair.check(lambda vae: vae.decode(latents(pair)["samples"]))


@each(["taesd", "wan"])
def test_random_state_stays_where_nothing_is_drawn(pair):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    pair.remote.decode(latents(pair)["samples"])
    assert torch.equal(torch.get_rng_state(), before)


@each(SOUNDS)
def test_sound_gives_the_same_bits(pair):
    sound = pair.check(lambda vae: vae.decode(latents(pair)["samples"]))
    # the encoder draws noise
    found = pair.check(lambda vae: vae.encode(sound))
    pair.check(lambda vae: vae.decode(found))


@each(SOUNDS)
def test_sound_in_tiles_gives_the_same_bits(pair):
    sound = pair.check(lambda vae: vae.decode_tiled_1d(latents(pair)["samples"], 4, 1))
    sizes = {"tile_x": 4 * 2048, "overlap": 2048}
    pair.check(lambda vae: vae.encode_tiled_1d(sound, **sizes))


@each(PICTURES, VIDEOS, SOUNDS, OTHERS)
def test_what_nodes_read_is_the_same(pair):
    for name in READ_BY_NODES:
        local, remote = getattr(pair.local, name), getattr(pair.remote, name)
        assert _comparable(remote) == _comparable(local), name
    for name in ("spacial_compression_decode", "spacial_compression_encode"):
        assert getattr(pair.remote, name)() == getattr(pair.local, name)()
    assert pair.remote.temporal_compression_decode() == pair.local.temporal_compression_decode()
    assert pair.remote.first_stage_model.state_dict().keys() == pair.local.get_sd().keys()


@each(PICTURES, VIDEOS, SOUNDS, OTHERS)
def test_memory_is_estimated_alike(pair):
    shape = tuple(latents(pair)["samples"].shape)
    for name in ("memory_used_decode", "memory_used_encode"):
        local, remote = getattr(pair.local, name), getattr(pair.remote, name)
        assert remote(shape, torch.float32) == local(shape, torch.float32)


def _comparable(value: Any) -> Any:
    """Functions by what they give."""
    if isinstance(value, tuple):
        return tuple(map(_comparable, value))
    return [value(number) for number in range(20)] if callable(value) else value
