"""What shows in a ComfyUI model's bits besides its file: versions, flags, torch's switches.

Both ends tell theirs in the same words; what differs is told before it changes an image.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

__all__ = ("differences", "facts")

#: flags of ComfyUI that choose other arithmetic for the same weights
_FLAGS = (
    "force_fp32",
    "force_fp16",
    "fp16_intermediates",
    "force_channels_last",
    "force_upcast_attention",
    "dont_upcast_attention",
    "use_split_cross_attention",
    "use_quad_cross_attention",
    "use_pytorch_cross_attention",
    "use_sage_attention",
    "use_flash_attention",
    "disable_xformers",
    "deterministic",
    "fast",
)


def facts(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """This process's, for a model on `device` that computes in `dtype`; plain data."""
    is_gpu = device.type == "cuda"
    arguments = vars(importlib.import_module("comfy.cli_args").args)
    return {
        "ComfyUI": getattr(_optional("comfyui_version"), "__version__", "unknown"),
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if is_gpu else device.type,
        "dtype": str(dtype).removeprefix("torch."),
        **({} if is_gpu else {"CPU threads": torch.get_num_threads()}),
        **{f"--{name.replace('_', '-')}": _said(arguments.get(name)) for name in _FLAGS},
        **dict(_switches()),
    }


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """A line for each fact in which this process and a service differ."""
    names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    return [f"{name}: {here.get(name)} here, {there.get(name)} in the service" for name in names]


def _switches() -> Iterator[tuple[str, Any]]:
    backends = torch.backends
    yield "matmul precision", torch.get_float32_matmul_precision()
    yield "cudnn.allow_tf32", backends.cudnn.allow_tf32
    yield "cudnn.benchmark", backends.cudnn.benchmark
    yield "cudnn.deterministic", backends.cudnn.deterministic
    yield "cudnn.enabled", backends.cudnn.enabled
    yield "fp16 accumulation", getattr(backends.cuda.matmul, "allow_fp16_accumulation", None)
    yield "flash attention", backends.cuda.flash_sdp_enabled()
    yield "memory efficient attention", backends.cuda.mem_efficient_sdp_enabled()
    yield "deterministic algorithms", torch.are_deterministic_algorithms_enabled()


def _optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def _said(value: Any) -> Any:
    """Some flags are sets of an enum's members."""
    if isinstance(value, (set, frozenset)):
        return sorted(str(getattr(item, "value", item)) for item in value)
    return value
