"""A process of ComfyUI's with clip skip, LoRA and prompts of its own, beside another one.

`python -m tests.comfyui.clip_client SEED CALLS MODEL COMFYUI` says "ready", waits, makes the calls
at the service that LUNA_MP_RUNTIME_DIR names, and says how many of them gave other bits than a CLIP
that this process loads itself.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from luna_mp.models.comfy_import import import_comfy
from tests.comfyui import checkpoint_makers
from tests.same import bits

LORAS = 3
PATCHED = "te_text_model_encoder_layers_2_"  # one layer shows in all that follow


def main(seed: int, calls: int, model: str, comfyui: str) -> None:
    # Some forks print what they find.
    with redirect_stdout(sys.stderr):
        comfy = import_comfy(comfyui, torch.device("cpu"))
    from luna_mp.integrations import comfyui as ours
    from luna_mp.integrations.comfyui_service import service

    local = comfy.load_clip([model])
    remote, _ = ours.load_clip(service("clip"), [model])
    work = [Variant(comfy, random.Random(seed + number), seed) for number in range(calls)]
    print("ready", flush=True)  # noqa: T201
    sys.stdin.readline()
    found = [each.encode(remote) for each in work]
    expected = [each.encode(local) for each in work]
    wrong = sum(not _same(*pair) for pair in zip(found, expected, strict=True))
    distinct = len({bits(cond).numpy().tobytes() for cond, _ in found})
    print(json.dumps({"wrong": wrong, "distinct": distinct}), flush=True)  # noqa: T201


class Variant:
    """One call: what it lays on the CLIP, and the prompt; another for every seed."""

    def __init__(self, comfy: Any, chance: random.Random, seed: int) -> None:
        self._comfy = comfy
        self._text = f"{seed} (cats:{chance.uniform(0.5, 1.5):.2f}) on hill {chance.random()}"
        self._skip = -chance.randint(1, 5)
        self._lora = lora(seed * LORAS + chance.randrange(LORAS))
        self._strength = chance.choice([0.0, 0.5, 0.9])

    def encode(self, clip: Any) -> tuple[torch.Tensor, torch.Tensor]:
        clip = self._comfy.load_lora_for_models(None, clip, self._lora, 0.0, self._strength)[1]
        clip = clip.clone()
        clip.clip_layer(self._skip)
        [[cond, more]] = clip.encode_from_tokens_scheduled(clip.tokenize(self._text))
        return cond, more["pooled_output"]


_loras: dict[int, dict[str, torch.Tensor]] = {}


def lora(seed: int) -> dict[str, torch.Tensor]:
    """Each process makes its own; none of them has one of another's."""
    if seed not in _loras:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "lora.safetensors"
            checkpoint_makers.write_lora(path, seed)
            found = load_file(path)
        _loras[seed] = {key: value for key, value in found.items() if PATCHED in key}
    return _loras[seed]


def _same(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...]) -> bool:
    return all(
        a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
        for a, b in zip(first, second, strict=True)
    )


if __name__ == "__main__":
    with torch.inference_mode():
        main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
