"""A weight file without its weights: names, shapes and dtypes, enough to build the model on meta.

Loaders tell families apart by these alone. Only what they read by value comes along: tokenizers and
descriptions of quantisation, which are stored as bytes, and single numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from luna_mp.errors import Rejected
from luna_mp.models import files

__all__ = ("describe_file", "describe_tensors", "restore")

#: safetensors' names, https://github.com/huggingface/safetensors#format
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
}


def describe_file(path: Path) -> dict[str, Any]:
    """What `restore` takes, from a safetensors file; reads its header and little more.

    Raises `BadModel`.
    """
    shapes = files.tensor_shapes(path)
    with safe_open(path, framework="pt") as file:
        values = {
            key: file.get_tensor(key)
            for key, (dtype, shape) in shapes.items()
            if _crosses(_DTYPES.get(dtype, dtype), shape)
        }
        metadata = dict(file.metadata() or {})
    tensors = {key: (_DTYPES.get(dtype, dtype), shape) for key, (dtype, shape) in shapes.items()}
    return {"tensors": tensors, "values": values, "metadata": metadata}


def describe_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The same from tensors that were read already."""
    shapes = {key: (_name(t.dtype), list(t.shape)) for key, t in tensors.items()}
    values = {key: t for key, t in tensors.items() if _crosses(*shapes[key])}
    return {"tensors": shapes, "values": values, "metadata": {}}


def restore(described: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors by name, in the file's order, those without values on the meta device.

    Raises `Rejected` for a dtype that this torch does not have.
    """
    values = described["values"]
    return {
        key: values[key] if key in values else torch.empty(shape, dtype=_dtype(name), device="meta")
        for key, (name, shape) in described["tensors"].items()
    }


def _crosses(dtype: str, shape: list[int]) -> bool:
    return (dtype == "uint8" and len(shape) == 1) or math.prod(shape) == 1


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise Rejected(f"this torch ({torch.__version__}) has no dtype {name!r}: update it")
    return dtype
