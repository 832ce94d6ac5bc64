"""Names of contents: what counts and what does not."""

from __future__ import annotations

import pytest
import torch

from luna_mp.models.content import digest, fingerprint

BASE = torch.arange(6, dtype=torch.float32).reshape(2, 3)


@pytest.mark.parametrize(
    "same",
    [BASE.clone(), BASE.t().contiguous().t(), BASE.repeat(1, 2)[:, :3]],
    ids=["copy", "other strides", "view"],
)
def test_where_and_how_it_lies_does_not_count(same):
    assert digest(same) == digest(BASE)


@pytest.mark.parametrize(
    "other",
    [BASE + 1e-6, BASE.reshape(3, 2), BASE.double(), BASE.view(torch.int32), BASE[:1]],
    ids=["values", "shape", "dtype", "dtype of the same bytes", "size"],
)
def test_what_it_is_counts(other):
    assert digest(other) != digest(BASE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.float8_e4m3fn, torch.int64])
def test_every_dtype_has_a_name(dtype):
    assert digest(torch.ones(3).to(dtype)) != digest(torch.zeros(3).to(dtype))


def test_tensors_without_elements_have_names():
    assert digest(torch.empty(0)) != digest(torch.empty(0, 2))


def test_a_scalar_is_not_a_list_of_one():
    assert digest(torch.tensor(1.0)) != digest(torch.tensor([1.0]))


def test_what_is_no_number_has_a_name():
    nan = torch.tensor([float("nan"), 1.0])
    assert digest(nan) == digest(nan.clone())
    assert digest(nan) != digest(nan.flip(0))


def test_zeros_of_either_sign_have_other_bits_and_another_name():
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))


def test_a_weight_that_is_trained_has_its_contents_name():
    assert digest(torch.nn.Parameter(BASE)) == digest(BASE)


def test_a_name_of_data_goes_by_its_tensors_values():
    assert fingerprint({"a": [1, BASE]}) == fingerprint({"a": [1, BASE.clone()]})
    assert fingerprint({"a": [1, BASE]}) != fingerprint({"a": [1, BASE + 1]})


def test_lists_and_tuples_of_the_same_items_have_one_name():
    assert fingerprint(([1, BASE], "a")) == fingerprint([(1, BASE), "a"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (float("nan"), None),
        (float("inf"), float("-inf")),
        (BASE, digest(BASE)),
        (1, 1.0),
        (1, True),
        (1, "1"),
        (0, None),
        ([1, 2], [2, 1]),
        ([[1], 2], [1, [2]]),
        ({"a": 1}, {"b": 1}),
        (0.1, 0.1 + 1e-17 * 4),
    ],
)
def test_other_data_has_another_name(one, other):
    assert fingerprint(one) != fingerprint(other)


def test_code_has_no_name():
    with pytest.raises(TypeError, match="a function has no name"):
        fingerprint([len, lambda: None][1:])
