"""Text encoders and tokenizers on disk: which there are, what they make together, loading them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from luna_mp.models import files
from luna_mp.models.base import ModelSpec

__all__ = ("CLIP", "PROJECTED", "T5", "EncoderFiles", "find_encoders", "load_parts")

CLIP = "CLIPTextModel"
PROJECTED = "CLIPTextModelWithProjection"
T5 = "T5EncoderModel"

_KINDS = {CLIP: CLIP, PROJECTED: PROJECTED, T5: T5, "T5ForConditionalGeneration": T5}
_TOKENIZERS = {CLIP: "CLIPTokenizer", PROJECTED: "CLIPTokenizer", T5: "T5TokenizerFast"}
_ALLOWED_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast")
#: any of these makes a folder a tokenizer's
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model")
_CONVENTIONS = {
    "sd1": ([CLIP],),
    "sdxl": ([CLIP, PROJECTED], [PROJECTED]),
    "flux": ([CLIP, T5],),
}
#: which convention a pipeline follows, by the start of its class name, first match; None: none here
_PIPELINES = (
    ("StableDiffusionXL", "sdxl"),
    ("StableDiffusion3", None),
    ("StableDiffusion", "sd1"),
    ("LatentConsistencyModel", "sd1"),
    ("Flux2", None),
    ("Flux", "flux"),
)
_ROLES = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")


@dataclass(frozen=True)
class EncoderFiles:
    """Where one text encoder and its tokenizer lie; `kind` is the class of the encoder."""

    name: str
    kind: str
    component: files.Component
    tokenizer: Path
    tokenizer_class: str


def find_encoders(spec: ModelSpec) -> tuple[list[EncoderFiles], str]:
    """The encoders at the paths of `spec` in order, and their convention. Raises `BadModel`."""
    if spec.type != "auto" and spec.type not in _CONVENTIONS:
        known = ", ".join(("auto", *_CONVENTIONS))
        remedy = "use one of those, or serve it through ComfyUI's loaders"
        raise files.bad_model(", ".join(spec.paths), f"the type {spec.type!r}", known, remedy)
    if not spec.paths:
        raise files.bad_model("a text encoder", "no path", "a folder or files", "name them")
    first = Path(spec.paths[0])
    wanted = spec.type
    if len(spec.paths) == 1 and (first / "model_index.json").is_file():
        parts, by_pipeline = _from_pipeline(first, needs_type=spec.type == "auto")
        wanted = by_pipeline if spec.type == "auto" else spec.type
    else:
        parts = [_from_path(Path(path), index) for index, path in enumerate(spec.paths)]
    return parts, _convention(spec, [part.kind for part in parts], wanted)


def _convention(spec: ModelSpec, kinds: list[str], wanted: str) -> str:
    """The convention that fits these encoders, which must be `wanted` where it is not "auto"."""
    fitting = [name for name, accepted in _CONVENTIONS.items() if kinds in accepted]
    if not fitting or wanted not in ("auto", *fitting):
        choices = _CONVENTIONS if wanted == "auto" else {wanted: _CONVENTIONS[wanted]}
        expected = "; ".join(f"{n}: {' or '.join(map(str, k))}" for n, k in choices.items())
        remedy = "name the encoders in that order, or serve them through ComfyUI's loaders"
        raise files.bad_model(", ".join(spec.paths), f"encoders {kinds}", expected, remedy)
    return fitting[0]


def load_parts(part: EncoderFiles, dtype: torch.dtype) -> tuple[Any, Any]:
    """The encoder, on the CPU, and its tokenizer. Raises `BadModel`."""
    component = part.component
    with files.reading(part.tokenizer), _quiet():
        tokenizer = getattr(transformers, part.tokenizer_class).from_pretrained(
            str(part.tokenizer), local_files_only=True
        )
    cls = getattr(transformers, part.kind)
    # renamed between the two versions of transformers that we support
    dtype_argument = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    arguments = {dtype_argument: dtype, "output_loading_info": True}
    with files.reading(component.path), _quiet():
        if component.named:
            model, report = cls.from_pretrained(
                str(component.folder),
                variant=component.variant,
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=find_spec("accelerate") is not None,
                **arguments,
            )
        else:
            config = cls.config_class.from_dict(component.config)
            weights = load_file(component.weights[0])
            model, report = cls.from_pretrained(
                None, config=config, state_dict=weights, **arguments
            )
    missing = sorted(report["missing_keys"])
    if missing:
        found = f"weights without {len(missing)} of the model's tensors, such as {missing[0]}"
        remedy = "check that config and weights belong together"
        raise files.bad_model(component.path, found, "weights that fit their config", remedy)
    return model, tokenizer


def _from_pipeline(folder: Path, needs_type: bool) -> tuple[list[EncoderFiles], str]:
    """The encoders of a pipeline, and the convention of its class; "auto" where none is needed."""
    index = files.read_json(folder / "model_index.json")
    name = str(index.get("_class_name"))
    convention = next((known for start, known in _PIPELINES if name.startswith(start)), None)
    if needs_type and convention is None:
        expected = "a Stable Diffusion 1, 2, XL or Flux pipeline"
        remedy = (
            f"name the type ({', '.join(_CONVENTIONS)}) that it follows, or use ComfyUI's loaders"
        )
        raise files.bad_model(folder, f"a {name}", expected, remedy)
    named = {role: index[role] for role in _ROLES if index.get(role) not in (None, [None, None])}
    if not named:
        found = f"a {name} without text encoders"
        remedy = "name the text encoders' own folders"
        raise files.bad_model(folder, found, "a pipeline with a text_encoder folder", remedy)
    parts = []
    for role, entry in named.items():
        tokenizer_role = role.replace("text_encoder", "tokenizer")
        names = index.get(tokenizer_role)
        tokenizer_class = names[1] if isinstance(names, list) and len(names) == 2 else None
        kind = entry[1] if isinstance(entry, list) and len(entry) == 2 else str(entry)
        component = files.find_component(folder / role)
        tokenizer = folder / tokenizer_role
        parts.append(_part(role, kind, component, [tokenizer], tokenizer_class))
    return parts, convention or "auto"


def _from_path(path: Path, index: int) -> EncoderFiles:
    component = files.find_component(path)
    architectures = component.config.get("architectures") or [None]
    folder = component.folder
    sibling = "tokenizer" if index == 0 else f"tokenizer_{index + 1}"
    if folder.name.startswith("text_encoder"):
        sibling = folder.name.replace("text_encoder", "tokenizer", 1)
    candidates = [folder, folder / sibling, folder.parent / sibling]
    return _part(_ROLES[min(index, 3)], architectures[0], component, candidates, None)


def _part(
    name: str,
    kind: Any,
    component: files.Component,
    tokenizers: list[Path],
    tokenizer_class: Any,
) -> EncoderFiles:
    if kind not in _KINDS:
        expected = f"one of {', '.join(_KINDS)}"
        remedy = "use another text encoder, or serve it through ComfyUI's loaders"
        raise files.bad_model(component.path, f"a text encoder {kind!r}", expected, remedy)
    known = _KINDS[kind]
    tokenizer_class = tokenizer_class or _TOKENIZERS[known]
    if tokenizer_class not in _ALLOWED_TOKENIZERS:
        expected = f"one of {', '.join(_ALLOWED_TOKENIZERS)}"
        remedy = "use another text encoder, or serve it through ComfyUI's loaders"
        found = f"a tokenizer {tokenizer_class!r}"
        raise files.bad_model(component.path, found, expected, remedy)
    for folder in tokenizers:
        if any((folder / file).is_file() for file in _TOKENIZER_FILES):
            return EncoderFiles(name, known, component, folder, tokenizer_class)
    expected = f"a tokenizer ({', '.join(_TOKENIZER_FILES)}) in {' or '.join(map(str, tokenizers))}"
    remedy = "put the tokenizer's folder there"
    raise files.bad_model(component.path, "a text encoder without tokenizer", expected, remedy)


@contextmanager
def _quiet() -> Iterator[None]:
    """As `files.quiet`, without the progress bars that a service's log has no use for."""
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with files.quiet("transformers"):
            yield
    finally:
        if had_bars:
            transformers_logging.enable_progress_bar()
