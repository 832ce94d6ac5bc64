"""Fakes of our own interfaces: a call, and a VAE that does as it is told."""

from __future__ import annotations

import torch

from luna_mp.models.base import ClipModel, Conditioning, ModelSpec, VaeModel, at_once
from luna_mp.models.library import Library

#: as torch words it; what follows the first line is advice
GPU_FAULT = (
    "CUDA error: an illegal memory access was encountered\n"
    "CUDA kernel errors might be asynchronously reported at some other API call"
)


class FakeCall:
    after = None

    def __init__(self, client="client", method="decode"):
        self.client = client
        self.method = method
        self.is_gone = False
        self.held = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.held is not None:
            self.held.__exit__(*error)

    def is_abandoned(self):
        return self.is_gone

    def wait_for_room(self):
        pass

    def has_room(self):
        return True

    def hold(self, context):
        assert self.held is None
        context.__enter__()
        self.held = context

    def place(self, step):
        return step()


def called(work, *args, **options):
    """What one call gives, from its beginning to its end, on a thread like a connection's."""
    with torch.inference_mode(), FakeCall() as call:
        return work(call, *args, **options)


class FakeVae(VaeModel):
    """Raises each of `errors` once, then answers; notes what was asked, and in which mode."""

    device = torch.device("cpu")
    dtype = torch.float32
    latent_channels, image_channels, spatial_dims, spatial_ratio = 4, 3, 2, 8

    def __init__(self, *errors):
        self.errors = list(errors)
        self.asked = []

    def decode(self, latent, place=at_once):
        return self._answer("decode", latent)

    def encode(self, image):
        return self._answer("encode", image)

    def decode_tiled(self, latent, place=at_once):
        return self._answer("decode_tiled", latent)

    def encode_tiled(self, image):
        return self._answer("encode_tiled", image)

    def weight_bytes(self):
        return 4

    def _answer(self, what, tensor):
        assert torch.is_inference_mode_enabled()
        self.asked.append(what)
        if self.errors:
            raise self.errors.pop(0)
        return tensor + 1


class FakeVaeOnBrokenGpu(FakeVae):
    """Behaves as after a kernel that failed, which here an infinite latent stands for."""

    is_broken = False

    def _answer(self, what, tensor):
        self.is_broken = self.is_broken or bool(tensor.isinf().any())
        if self.is_broken:
            raise RuntimeError(GPU_FAULT)
        return super()._answer(what, tensor)


class FakeClip(ClipModel):
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self):
        self.asked = []

    def tokenize(self, text):
        return {"fake": [len(text)]}

    def encode(self, text):
        self.asked.append(text)
        return Conditioning(torch.full((1, 1, 256), float(len(text))), None, {})

    def weight_bytes(self):
        return 4


DEFAULT = ModelSpec()


def library(model, allowed=(), most=2, default=DEFAULT):
    """A library whose default is `model` and whose others are new ones of its class."""
    models = [model]
    return Library(
        lambda spec: models.pop() if models else type(model)(), default, allowed, most, model.device
    )
