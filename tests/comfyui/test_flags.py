"""The flags that a service gets from the ComfyUI that starts it."""

from __future__ import annotations

import pytest

from luna_mp.models.comfy_facts import option
from tests.comfyui import services

comfy = services.comfy

pytestmark = pytest.mark.comfyui


def test_flags_are_spelled_as_comfyui_takes_them(comfy):
    from comfy.cli_args import args, parser

    from luna_mp.integrations.comfyui_loaders import _FLAGS

    known = [name for name in _FLAGS if hasattr(args, name)]
    assert {"fp8_e4m3fn_text_enc", "fp16_vae", "deterministic"} <= set(known)
    for name in known:
        assert getattr(parser.parse_args([option(name)]), name) is True
