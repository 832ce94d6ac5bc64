"""What shows in a ComfyUI model's bits besides its file: versions, flags, torch's switches.

Both ends tell theirs in the same words; what differs is told before it changes an image.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch

__all__ = ("ARITHMETIC", "differences", "facts", "fast", "option")

#: ComfyUI's flags, as its arguments are called, that choose other arithmetic for the same weights;
#: beside "fast", which is a list
ARITHMETIC = (
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
    "use_ck_attention",
    "disable_xformers",
    "supports_fp8_compute",
    "enable_triton_backend",
    "disable_triton_backend",
    "deterministic",
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
        **{option(name): arguments.get(name) for name in ARITHMETIC},
        "--fast": fast(arguments),
        # Under it, which no service has, patches are laid on without rounding.
        "dynamic VRAM": getattr(sys.modules.get("comfy.memory_management"), "aimdo_enabled", False),
        **dict(_switches()),
    }


def option(name: str) -> str:
    """How an argument is spelled on ComfyUI's command line, which keeps "fp8_e4m3fn" whole."""
    return "--" + name.replace("_", "-").replace("fp8-e", "fp8_e")


def fast(arguments: Mapping[str, Any]) -> list[str]:
    """What `--fast` was given: a set of an enum's members."""
    return sorted(str(getattr(item, "value", item)) for item in arguments.get("fast") or ())


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
