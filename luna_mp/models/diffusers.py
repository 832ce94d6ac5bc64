"""Autoencoders of the diffusers library, from a pipeline's folder, their own, or one file."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file

from luna_mp.errors import RemoteFailure
from luna_mp.models import files
from luna_mp.models.base import ModelSpec, Place, VaeModel, at_once

__all__ = ("DTYPE_ARGUMENT", "DiffusersVae", "load_vae")

_PREFIXES = ("Autoencoder", "AsymmetricAutoencoder")
#: `torch_dtype` of older versions is deprecated, and `dtype` unknown to them
_VERSION = tuple(int(number) for number in diffusers.__version__.split(".")[:2])
DTYPE_ARGUMENT = "dtype" if _VERSION >= (0, 42) else "torch_dtype"
#: edge of the latent that `_measure` decodes
_PROBE = 4


class DiffusersVae(VaeModel):
    """A diffusers autoencoder; `model` is the library's own object.

    Takes and gives what diffusers' `VaeImageProcessor` would, channels last.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.dtype = model.dtype
        self.latent_channels = _latent_channels(model)
        self.spatial_dims, self.spatial_ratio, self.image_channels = self._measure()

    def decode(self, latent: torch.Tensor, place: Place = at_once) -> torch.Tensor:
        # Converted there: on the host torch would wake its threads first, which takes milliseconds.
        sample = self.model.decode(latent.to(self.device).to(self.dtype)).sample
        # in the model's dtype, as VaeImageProcessor does: rounding is part of the picture
        image = (sample / 2 + 0.5).clamp_(0, 1)
        return place(lambda: image.to(torch.float32, copy=True)).movedim(1, -1)

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        pixels = image.to(self.device).movedim(-1, 1) * 2 - 1
        output = self.model.encode(pixels.to(self.dtype))
        latent: torch.Tensor
        if hasattr(output, "latent_dist"):
            latent = output.latent_dist.mode()
        else:
            latent = output.latent if hasattr(output, "latent") else output.latents
        return latent

    def decode_tiled(self, latent: torch.Tensor, place: Place = at_once) -> torch.Tensor:
        with self._tiling():
            return self.decode(latent, place)

    def encode_tiled(self, image: torch.Tensor) -> torch.Tensor:
        with self._tiling():
            return self.encode(image)

    def weight_bytes(self) -> int:
        return files.weight_bytes(self.model)

    @contextmanager
    def _tiling(self) -> Iterator[None]:
        """The caller's lock keeps others from the flag. Raises `RemoteFailure`."""
        before = getattr(self.model, "use_tiling", None)
        # some classes have the flag and no tiles, and would quietly decode in one piece
        if before is None or not any("tiled_decode" in name for name in dir(self.model)):
            kind = type(self.model).__name__
            raise RemoteFailure(
                f"{kind} cannot work in tiles in diffusers {diffusers.__version__}: "
                "use a smaller picture, or a GPU with more free memory"
            )
        try:
            self.model.enable_tiling()
            yield
        finally:
            self.model.use_tiling = before

    @torch.inference_mode()
    def _measure(self) -> tuple[int, int, int]:
        """Spatial dimensions, ratio and channels, from a decode: no config field is common to all.

        Raises what the model raises, or `ValueError`, for one that makes no pictures.
        """
        is_video = any(isinstance(module, torch.nn.Conv3d) for module in self.model.modules())
        frames = (1,) if is_video else ()
        latent = torch.zeros(1, self.latent_channels, *frames, _PROBE, _PROBE)
        sample = self.model.decode(latent.to(self.device, self.dtype)).sample
        height, width = sample.shape[-2:]
        if sample.ndim != latent.ndim or height != width or height % _PROBE:
            shape = tuple(sample.shape)
            raise ValueError(f"a latent of {tuple(latent.shape)} decodes to {shape}: no picture")
        return sample.ndim - 2, height // _PROBE, sample.shape[1]


def load_vae(spec: ModelSpec, device: str) -> DiffusersVae:
    """Load the autoencoder at the one path of `spec`. Raises `BadModel`, `BadConfig`."""
    target = files.resolve_device(device)
    wanted = files.resolve_dtype(spec.dtype)
    if len(spec.paths) != 1:
        remedy = "name its folder or its file"
        raise files.bad_model(", ".join(spec.paths), f"{len(spec.paths)} paths", "one VAE", remedy)
    component = files.find_component(_vae_folder(Path(spec.paths[0])))
    cls = _autoencoder_class(component)
    dtype = wanted or (torch.float32 if target.type == "cpu" else component.stored_dtype())
    with files.reading(component.path), files.quiet("diffusers"):
        model = _from_folder if component.named else _from_file
        vae = model(cls, component, dtype).eval().requires_grad_(False).to(target)
        return DiffusersVae(vae, target)


def _vae_folder(path: Path) -> Path:
    index = path / "model_index.json"
    if not index.is_file():
        return path
    entry = files.read_json(index).get("vae")
    if not isinstance(entry, list) or None in entry or not (path / "vae").is_dir():
        found = f"a pipeline whose vae is {entry}"
        raise files.bad_model(path, found, "a pipeline with a vae folder", "name the VAE's own")
    return path / "vae"


def _autoencoder_class(component: files.Component) -> Any:
    """The class that the config names, of those that may be reached through a config."""
    name = component.config.get("_class_name")
    cls: Any = getattr(diffusers, str(name), None) if str(name).startswith(_PREFIXES) else None
    is_model = inspect.isclass(cls) and issubclass(cls, diffusers.ModelMixin)
    if not is_model:
        raise files.bad_model(
            component.config_file,
            f"_class_name {name!r}",
            f"an autoencoder of diffusers {diffusers.__version__} (Autoencoder…)",
            "name a VAE's folder, or update diffusers",
        )
    required = [
        parameter.name
        for parameter in list(inspect.signature(cls.decode).parameters.values())[2:]
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    ]
    if required:
        expected = "an autoencoder that decodes a latent alone"
        remedy = "use another VAE of that family, or ComfyUI's loaders"
        raise files.bad_model(
            component.path, f"{name}, which also wants {required}", expected, remedy
        )
    return cls


def _from_folder(cls: Any, component: files.Component, dtype: torch.dtype) -> Any:
    model, report = cls.from_pretrained(
        str(component.folder),
        variant=component.variant,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        low_cpu_mem_usage=find_spec("accelerate") is not None,
        **{DTYPE_ARGUMENT: dtype},
    )
    _refuse_missing(component, report["missing_keys"])
    return model


def _from_file(cls: Any, component: files.Component, dtype: torch.dtype) -> Any:
    weights = load_file(component.weights[0])
    model = cls.from_config(component.config)
    missing = [key for key in model.state_dict() if key not in weights]
    if missing and hasattr(cls, "from_single_file"):
        # other names, as the original projects gave them: diffusers knows how to translate
        model = cls.from_single_file(
            str(component.weights[0]),
            config=str(component.config_file),
            local_files_only=True,
            **{DTYPE_ARGUMENT: dtype},
        )
        missing = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    elif not missing:
        model.load_state_dict(weights, strict=False, assign=True)
    _refuse_missing(component, missing)
    return model.to(dtype)


def _refuse_missing(component: files.Component, missing: list[str]) -> None:
    if missing:
        found = f"weights without {len(missing)} of the model's tensors, such as {missing[0]}"
        remedy = "check that config and weights belong together"
        raise files.bad_model(component.path, found, "weights that fit their config", remedy)


def _latent_channels(model: Any) -> int:
    for name in ("latent_channels", "z_dim", "z_channels"):
        if isinstance(model.config.get(name), int):
            return int(model.config[name])
    raise ValueError(f"{type(model).__name__} does not say how many channels its latents have")
