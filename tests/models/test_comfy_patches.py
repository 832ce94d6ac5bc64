"""Patches as data and back, with stand-ins for ComfyUI's adapters."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from luna_mp.errors import Rejected, Unsendable
from luna_mp.models import comfy_patches
from luna_mp.models.content import digest

WEIGHT = torch.ones(2, 2)


class Base:
    def __init__(self, loaded_keys, weights):
        self.loaded_keys = loaded_keys
        self.weights = weights


class LoRAAdapter(Base):
    pass


@pytest.fixture(autouse=True)
def adapters(monkeypatch):
    module = ModuleType("comfy.weight_adapter")
    module.WeightAdapterBase = Base
    module.adapters = [LoRAAdapter]
    monkeypatch.setitem(sys.modules, "comfy", ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.weight_adapter", module)


def no_origin(model, key):
    raise AssertionError("nothing of another model is in it")


def crossed(patches, origin=no_origin):
    recipe, tensors = comfy_patches.write(patches, "here", digest)
    assert comfy_patches.digests(recipe) == tensors.keys()
    return comfy_patches.read(recipe, tensors, origin)


def test_a_lora_comes_back_as_it_was():
    adapter = LoRAAdapter({"up", "down"}, (WEIGHT, WEIGHT * 2, 4.0, None, None))
    [(strength, found, *rest)] = crossed({"w": [(0.7, adapter, 1.0, None, None)]})["w"]
    assert (strength, rest) == (0.7, [1.0, None, None])
    assert isinstance(found, LoRAAdapter) and found.loaded_keys == {"up", "down"}
    assert torch.equal(found.weights[1], WEIGHT * 2)
    assert found.weights[2:] == (4.0, None, None)


def test_order_and_kinds_of_containers_stay():
    entries = [(1.0, ("diff", (WEIGHT, {"pad": True})), 1.0, None, None), (2.0, [1, "a"], 1.0)]
    found = crossed({"b": entries, "a": entries[:1]})
    assert list(found) == ["b", "a"]
    assert found["b"][0][1][0] == "diff" and found["b"][0][1][1][1] == {"pad": True}
    assert found["b"][1] == (2.0, [1, "a"], 1.0)


def test_one_tensor_in_two_places_is_sent_once():
    _, tensors = comfy_patches.write({"a": [(WEIGHT, WEIGHT.clone())]}, "here", digest)
    assert len(tensors) == 1


def test_tensors_are_found_whatever_a_weight_is_called():
    crossed({"tensor": [(1.0, ("diff", (WEIGHT,)), 1.0)], "value": [(1.0, {"tensor": WEIGHT})]})


def test_a_weight_of_the_services_own_is_named():
    weight = torch.empty(2, device="meta")
    setattr(weight, comfy_patches.ORIGIN, ("here", {"paths": ["x"]}, "some.key"))
    found = crossed({"w": [(1.0, (weight, abs), 1.0)]}, lambda model, key: (model, key))
    assert found["w"][0][1] == ({"paths": ["x"]}, "some.key")


@pytest.mark.parametrize("theirs", ["", "elsewhere"])
def test_a_weight_of_another_place_is_refused(theirs):
    weight = WEIGHT.clone()
    if theirs:
        setattr(weight, comfy_patches.ORIGIN, (theirs, None, "key"))
    with pytest.raises(Unsendable, match=theirs or "in this process"):
        crossed({"w": [(1.0, (weight, abs), 1.0)]})


@pytest.mark.parametrize("value", [abs, object(), torch.empty(2, device="meta")])
def test_what_is_no_data_is_refused(value):
    with pytest.raises(Unsendable, match="a patch holds a"):
        crossed({"w": [(1.0, value, 1.0)]})


@pytest.mark.parametrize(
    "told",
    [
        *(("weights", 1), "text", (), None),
        *(("tensor", 1), ("tensor", "never sent"), ("origin", {}, 1)),
        *(("tuple", 1), ("list", None), ("list", ("text",)), ("dict", 5), ("dict", (1, 2))),
        *(("adapter", "Base", (), ("value", None)), ("adapter", "LoRAAdapter", 1, ("value", None))),
    ],
)
def test_what_was_not_written_by_us_is_refused(told):
    with pytest.raises(Rejected):
        comfy_patches.read((("w", told),), {}, no_origin)
