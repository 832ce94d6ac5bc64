"""A copy of ComfyUI whose largest text encoders are small; all else is as it was.

The numbers are those that no loader goes by when it tells families apart. A process can import one
ComfyUI, so that every test in this process has the copy.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest

_T5 = {"d_ff": 16, "num_heads": 1}
_CLIP_G = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
_CLIP_G |= {"projection_dim": 64}
#: of the class Gemma2_2B_Config
_GEMMA = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4}
GEMMA_PIECES = _GEMMA["vocab_size"]


@cache
def comfyui() -> str:
    """The copy's directory, gone when this process ends; skips where there is no original."""
    original = os.environ.get("COMFYUI_PATH")
    if not original:
        pytest.skip("COMFYUI_PATH names no ComfyUI", allow_module_level=True)
    pytest.importorskip("torchvision", reason="this ComfyUI cannot be imported: no torchvision")
    copy = Path(tempfile.mkdtemp(prefix="comfyui-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    for entry in Path(original).resolve().iterdir():
        if entry.name == "comfy":
            shutil.copytree(entry, copy / "comfy", ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (copy / entry.name).symlink_to(entry)
    _edit(copy / "comfy/clip_config_bigg.json", _CLIP_G)
    _edit(copy / "comfy/text_encoders/t5_config_xxl.json", _T5)
    _edit_gemma(copy / "comfy/text_encoders/llama.py")
    return str(copy)


def _edit(path: Path, numbers: dict[str, int]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | numbers))


def _edit_gemma(path: Path) -> None:
    before, found, after = path.read_text().partition("class Gemma2_2B_Config:")
    assert found
    for name, number in _GEMMA.items():
        after, count = re.subn(rf"{name}: int = \d+", f"{name}: int = {number}", after, count=1)
        assert count, name
    path.write_text(before + found + after)
