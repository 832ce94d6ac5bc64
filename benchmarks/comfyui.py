"""Stock ComfyUI's VAEDecode and CLIPTextEncode, local against proxy, on one GPU.

`COMFYUI_PATH=… python -m benchmarks.comfyui OUTPUT_FOLDER` writes comfyui.json and comfyui.md. The
models are SDXL's architectures with random weights, loaded by ComfyUI's own loaders on both sides;
latents come from the CPU and images go there, as ComfyUI has it. Each use of the proxy follows a
local one, with which it is compared, in time and in bits. Figures are medians, in milliseconds.
`network`: the network's work, or the call that stands for it and brings the result to the CPU.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch is imported: what ComfyUI itself sets on nearly every NVIDIA card.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")

import torch

import luna_mp
from benchmarks.gpu_report import where
from luna_mp.models.comfy_import import import_comfy
from tests.models import comfy_makers

EDGES = {512: 30, 1024: 30, 2048: 8}
PROMPTS = 30
NETWORKS = ("network", "proxy_network")
Way = Callable[[], Any]


def main() -> int:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    comfyui = os.environ["COMFYUI_PATH"]
    # ComfyUI as it runs by default: results on the CPU, models where there is room
    comfy = import_comfy(comfyui, torch.device("cuda"), gpu_only=False)
    with tempfile.TemporaryDirectory() as models, torch.inference_mode():
        files = comfy_makers.write_sdxl(Path(models))
        with luna_mp.serve(
            clip="cuda", vae="cuda", comfyui=comfyui, runtime_dir=f"{models}/run", **files
        ):
            os.environ["LUNA_MP_RUNTIME_DIR"] = f"{models}/run"
            report = {**where(), "allocator": torch.cuda.get_allocator_backend()}
            report |= {**_vae(comfy, files), **_clip(comfy, files)}
    (folder / "comfyui.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "comfyui.md").write_text(_table(report))
    print(_table(report))  # noqa: T201
    return 0


def _vae(comfy: Any, files: dict[str, Any]) -> dict[str, Any]:
    from luna_mp.integrations import comfyui
    from luna_mp.integrations.comfyui_service import service

    state = comfy.comfy.utils.load_torch_file(files["vae_models"][0])
    local = comfy.VAE(sd=state)
    remote, differences = comfyui.load_vae(service("vae"))
    rows = []
    networks = [_timed(vae.first_stage_model) for vae in (local, remote)]
    for edge, rounds in EDGES.items():
        latents = torch.randn(rounds + 3, 1, 4, edge // 8, edge // 8)
        pairs = [_pair(lambda z=z: local.decode(z), lambda z=z: remote.decode(z)) for z in latents]
        # Of two local ones the second is counted.
        here, there = networks[0][-2 * rounds + 1 :: 2], networks[1][-rounds:]
        network = {
            "network": statistics.median(here),
            "proxy_network": statistics.median(there),
        }
        rows.append({"what": f"VAEDecode {edge}²", **_summary(pairs[3:]), **network})
    return {"vae": rows, "carrier": service("vae").carrier, "differences": differences}


def _clip(comfy: Any, files: dict[str, Any]) -> dict[str, Any]:
    from luna_mp.integrations import comfyui
    from luna_mp.integrations.comfyui_service import service

    local = comfy.load_clip(list(files["clip_models"]))
    remote, _ = comfyui.load_clip(service("clip"))

    def encode(clip: Any, text: str) -> torch.Tensor:
        cond: torch.Tensor = clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0]
        return cond

    prompts = [f"a photo of {n} red cats on a hill, at noon, number {n}" for n in range(PROMPTS)]
    pairs = [
        _pair(lambda p=p: encode(local, p), lambda p=p: encode(remote, p))
        for p in ["warm", "up", *prompts]
    ]
    again = [_pair(lambda p=p: encode(local, p), lambda p=p: encode(remote, p)) for p in prompts]
    # which remembers nothing itself
    other, _ = comfyui.load_clip(service("clip"))
    others = [_pair(lambda p=p: encode(local, p), lambda p=p: encode(other, p)) for p in prompts]
    return {
        "clip": [
            {"what": "CLIPTextEncode, new prompt", **_summary(pairs[2:])},
            {"what": "CLIPTextEncode, same prompt", **_summary(again)},
            {"what": "CLIPTextEncode, prompt of another worker", **_summary(others)},
        ]
    }


def _timed(network: Any) -> list[float]:
    """Milliseconds of each of its decodes from now on, until the GPU is done."""
    times: list[float] = []
    decode = network.decode

    def timed(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = decode(*args, **options)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
        return result

    network.decode = timed
    return times


def _pair(local: Way, proxy: Way) -> tuple[float, float]:
    """Milliseconds of each, right after work of this process on the GPU; results are the same bits.

    So both find the GPU as a sampler leaves it: to come from another process takes it a while.
    """
    local()
    (here, mine), (there, got) = map(_taken, (local, proxy))
    assert torch.equal(mine, got) and mine.stride() == got.stride()
    return here, there


def _taken(way: Way) -> tuple[float, torch.Tensor]:
    start = time.perf_counter()
    result = way()
    return 1e3 * (time.perf_counter() - start), result


def _summary(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """`ratio`: the median of those within one pair."""
    local, proxy = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(there / here for here, there in pairs)
    return {"local": local, "proxy": proxy, "ratio": ratio, "rounds": len(pairs)}


def _table(report: dict[str, Any]) -> str:
    head = (
        "# ComfyUI, local against proxy\n\n"
        "{card}, driver {driver}, torch {torch}, client allocator {allocator}, commit {commit}; "
        "VAE by {carrier}. Milliseconds, medians.\n\n"
        "| | local | of it network | proxy | of it network | ratio | rounds |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    row = (
        "| {what} | {local:.2f} | {network} | {proxy:.2f} | {proxy_network} | {ratio:.3f} | "
        "{rounds} |\n"
    )
    rows = report["vae"] + report["clip"]
    said = [
        {**each, **{key: f"{each[key]:.2f}" if key in each else "" for key in NETWORKS}}
        for each in rows
    ]
    return head.format(**report) + "".join(row.format(**each) for each in said)


if __name__ == "__main__":
    sys.exit(main())
