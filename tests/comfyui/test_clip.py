"""ComfyUI's own text nodes give the same with a CLIP whose weights are in a service."""

from __future__ import annotations

import copy
import importlib
from typing import Any, NamedTuple

import pytest
import torch

from luna_mp.errors import Rejected
from tests.comfyui import clip_makers, clip_services, services
from tests.same import assert_same

comfy = services.comfy
folder = services.folder
inference = services.inference
serving = clip_services.serving
service = clip_services.service

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.usefixtures("inference"),
    pytest.mark.timeout(300),
]

PROMPTS = {
    "plain": "a red cat",
    "empty": "",
    "weights": "a (red:1.3) cat and [a dog] on (((a hill))) (at noon:0.55)",
    "break": "a red cat BREAK two dogs BREAK",
    "escaped": r"a \(red\) cat: {1|2}",
    "long": "a red cat on a hill at noon, " * 30,
    "long with weights": "a (red:0.7) cat on (a hill:1.2) at noon, " * 20,
    "embedding": "a embedding:style cat, (embedding:style:1.2)",
    "missing embedding": "a embedding:nowhere cat",
}


class Pair(NamedTuple):
    """The same files loaded here and by the service."""

    local: Any
    remote: Any

    def check(self, work) -> Any:
        """Assert that both give the same conditioning; returns it."""
        local, remote = work(self.local), work(self.remote)
        assert_same_conditioning(remote, local)
        assert all(bool(torch.isfinite(tensor).all()) for tensor, _ in local)
        assert any(float(tensor.float().std()) > 0 for tensor, _ in local)
        return remote


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    found = tmp_path_factory.mktemp("embeddings")
    clip_makers.write_embedding(found / "style.safetensors", vectors=3)
    return str(found)


@pytest.fixture(scope="module")
def pair(request, comfy, folder, service, embeddings):
    parts, type_name = clip_makers.FAMILIES[request.param]
    with torch.inference_mode():
        paths = [str(clip_makers.write(part, folder / f"{part}.safetensors")) for part in parts]
        remote, warnings = comfy.remote.load_clip(
            service, paths, type_name, embedding_directory=[embeddings]
        )
        assert not warnings
        local = comfy.sd.load_clip(
            paths, [embeddings], getattr(comfy.sd.CLIPType, type_name.upper())
        )
        yield Pair(local, remote)


def each(*families: str):
    return pytest.mark.parametrize("pair", families, indirect=True, scope="module")


def extra(module: str, name: str, **inputs: Any) -> Any:
    """What a node of ComfyUI's extras gives, of either schema."""
    node = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
    if hasattr(node, "define_schema"):
        return node.execute(**inputs)[0]
    return getattr(node(), node.FUNCTION)(**inputs)[0]


def encode(comfy: Any, text: str = "a (red:1.2) cat") -> Any:
    return lambda clip: comfy.nodes.CLIPTextEncode().encode(clip, text)[0]


def assert_same_conditioning(got: Any, expected: Any) -> None:
    assert len(got) == len(expected)
    for (tensor, more), (expected_tensor, expected_more) in zip(got, expected, strict=True):
        assert_same(tensor, expected_tensor)
        assert list(more) == list(expected_more)
        for name, value in expected_more.items():
            if isinstance(value, torch.Tensor):
                assert_same(more[name], value)
            elif not name.startswith("hooks"):
                assert more[name] == value


@each("sd1")
@pytest.mark.parametrize("text", PROMPTS.values(), ids=PROMPTS.keys())
def test_every_form_of_prompt_gives_the_same_bits(comfy, pair, text):
    pair.check(encode(comfy, text))


@each("sd1")
def test_an_embedding_shows(comfy, pair):
    """Or the test of equality would hold for no embedding at all."""
    plain = encode(comfy, "a  cat")(pair.remote)
    assert not torch.equal(encode(comfy, "a embedding:style cat")(pair.remote)[0][0], plain[0][0])


@each("sdxl", "sd3", "flux", "lumina")
@pytest.mark.parametrize("name", ["weights", "long", "empty"])
def test_every_family_gives_the_same_bits(comfy, pair, name):
    pair.check(encode(comfy, PROMPTS[name]))


@each("sd1", "lumina")
@pytest.mark.parametrize("layer", [-1, -2, -4])
def test_clip_skip_gives_the_same_bits(comfy, pair, layer):
    skip = comfy.nodes.CLIPSetLastLayer()
    pair.check(lambda clip: encode(comfy)(skip.set_last_layer(clip, layer)[0]))


@each("sd1")
def test_clip_skip_of_a_clone_stays_with_it(comfy, pair):
    before = encode(comfy)(pair.remote)
    skipped = comfy.nodes.CLIPSetLastLayer().set_last_layer(pair.remote, -3)[0]
    assert not torch.equal(encode(comfy)(skipped)[0][0], before[0][0])
    assert_same_conditioning(encode(comfy)(pair.remote), before)


@each("sdxl")
def test_the_node_of_sdxl_gives_the_same_bits(pair):
    sizes = {"width": 1024, "height": 768, "crop_w": 8, "crop_h": 0}
    sizes |= {"target_width": 1024, "target_height": 1024}
    texts = {"text_g": "a (red:1.1) cat", "text_l": "a dog " * 40}
    pair.check(
        lambda clip: extra("nodes_clip_sdxl", "CLIPTextEncodeSDXL", clip=clip, **sizes, **texts)
    )


@each("sd3")
@pytest.mark.parametrize("padding", ["none", "empty_prompt"])
def test_the_node_of_sd3_gives_the_same_bits(pair, padding):
    texts = {"clip_l": "a cat", "clip_g": "", "t5xxl": "a (red:1.1) cat"}
    pair.check(
        lambda clip: extra(
            "nodes_sd3", "CLIPTextEncodeSD3", clip=clip, empty_padding=padding, **texts
        )
    )


@each("flux")
def test_the_node_of_flux_gives_the_same_bits(pair):
    texts = {"clip_l": "a cat", "t5xxl": "a (red:1.1) cat on a hill " * 30, "guidance": 3.5}
    pair.check(lambda clip: extra("nodes_flux", "CLIPTextEncodeFlux", clip=clip, **texts))


@each("flux")
def test_options_of_a_tokenizer_give_the_same_bits(comfy, pair):
    sizes = {"min_padding": 8, "min_length": 300}
    found = pair.check(
        lambda clip: encode(comfy)(extra("nodes_cond", "T5TokenizerOptions", clip=clip, **sizes))
    )
    assert found[0][0].shape[1] >= 300


@each("sd1", "sdxl")
def test_results_go_on_through_other_nodes(comfy, pair):
    nodes = comfy.nodes
    average, concat = nodes.ConditioningAverage(), nodes.ConditioningConcat()

    def work(clip):
        first, second = encode(comfy, "a cat")(clip), encode(comfy, "dogs " * 90)(clip)
        mixed = average.addWeighted(first, second, 0.3)[0]
        return concat.concat(mixed, second)[0]

    pair.check(work)


@each("sd1", "sdxl", "lumina")
def test_all_forms_of_encoding_give_the_same(pair):
    def forms(clip):
        tokens = clip.tokenize("a (red:1.2) cat")
        cond, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
        whole = clip.encode_from_tokens(tokens, return_pooled=True, return_dict=True)
        short = clip.encode_from_tokens(tokens, return_pooled="unprojected")
        return [(cond, {"pooled": pooled}), (whole.pop("cond"), whole), (short[0], {"p": short[1]})]

    pair.check(forms)


@each("sd1")
def test_results_are_writable_and_private(comfy, pair):
    first = encode(comfy)(pair.remote)
    kept = copy.deepcopy(first)
    first[0][0].zero_()
    first[0][1]["pooled_output"].fill_(1.0)
    assert_same_conditioning(encode(comfy)(pair.remote), kept)


@each("sd1")
def test_a_repeated_prompt_does_not_go_to_the_service_again(comfy, pair, service):
    first = encode(comfy, "a prompt of its own")(pair.remote)
    before = encodings(service)
    again = encode(comfy, "a prompt of its own")(pair.remote)
    assert_same_conditioning(again, first)
    assert encodings(service) == before
    skipped = comfy.nodes.CLIPSetLastLayer().set_last_layer(pair.remote, -2)[0]
    encode(comfy, "a prompt of its own")(skipped)
    assert encodings(service) == before + 1


def encodings(service) -> int:
    """Calls for an encoding that the service has had."""
    status = service._endpoint.call("status", (), {}, 10.0)
    return status["queue"]["methods"]["comfyui_encode"]["calls"]


@each("sd1")
def test_a_deep_copy_gives_the_same_bits(comfy, pair):
    held = copy.deepcopy({"clip": pair.remote})["clip"]
    assert_same_conditioning(encode(comfy)(held), encode(comfy)(pair.local))


@each("sd1")
def test_comfyui_may_load_and_unload_it_as_any_model(comfy, pair):
    before = encode(comfy)(pair.remote)
    comfy.management.load_models_gpu([pair.remote.patcher, pair.local.patcher])
    comfy.management.unload_all_models()
    comfy.management.free_memory(1 << 60, torch.device("cpu"))
    assert_same_conditioning(encode(comfy)(pair.remote), before)


@each("sd1")
def test_keys_of_the_model_are_the_same(pair):
    local, remote = (clip.cond_stage_model.state_dict() for clip in pair)
    assert list(remote) == list(local)
    assert {key: value.shape for key, value in remote.items()} == {
        key: value.shape for key, value in local.items()
    }
    assert all(value.is_meta for value in remote.values())


@each("sd1")
@pytest.mark.parametrize(
    "work",
    [
        lambda clip: clip.get_sd(),
        lambda clip: clip.load_sd({}),
        lambda clip: clip.cond_stage_model.clip_l.transformer(torch.zeros(1, 77)),
    ],
    ids=["save", "load", "run"],
)
def test_what_needs_the_weights_here_is_refused(pair, work):
    with pytest.raises(Rejected, match="load the model with mode 'local'"):
        work(pair.remote)


@each("sd1")
def test_saving_by_a_node_is_refused(pair, tmp_path):
    merging = importlib.import_module("comfy_extras.nodes_model_merging")
    node = merging.CLIPSave()
    node.output_dir = str(tmp_path)
    with pytest.raises(Rejected, match="saving a CLIP needs .* mode 'local'"):
        node.save(pair.remote, "clip/saved")
    assert not list(tmp_path.rglob("*.safetensors"))


@each("sd1")
@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("CLIPMergeSimple", {"ratio": 0.3}),
        ("CLIPAdd", {}),
        ("CLIPSubtract", {"multiplier": 0.1}),
    ],
)
def test_merges_give_the_same_bits(comfy, pair, folder, service, name, inputs):
    path = str(clip_makers.write("clip_l", folder / "other.safetensors", seed=22))
    others = comfy.sd.load_clip([path]), comfy.remote.load_clip(service, [path])[0]

    def merged(clip):
        other = others[clip is pair.remote]
        found = extra("nodes_model_merging", name, clip1=clip, clip2=other, **inputs)
        return encode(comfy)(found)

    result = pair.check(merged)
    assert not torch.equal(result[0][0], encode(comfy)(pair.local)[0][0])
