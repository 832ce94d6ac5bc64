"""What lies on disk: configs, weight files, and the errors that say what is wrong with them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from luna_mp.errors import BadConfig, BadModel, LunaError

__all__ = (
    "Component",
    "bad_model",
    "find_component",
    "is_safetensors",
    "quiet",
    "read_json",
    "reading",
    "resolve_device",
    "resolve_dtype",
    "tensor_shapes",
    "weight_bytes",
)

#: how diffusers and transformers name the weights of a component folder
_STEMS = ("diffusion_pytorch_model", "model")
_PICKLED = (".bin", ".ckpt", ".pt", ".pth")
_STORED = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_TO_SAFETENSORS = "convert the weights to safetensors"


@dataclass(frozen=True)
class Component:
    """One model on disk, its weight files known to be readable.

    `path`         as the caller named it, for errors
    `config_file`  its JSON, read into `config`
    `weights`      the safetensors files that make up the weights
    `named`        True where the libraries find the weights from the folder by themselves,
                   under `variant` ("fp16"), or None for the plain name
    """

    path: Path
    config_file: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]
    named: bool
    variant: str | None = None

    @property
    def folder(self) -> Path:
        return self.config_file.parent

    def stored_dtype(self) -> torch.dtype:
        """The dtype that most weights are stored in; float32 where that is not a plain float."""
        counts: dict[str, int] = {}
        for file in self.weights:
            for dtype, shape in tensor_shapes(file).values():
                counts[dtype] = counts.get(dtype, 0) + torch.Size(shape).numel()
        return _STORED.get(max(counts, key=lambda name: counts[name], default=""), torch.float32)


def bad_model(path: Path | str, found: str, expected: str, remedy: str) -> BadModel:
    """A `BadModel` whose text always has the same four parts."""
    return BadModel(f"cannot load {path}: found {found}, expected {expected}; {remedy}")


def is_safetensors(path: Path) -> bool:
    return path.suffix.lower() in (".safetensors", ".sft")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `BadModel`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        remedy = "copy the file again from where the model came from"
        raise bad_model(path, f"an unreadable file ({exc})", "a JSON object", remedy) from exc
    if not isinstance(data, dict):
        remedy = "copy the file again from where the model came from"
        raise bad_model(path, f"a JSON {type(data).__name__}", "a JSON object", remedy)
    return data


def tensor_shapes(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Stored dtype ("F16") and shape of each tensor of a safetensors file; reads only its header.

    Raises `BadModel` for a file that is not safetensors, or that was cut short.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            return {key: (part.get_dtype(), part.get_shape()) for key, part in slices.items()}
    except (SafetensorError, OSError) as exc:
        size = path.stat().st_size if path.is_file() else 0
        found = f"{size} bytes that are not a whole safetensors file ({exc})"
        remedy = "copy the file again and compare its size with the original's"
        raise bad_model(path, found, "a safetensors file", remedy) from exc


def find_component(path: Path) -> Component:
    """Find config and weights for a component folder or a single weight file.

    Raises `BadModel`.
    """
    if path.is_file():
        return _from_file(path)
    if not path.is_dir():
        remedy = "check the path, and that the service may read it"
        raise bad_model(path, "nothing there", "a model's folder or a .safetensors file", remedy)
    config_file = path / "config.json"
    if not config_file.is_file():
        remedy = "name the folder that holds config.json, or a pipeline's with model_index.json"
        raise bad_model(path, "a folder without config.json", "a model's folder", remedy)
    named = _named_weights(path)
    variant, weights = named or (None, _only_weights(path))
    for file in weights:
        tensor_shapes(file)
    return Component(path, config_file, read_json(config_file), weights, bool(named), variant)


def _from_file(path: Path) -> Component:
    if not is_safetensors(path):
        found = f"a {path.suffix or 'nameless'} file"
        remedy = f"{_TO_SAFETENSORS}, or serve it through ComfyUI's loaders"
        raise bad_model(path, found, "a .safetensors file or a folder", remedy)
    tensor_shapes(path)
    for config_file in (path.with_suffix(".json"), path.parent / "config.json"):
        if config_file.is_file():
            return Component(path, config_file, read_json(config_file), (path,), named=False)
    expected = f"{path.stem}.json or config.json beside it"
    remedy = "put the model's config there, or serve the file through ComfyUI's loaders"
    raise bad_model(path, "weights without a config", expected, remedy)


def _named_weights(folder: Path) -> tuple[str | None, tuple[Path, ...]] | None:
    """Weights under the libraries' own names: the plain one first, else the first variant."""
    for stem in _STEMS:
        plain = [folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"]
        variants = sorted(folder.glob(f"{stem}.safetensors.index.*.json"))
        variants += sorted(p for p in folder.glob(f"{stem}.*.safetensors") if "-of-" not in p.name)
        for file in (*plain, *variants):
            if not file.is_file():
                continue
            variant = None
            if file not in plain:
                variant = file.name.split(".")[-2 if file.suffix == ".json" else 1]
            return variant, _shards(file) if file.suffix == ".json" else (file,)
    return None


def _shards(index: Path) -> tuple[Path, ...]:
    names = set(read_json(index).get("weight_map", {}).values())
    # a name with folders in it would lead out of the folder that the client was allowed
    if not names or any(Path(name).name != name for name in names):
        remedy = "copy the index again from where the model came from"
        raise bad_model(index, f"weight_map {sorted(names)}", "file names beside it", remedy)
    return tuple(index.parent / name for name in sorted(names))


def _only_weights(folder: Path) -> tuple[Path, ...]:
    files = sorted(p for p in folder.iterdir() if is_safetensors(p))
    if len(files) == 1:
        return (files[0],)
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLED)
    found = f"{[p.name for p in files] or 'no safetensors file'}"
    remedy = "name one weight file instead of the folder" if files else "add the weights"
    if not files and pickled:
        found += f" but {pickled}"
        remedy = f"{_TO_SAFETENSORS}: pickled files can run code and are never opened"
    raise bad_model(folder, found, f"{_STEMS[0]}.safetensors or {_STEMS[1]}.safetensors", remedy)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the libraries raise for unfit files into a `BadModel` that names `path`."""
    try:
        yield
    except (torch.OutOfMemoryError, LunaError):
        raise
    except Exception as exc:  # unfit files lead the libraries to errors of every class
        reason = " ".join(str(exc).split())[:400]
        found = f"files that its library refuses ({type(exc).__name__}: {reason})"
        remedy = "check that config and weights belong together, and the library's version"
        raise bad_model(path, found, "weights that fit their config", remedy) from exc


@contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """Hold the libraries' loggers at ERROR: what they warn of while loading, we raise or accept."""
    loggers = [logging.getLogger(name) for name in libraries]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def resolve_device(name: str) -> torch.device:
    """The device of that name, with its index. Raises `BadConfig` where it is not there."""
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise BadConfig(f"unknown device {name!r}: use cpu, cuda or cuda:N") from exc
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise BadConfig(f"device {name!r} is not there: torch sees {count} GPUs; name another")
    return torch.device("cuda", device.index or 0)


def resolve_dtype(name: str) -> torch.dtype | None:
    """The floating dtype of that name, None for "auto". Raises `BadConfig`."""
    if name == "auto":
        return None
    dtype = {str(known).removeprefix("torch."): known for known in _STORED.values()}.get(name)
    if dtype is None:
        raise BadConfig(f"unknown dtype {name!r}: use auto, float16, bfloat16 or float32")
    return dtype


def weight_bytes(*models: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
    return sum(t.numel() * t.element_size() for t in tensors)
