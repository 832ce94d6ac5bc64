"""Models that ComfyUI's own loaders load: every family that the given ComfyUI knows."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from luna_mp.errors import BadConfig, Rejected
from luna_mp.models import files
from luna_mp.models.base import ClipModel, Conditioning, ModelSpec, Place, VaeModel, at_once
from luna_mp.models.comfy_import import import_comfy

__all__ = (
    "ComfyClip",
    "ComfyVae",
    "NamedPatches",
    "clip_type",
    "is_checkpoint",
    "load_clip",
    "load_vae",
)

#: our names for families that ComfyUI tells apart by the files alone
_TYPE_ALIASES = dict.fromkeys(("auto", "sd1", "sd2", "sdxl"), "STABLE_DIFFUSION")
#: the diffusion model's keys, by which a file that holds everything is known
_CHECKPOINT_PREFIX = "model.diffusion_model."
#: keys of OpenCLIP's files, which ComfyUI renames before it looks what they are
_OPENCLIP_KEY = "transformer.resblocks.0.ln_1.weight"
#: an embedding vector in a prompt has no token id
_NO_ID = -1
#: patched clones that one model keeps
MAX_VARIANTS = 16


class ComfyVae(VaeModel):
    """ComfyUI's VAE; `vae` is the wrapped `comfy.sd.VAE`, with results kept on `device`.

    Bits and strides are those of the wrapped object: latents come back as float32, and a call that
    runs out of memory is repeated in tiles by ComfyUI itself.
    """

    def __init__(self, vae: Any, device: torch.device) -> None:
        self.vae = vae
        vae.output_device = device
        self.device = device
        self.dtype = vae.vae_dtype
        self.latent_channels = vae.latent_channels
        self.image_channels = vae.output_channels
        self.spatial_dims = vae.latent_dim
        self.spatial_ratio = round(vae.spacial_compression_decode())

    def decode(self, latent: torch.Tensor, place: Place = at_once) -> torch.Tensor:
        image: torch.Tensor = self.vae.decode(latent)
        return image

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        latent: torch.Tensor = self.vae.encode(image)
        return latent

    def decode_tiled(self, latent: torch.Tensor, place: Place = at_once) -> torch.Tensor:
        image: torch.Tensor = self.vae.decode_tiled(latent, **self._tiles(decoding=True))
        return image

    def encode_tiled(self, image: torch.Tensor) -> torch.Tensor:
        latent: torch.Tensor = self.vae.encode_tiled(image, **self._tiles(decoding=False))
        return latent

    def weight_bytes(self) -> int:
        return int(self.vae.patcher.model_size())

    def run(self, method: str, tensor: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """One method of the network itself, without what `comfy.sd.VAE` does around it.

        `tensor` is in the network's dtype and layout, as that class would give it; a batch that is
        larger than the free memory goes in parts, as there. Raises `torch.OutOfMemoryError`.
        """
        management = importlib.import_module("comfy.model_management")
        vae = self.vae
        estimate = vae.memory_used_decode if "decode" in method else vae.memory_used_encode
        needed = estimate(tensor.shape, vae.vae_dtype)
        if not _is_loaded_alone(vae.patcher, management):
            full = vae.disable_offload
            management.load_models_gpu([vae.patcher], memory_required=needed, force_full_load=full)
        work = getattr(vae.first_stage_model, method)
        most = 1
        if len(tensor) > 1:  # to ask for the free memory takes ComfyUI a while, too
            most = max(1, int(management.get_free_memory(vae.device) / max(1, needed)))
        parts = [work(part.to(vae.device), **options) for part in tensor.split(most)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _tiles(self, decoding: bool) -> dict[str, int]:
        """Tile sizes where ComfyUI's methods have no defaults: those of its own fallback."""
        if self.spatial_dims == 3:
            edge = 256 // self.spatial_ratio if decoding else 256
            return {"tile_x": edge, "tile_y": edge, "overlap": edge // 4}
        # for sound the argument is dropped, but it has to be there to be dropped
        return {"tile_y": 0} if self.spatial_dims == 1 else {}


class ComfyClip(ClipModel):
    """ComfyUI's text encoders; `clip` is the wrapped `comfy.sd.CLIP`.

    `extras` holds what ComfyUI adds to a conditioning (`attention_mask`, …), as it named it.
    """

    def __init__(self, clip: Any, device: torch.device) -> None:
        self.clip = clip
        self._variants: OrderedDict[str, Any] = OrderedDict()
        self.device = device
        self.dtype = next(clip.cond_stage_model.parameters()).dtype

    def tokenize(self, text: str) -> dict[str, list[int]]:
        """As for every `ClipModel`; an embedding's vector counts as -1."""
        tokens: dict[str, list[list[tuple[Any, ...]]]] = self.clip.tokenize(text)
        return {
            name: [
                int(token[0]) if isinstance(token[0], int) else _NO_ID
                for batch in batches
                for token in batch
            ]
            for name, batches in tokens.items()
        }

    def encode(self, text: str) -> Conditioning:
        return self.encode_tokens(self.clip.tokenize(text), {})

    def encode_tokens(
        self,
        tokens: dict[str, Any],
        options: dict[str, Any],
        patches: NamedPatches | None = None,
        hooked: NamedPatches | None = None,
    ) -> Conditioning:
        """Conditioning of what ComfyUI's tokenizer made, under options and patches of this call.

        `options` are those of `set_clip_options`: "layer" and "projected_pooled"; `patches` are
        laid on the weights, then `hooked`, for this call only, on those.
        """
        clip = self._variant(patches)
        clip.layer_idx = options.get("layer")
        pooled = "unprojected" if options.get("projected_pooled") is False else True
        with _hooked(clip, hooked.read() if hooked else {}):
            output = clip.encode_from_tokens(tokens, return_pooled=pooled, return_dict=True)
        extras = {k: v for k, v in output.items() if k not in ("cond", "pooled_output")}
        return Conditioning(output["cond"], output["pooled_output"], extras)

    def weight(self, key: str) -> tuple[Any, Any]:
        """An unpatched weight, and the function that reads it: what a merge takes from a model."""
        importlib.import_module("comfy.model_management").load_models_gpu([self.clip.patcher])
        found = self.clip.get_key_patches()
        if key not in found:
            raise Rejected(f"a merge names the weight {key!r:.200}, which this model does not have")
        pair: tuple[Any, Any] = found[key][0]
        return pair

    def weight_bytes(self) -> int:
        return int(self.clip.patcher.model_size())

    def _variant(self, patches: NamedPatches | None) -> Any:
        """A clone with those patches: ComfyUI lays them on when another one was in use before."""
        name = patches.name if patches else ""
        if name not in self._variants:
            variant = self._variants[name] = self.clip.clone()
            if patches:
                variant.patcher.patches = dict(patches.read())
                # equal for equal patches, so that what is laid on already stays
                variant.patcher.patches_uuid = name
        self._variants.move_to_end(name)
        while len(self._variants) > MAX_VARIANTS:
            self._variants.popitem(last=False)
        return self._variants[name]


def _is_loaded_alone(patcher: Any, management: Any) -> bool:
    """Whether there is nothing to load and nothing to make room from: ComfyUI takes long to see."""
    loaded = management.current_loaded_models
    is_alone = len(loaded) == 1 and loaded[0].model is patcher
    return is_alone and bool(patcher.loaded_size() >= patcher.model_size())


class NamedPatches(NamedTuple):
    """Patches as `ModelPatcher` holds them, made when they are needed; `name` stands for them."""

    name: str
    read: Callable[[], Mapping[str, Any]]


@contextlib.contextmanager
def _hooked(clip: Any, patches: Mapping[str, Any]) -> Iterator[None]:
    """Lay patches on the patched weights, as ComfyUI's hooks do, and take them off again."""
    if not patches:
        yield
        return
    patcher = clip.load_model()
    # loading again would take them off
    clip.load_model = lambda *_, **__: patcher
    try:
        originals = patcher.get_key_patches()
        for key in patches:
            patcher.patch_hook_weight_to_device(None, patches, key, originals, None)
        yield
    finally:
        patcher.unpatch_hooks()
        del clip.load_model


def load_clip(spec: ModelSpec, device: str, comfyui: str) -> ComfyClip:
    """Load the text encoder files of `spec`, or those in one checkpoint.

    Raises `BadModel`, `BadConfig`.
    """
    target = files.resolve_device(device)
    options: dict[str, Any] = {"load_device": target, "offload_device": target}
    dtype = files.resolve_dtype(spec.dtype)
    if dtype is not None:
        options["dtype"] = dtype
    paths = _existing_files(spec)
    comfy = import_comfy(comfyui, target)
    family = clip_type(comfy, spec.type)
    embeddings = Path(comfyui) / "models" / "embeddings"
    directories = [str(embeddings)] if embeddings.is_dir() else None
    is_checkpoint = len(paths) == 1 and _is_checkpoint(paths[0])
    with files.reading(paths[0]), torch.inference_mode():
        if is_checkpoint:
            clip = comfy.load_checkpoint_guess_config(
                str(paths[0]),
                output_model=False,
                output_vae=False,
                output_clip=True,
                embedding_directory=directories,
                te_model_options=options,
            )[1]
        else:
            _refuse_strangers(comfy, paths, spec.type)
            clip = comfy.load_clip(
                [str(path) for path in paths],
                embedding_directory=directories,
                clip_type=family,
                model_options=options,
            )
    if clip is None:
        raise files.bad_model(
            paths[0],
            "a checkpoint without text encoders",
            "a checkpoint that holds them",
            "name the text encoders' own files",
        )
    return ComfyClip(clip, target)


def load_vae(spec: ModelSpec, device: str, comfyui: str) -> ComfyVae:
    """Load a VAE file, or the VAE in a checkpoint. Raises `BadModel`, `BadConfig`."""
    target = files.resolve_device(device)
    dtype = files.resolve_dtype(spec.dtype)
    paths = _existing_files(spec)
    path = paths[0]
    if len(paths) != 1:
        remedy = "name one VAE file or one checkpoint"
        raise files.bad_model(", ".join(spec.paths), f"{len(paths)} files", "one", remedy)
    comfy = import_comfy(comfyui, target)
    with files.reading(path), torch.inference_mode(), _vae_dtype(dtype):
        if _is_checkpoint(path):
            vae = comfy.load_checkpoint_guess_config(
                str(path), output_model=False, output_clip=False, output_vae=True
            )[2]
        else:
            utils = importlib.import_module("comfy.utils")
            weights, metadata = utils.load_torch_file(
                str(path), safe_load=True, return_metadata=True
            )
            takes_metadata = "metadata" in inspect.signature(comfy.VAE.__init__).parameters
            vae = comfy.VAE(sd=weights, **({"metadata": metadata} if takes_metadata else {}))
    if vae is None or vae.first_stage_model is None:
        found = "weights that are no VAE that this ComfyUI knows"
        remedy = "name a VAE's file, or update ComfyUI"
        raise files.bad_model(path, found, "a VAE, or a checkpoint with one", remedy)
    return ComfyVae(vae, target)


def _existing_files(spec: ModelSpec) -> list[Path]:
    paths = [Path(path) for path in spec.paths]
    if not 1 <= len(paths) <= 4:
        expected, remedy = "one to four weight files", "name the model's files"
        raise files.bad_model(", ".join(spec.paths), f"{len(paths)} paths", expected, remedy)
    for path in paths:
        if not path.is_file():
            found = "a folder" if path.is_dir() else "nothing there"
            remedy = "name the file; folders are read through diffusers, without ComfyUI"
            raise files.bad_model(path, found, "a weight file", remedy)
        if files.is_safetensors(path):
            files.tensor_shapes(path)
    return paths


def _is_checkpoint(path: Path) -> bool:
    """Pickled checkpoints are taken for plain weights, which ComfyUI opens without running code."""
    if not files.is_safetensors(path):
        return False
    return is_checkpoint(files.tensor_shapes(path))


def is_checkpoint(keys: Iterable[str]) -> bool:
    """Whether a file with these keys holds a diffusion model beside text encoders and VAE."""
    return any(key.startswith(_CHECKPOINT_PREFIX) for key in keys)


def clip_type(comfy: Any, name: str) -> Any:
    """The member of `comfy.sd.CLIPType` for our name of a family. Raises `BadConfig`."""
    wanted = _TYPE_ALIASES.get(name, name.upper())
    try:
        return comfy.CLIPType[wanted]
    except KeyError as exc:
        known = ", ".join(sorted((*_TYPE_ALIASES, *(t.name.lower() for t in comfy.CLIPType))))
        raise BadConfig(f"ComfyUI knows no CLIP type {name!r}: use one of {known}") from exc


def _refuse_strangers(comfy: Any, paths: list[Path], type: str) -> None:
    """ComfyUI takes weights that it does not know for a CLIP-L, and leaves that uninitialised."""
    detect = getattr(comfy, "detect_te_model", None)
    for path in filter(files.is_safetensors, paths):
        shapes = files.tensor_shapes(path)
        # detection reads names and shapes only
        weights = {key: torch.empty(shape, device="meta") for key, (_, shape) in shapes.items()}
        if detect is None or _OPENCLIP_KEY in weights or detect(weights) is not None:
            continue
        found = f"no text encoder that this ComfyUI knows ({next(iter(weights), 'no tensors')}, …)"
        # LTX-2 comes with a file of connectors, which ComfyUI knows by the file beside it.
        if type == "ltxv" and len(paths) > 1:
            continue
        remedy = "name a text encoder's file, or update ComfyUI"
        raise files.bad_model(path, found, "a text encoder's weights", remedy)


@contextlib.contextmanager
def _vae_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Have ComfyUI build VAEs in `dtype`: a checkpoint's VAE can be told in no other way."""
    flags = {torch.float16: "fp16_vae", torch.bfloat16: "bf16_vae", torch.float32: "fp32_vae"}
    arguments: Any = importlib.import_module("comfy.cli_args").args
    before = {flag: getattr(arguments, flag) for flag in flags.values()}
    try:
        if dtype is not None:
            vars(arguments).update({flag: known == dtype for known, flag in flags.items()})
        yield
    finally:
        vars(arguments).update(before)
