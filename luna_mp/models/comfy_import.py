"""ComfyUI as a library, headless, in this process.

Only a service may do that, since it puts ComfyUI's directory, with its top-level modules, on the
import path.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from luna_mp.errors import BadConfig

__all__ = ("import_comfy",)


def import_comfy(
    directory: str, device: torch.device, flags: Sequence[str] = (), gpu_only: bool = True
) -> Any:
    """Import `comfy.sd` from a ComfyUI checkout; the command line stays ours. Raises `BadConfig`.

    The first call of a process decides the device, "cpu" or else the first GPU, where ComfyUI
    then keeps models and (with `gpu_only`) results, and the `flags` of its own command line.
    """
    root = Path(directory).resolve()
    if not (root / "comfy" / "sd.py").is_file():
        raise BadConfig(f"no ComfyUI in {directory}: name the directory that holds comfy/sd.py")
    if "comfy.sd" not in sys.modules:
        sys.path.insert(0, str(root))
    try:
        arguments = _arguments(flags)
        if "comfy.model_management" not in sys.modules:
            arguments.cpu = device.type == "cpu"
            arguments.gpu_only = gpu_only and device.type != "cpu"
        comfy = importlib.import_module("comfy.sd")
        # Newer versions leave this to who starts them.
        management = importlib.import_module("comfy.model_management")
        getattr(management, "set_cudnn_benchmark", lambda: None)()
    except (ImportError, RuntimeError, AttributeError, OSError) as exc:
        raise BadConfig(
            f"cannot import ComfyUI from {directory} in {sys.executable} "
            f"({type(exc).__name__}: {exc}): run the service with ComfyUI's own interpreter"
        ) from exc
    if not Path(str(comfy.__file__)).resolve().is_relative_to(root):
        text = f"ComfyUI was imported from {comfy.__file__} before, not from {directory}"
        raise BadConfig(f"{text}: use one ComfyUI per process")
    return comfy


def _arguments(flags: Sequence[str]) -> Any:
    """ComfyUI's arguments, parsed by itself from `flags` where this is the first import of them.

    Raises `BadConfig`; what its parser has to say stands in the service's log.
    """
    options: Any = importlib.import_module("comfy.options")
    before = sys.argv, options.args_parsing
    sys.argv, options.args_parsing = ["main.py", *flags], True
    try:
        return importlib.import_module("comfy.cli_args").args
    except SystemExit as exc:
        text = f"ComfyUI does not take the flags {' '.join(flags)!r}"
        raise BadConfig(f"{text}: see its main.py --help") from exc
    finally:
        sys.argv, options.args_parsing = before
