"""Weight files without their weights."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from luna_mp.errors import Rejected
from luna_mp.models import skeleton

STATE = {
    "b.weight": torch.randn(4, 3).half(),
    "a.bias": torch.randn(4),
    "pieces": torch.arange(7, dtype=torch.uint8),
    "quantised": torch.zeros(2, 2, dtype=torch.uint8),
    "scale": torch.tensor(3.0).to(torch.float8_e4m3fn),
}


@pytest.fixture(params=["file", "tensors"])
def described(request, tmp_path):
    if request.param == "tensors":
        return skeleton.describe_tensors(STATE)
    path = tmp_path / "model.safetensors"
    save_file(STATE, path, {"config": "{}"})
    return skeleton.describe_file(path)


def test_shapes_and_dtypes_come_back(described):
    found = skeleton.restore(described)
    assert {key: (t.shape, t.dtype) for key, t in found.items()} == {
        key: (t.shape, t.dtype) for key, t in STATE.items()
    }


def test_weights_do_not_come_along(described):
    found = skeleton.restore(described)
    assert [key for key, tensor in found.items() if not tensor.is_meta] == ["pieces", "scale"]


def test_a_tokenizer_comes_along_by_value(described):
    assert torch.equal(skeleton.restore(described)["pieces"], STATE["pieces"])


def test_a_scale_comes_along_by_value(described):
    assert skeleton.restore(described)["scale"].item() == 3


def test_metadata_come_along(tmp_path):
    save_file(STATE, tmp_path / "m.safetensors", {"config": "{}"})
    assert skeleton.describe_file(tmp_path / "m.safetensors")["metadata"] == {"config": "{}"}


def test_a_dtype_that_is_not_known_here_is_refused():
    described = {"tensors": {"w": ("float3", [2])}, "values": {}, "metadata": {}}
    with pytest.raises(Rejected, match="has no dtype 'float3'"):
        skeleton.restore(described)
