"""LoRA and hooks on a CLIP whose weights are in a service: the bits of local loading."""

from __future__ import annotations

import importlib
import os
import signal
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.comfyui import checkpoint_makers, clip_services, services, test_clip
from tests.same import assert_same

comfy = services.comfy
folder = services.folder
inference = services.inference
serving = clip_services.serving
service = clip_services.service
embeddings = test_clip.embeddings
pair = test_clip.pair

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.usefixtures("inference"),
    pytest.mark.timeout(300),
    test_clip.each("sd1"),
]

#: kinds of adapters as their files have them, by what they hold for one layer of [768, 768]
KINDS = {
    "lora with dora": {"lora_up": (768, 4), "lora_down": (4, 768), "dora_scale": (768, 1)},
    "loha": {
        "hada_w1_a": (768, 4),
        "hada_w1_b": (4, 768),
        "hada_w2_a": (768, 4),
        "hada_w2_b": (4, 768),
    },
    "lokr": {"lokr_w1": (8, 8), "lokr_w2": (96, 96)},
    "difference": {"diff": (768, 768), "diff_b": (768,)},
}
_BARE = ("hada", "lokr", "diff", "dora")


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Three files' tensors."""
    folder = tmp_path_factory.mktemp("loras")
    found = []
    for seed in (12, 13, 14):
        path = folder / f"{seed}.safetensors"
        checkpoint_makers.write_lora(path, seed)
        found.append(load_file(path))
    return found


@pytest.fixture
def load(comfy):
    """What LoraLoader does with a CLIP alone."""

    def with_loras(clip: Any, *loras: tuple[dict[str, torch.Tensor], float]) -> Any:
        for lora, strength in loras:
            clip = comfy.sd.load_lora_for_models(None, clip, lora, 0.0, strength)[1]
        return clip

    return with_loras


@pytest.fixture
def encode(comfy):
    return test_clip.encode(comfy)


def adapter(kind: str) -> dict[str, torch.Tensor]:
    """One layer's, of that kind."""
    generator = torch.Generator().manual_seed(31)
    name = "lora_te_text_model_encoder_layers_3_self_attn_q_proj"
    return {
        f"{name}.{part}" + ("" if part.startswith(_BARE) else ".weight"): torch.randn(
            shape, generator=generator
        )
        * 0.1
        for part, shape in KINDS[kind].items()
    }


def sent(service) -> int:
    """How often clients sent tensors of patches."""
    methods = service._endpoint.call("status", (), {}, 10.0)["queue"]["methods"]
    return methods.get("comfyui_tensors", {"calls": 0})["calls"]


def test_the_node_gives_the_same_bits(comfy, pair, encode, loras, tmp_path, monkeypatch):
    folder_paths = importlib.import_module("folder_paths")
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"})
    )
    save_file(loras[0], tmp_path / "style.safetensors")
    node = comfy.nodes.LoraLoader()

    def work(clip):
        return encode(node.load_lora(None, clip, "style.safetensors", 1.0, 0.8)[1])

    patched = pair.check(work)
    assert not torch.equal(patched[0][0], encode(pair.remote)[0][0])


@pytest.mark.parametrize("strength", [0.7, 1.0, -0.3, 2.5, 0.0])
def test_every_strength_gives_the_same_bits(pair, encode, load, loras, strength):
    pair.check(lambda clip: encode(load(clip, (loras[0], strength))))


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 1, 2), (2, 0, 1), (0, 0)])
def test_every_order_gives_the_same_bits(pair, encode, load, loras, order):
    chosen = [(loras[number], 0.5 + 0.2 * number) for number in order]
    pair.check(lambda clip: encode(load(clip, *chosen)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_gives_the_same_bits(pair, encode, load, kind):
    patched = pair.check(lambda clip: encode(load(clip, (adapter(kind), 0.8))))
    assert not torch.equal(patched[0][0], encode(pair.remote)[0][0])


def test_a_lora_on_one_of_two_clones_stays_with_it(pair, encode, load, loras):
    plain = encode(pair.local)
    first, second = pair.remote.clone(), pair.remote.clone()
    patched = load(first, (loras[0], 1.0))
    expected = encode(load(pair.local, (loras[0], 1.0)))
    for _ in range(2):
        test_clip.assert_same_conditioning(encode(patched), expected)
        for other in (first, second, pair.remote):
            test_clip.assert_same_conditioning(encode(other), plain)


def test_clones_of_a_patched_clip_go_apart(pair, encode, load, loras):
    def work(clip):
        base = load(clip, (loras[0], 0.5))
        more, other = load(base.clone(), (loras[1], 0.5)), load(base, (loras[2], 0.3))
        return [encode(each)[0] for each in (base, more, other, base)]

    pair.check(work)


def test_clip_skip_and_lora_together_give_the_same_bits(comfy, pair, encode, load, loras):
    skip = comfy.nodes.CLIPSetLastLayer()
    pair.check(lambda c: encode(load(skip.set_last_layer(c, -2)[0], (loras[0], 0.6))))
    pair.check(lambda c: encode(skip.set_last_layer(load(c, (loras[0], 0.6)), -3)[0]))


def test_the_same_tensors_are_sent_once(pair, encode, load, loras, service):
    fresh = {key: value + 0.25 for key, value in loras[0].items()}
    before = sent(service)
    encode(load(pair.remote, (fresh, 1.0)))
    assert sent(service) == before + 1
    again = {key: value.clone() for key, value in fresh.items()}
    encode(load(pair.remote, (fresh, 0.5)))
    encode(load(pair.remote, (again, 0.7)))
    assert sent(service) == before + 1


def test_a_restarted_service_is_sent_them_again(comfy, pair, encode, load, loras, serving):
    local, remote = (load(clip, (loras[0], 0.9)) for clip in pair)
    encode(remote)
    os.kill(serving.ready["clip"]["pid"], signal.SIGKILL)
    # another prompt, since the first one is remembered
    again = test_clip.encode(comfy, "after the end")
    test_clip.assert_same_conditioning(again(remote), again(local))


@pytest.mark.parametrize("schedule", [False, True])
def test_hooked_loras_give_the_same_bits(comfy, pair, encode, loras, schedule):
    hooks = importlib.import_module("comfy.hooks")

    def work(clip):
        group = hooks.create_hook_lora(loras[0], strength_model=0.0, strength_clip=0.9)
        if schedule:
            frames = hooks.HookKeyframeGroup()
            frames.add(hooks.HookKeyframe(strength=1.0, start_percent=0.0))
            frames.add(hooks.HookKeyframe(strength=0.2, start_percent=0.5))
            group.set_keyframes_on_hooks(frames)
        node = importlib.import_module("comfy_extras.nodes_hooks").SetClipHooks()
        return encode(node.apply_hooks(clip, schedule, False, group)[0])

    found = pair.check(work)
    assert len(found) == (2 if schedule else 1)
    assert not torch.equal(found[0][0], encode(pair.remote)[0][0])


def test_a_hooked_lora_over_a_lora_gives_the_same_bits(pair, encode, load, loras):
    hooks = importlib.import_module("comfy.hooks")
    node = importlib.import_module("comfy_extras.nodes_hooks").SetClipHooks()

    def work(clip):
        group = hooks.create_hook_lora(loras[1], strength_model=0.0, strength_clip=-0.4)
        return encode(node.apply_hooks(load(clip, (loras[0], 0.8)), False, True, group)[0])

    found = pair.check(work)
    assert "hooks" in found[0][1]


def test_a_patched_model_given_back_is_the_plain_one(pair, encode, load, loras):
    plain = encode(pair.local)
    for lora in loras:
        encode(load(pair.remote, (lora, 1.0)))
        assert_same(encode(pair.remote)[0][0], plain[0][0])
