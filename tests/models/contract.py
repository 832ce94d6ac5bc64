"""What every model source must do; a source's tests hand their models to these."""

from __future__ import annotations

import torch

from luna_mp.models import ClipModel, VaeModel

_LATENT_EDGE = 8
_TEXTS = ("a red cat on a hill", "", "naïve 漢字 🙂 <|endoftext|> \n\t x", "long " * 2000)


@torch.inference_mode()
def check_vae(vae: VaeModel) -> None:
    """Raise `AssertionError` where `vae` breaks the contract of `VaeModel`."""
    frames = (1,) if vae.spatial_dims == 3 else ()
    edges = (_LATENT_EDGE,) * 2
    noise = torch.randn(1, vae.latent_channels, *frames, *edges, generator=_seed())

    image = vae.decode(noise)
    pixels = tuple(edge * vae.spatial_ratio for edge in edges)
    assert image.shape == (1, *frames, *pixels, vae.image_channels)
    assert image.dtype == torch.float32
    assert image.device == vae.device
    assert not image.requires_grad
    assert 0 <= image.min() and image.max() <= 1
    assert torch.equal(image, vae.decode(noise))
    assert torch.equal(image, vae.decode(noise.double().float()))

    latent = vae.encode(image)
    assert latent.shape == noise.shape
    assert latent.is_floating_point()
    assert latent.device == vae.device
    assert torch.isfinite(latent).all()
    assert torch.equal(latent, vae.encode(image))
    assert vae.weight_bytes() > 0


@torch.inference_mode()
def check_tiles(vae: VaeModel) -> None:
    """Raise `AssertionError` where tiles change a result's shape, or the results after them."""
    frames = (1,) if vae.spatial_dims == 3 else ()
    noise = torch.randn(1, vae.latent_channels, *frames, 24, 24, generator=_seed())
    image = vae.decode(noise)
    latent = vae.encode(image)
    assert vae.decode_tiled(noise).shape == image.shape
    assert vae.encode_tiled(image).shape == latent.shape
    assert torch.equal(vae.decode(noise), image)
    assert torch.equal(vae.encode(image), latent)


@torch.inference_mode()
def check_clip(clip: ClipModel) -> None:
    """Raise `AssertionError` where `clip` breaks the contract of `ClipModel`."""
    for text in _TEXTS:
        tokens = clip.tokenize(text)
        assert tokens and all(isinstance(i, int) for ids in tokens.values() for i in ids)
        cond, pooled, extras = clip.encode(text)
        assert cond.ndim == 3 and cond.shape[0] == 1
        assert cond.is_floating_point() and torch.isfinite(cond).all()
        assert cond.device == clip.device and not cond.requires_grad
        assert pooled is None or (pooled.ndim == 2 and pooled.shape[0] == 1)
        assert all(isinstance(name, str) for name in extras)
        assert torch.equal(cond, clip.encode(text).cond)
    assert not torch.equal(clip.encode("a cat").cond, clip.encode("a dog").cond)
    assert clip.weight_bytes() > 0


def _seed() -> torch.Generator:
    return torch.Generator().manual_seed(7)
