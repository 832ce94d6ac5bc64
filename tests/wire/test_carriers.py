"""The contract that every carrier keeps: shape, dtype, strides, privacy."""

from __future__ import annotations

import pytest
import torch

from luna_mp.errors import Rejected, Unsendable
from luna_mp.wire import layout
from luna_mp.wire.copies import copied
from luna_mp.wire.inline import InlineCarrier
from luna_mp.wire.layout import DTYPES
from luna_mp.wire.shm import ShmCarrier
from tests.same import assert_same
from tests.wire.pair import channels, crossed

BIG = 40_000  # elements; more than what is sent inline for being small


def plain(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(BIG * 4, dtype=torch.int32).view(torch.uint8)[: BIG * 4].view(dtype)


CASES = {
    "plain": lambda: torch.rand(BIG),
    "small": lambda: torch.rand(3),
    "scalar": lambda: torch.tensor(3.5),
    "empty": lambda: torch.empty(0, 3),
    "channels last view": lambda: torch.rand(1, 3, 200, 100).movedim(1, -1),
    "every other row": lambda: torch.rand(400, 300)[::2],
    "one column": lambda: torch.rand(BIG, 7)[:, 2],
    "expanded": lambda: torch.rand(1).expand(300, 300),
    "expanded with gaps": lambda: torch.rand(2, 1, 9, BIG)[:, :, ::3].expand(2, 4, 3, BIG),
    "overlapping": lambda: torch.rand(BIG).unfold(0, 10, 1),
    "conjugate": lambda: torch.rand(BIG, dtype=torch.complex64).conj(),
    "conjugate with gaps": lambda: torch.rand(BIG, dtype=torch.complex64)[::2].conj(),
    "conjugate expanded": lambda: torch.rand(300, dtype=torch.complex64).expand(300, 300).conj(),
    "conjugate overlapping": lambda: torch.rand(BIG, dtype=torch.cfloat).unfold(0, 10, 1).conj(),
    "negated": lambda: torch.rand(300, 300, dtype=torch.complex64).conj().imag.T,
    "NaN": lambda: torch.full((BIG,), float("nan")),
    "inference": lambda: _in_inference_mode(),
    "with gradient": lambda: torch.rand(BIG, requires_grad=True),
}


def _in_inference_mode() -> torch.Tensor:
    with torch.inference_mode():
        return torch.rand(BIG)


@pytest.fixture(params=[InlineCarrier, ShmCarrier], ids=lambda carrier: carrier.name)
def ends(request):
    with channels(request.param) as pair:
        yield pair


@pytest.mark.parametrize("case", CASES)
def test_layout_survives(ends, case):
    tensor = CASES[case]()
    assert_same(crossed(*ends, tensor), tensor.detach())


@pytest.mark.parametrize("case", CASES)
def test_a_copy_is_the_same_in_memory_of_its_own(case):
    tensor = CASES[case]().detach()
    copy = copied(tensor)
    assert_same(copy, tensor)
    assert not copy.numel() or copy.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("name", [n for n in sorted(DTYPES) if DTYPES[n].itemsize])
def test_dtype_survives(ends, name):
    dtype = DTYPES[name]
    try:
        tensor = plain(dtype)
    except RuntimeError:
        pytest.skip(f"torch cannot view bytes as {name}")
    assert_same(crossed(*ends, tensor), tensor)


def test_result_is_writable_and_private(ends):
    sent = torch.zeros(BIG)
    first = crossed(*ends, sent)
    first += 1
    second = crossed(*ends, sent)
    assert sent.eq(0).all()
    assert first.eq(1).all()
    assert second.eq(0).all()


def test_result_outlives_its_connection():
    with channels(ShmCarrier) as ends:
        got = crossed(*ends, torch.ones(BIG))
    assert got.sum() == BIG


def test_one_tensor_in_two_places_is_one_tensor_again(ends):
    tensor = torch.rand(BIG)
    first, second = crossed(*ends, [tensor, tensor])
    assert first is second


def test_sparse_tensor_is_refused_with_its_path(ends):
    with pytest.raises(Unsendable, match=r'value\["a"\]\[1\]: .*sparse'):
        ends[0].send({"value": {"a": [1, torch.eye(3).to_sparse()]}}, None)


def test_channel_goes_on_after_a_refusal(ends):
    with pytest.raises(Unsendable):
        ends[0].send({"value": [torch.rand(BIG), print]}, None)
    tensor = torch.rand(BIG)
    assert_same(crossed(*ends, tensor), tensor)


@pytest.mark.parametrize(
    "description",
    [f"float32:{1 << 40}:0:packed", f"float32:2,2:{1 << 40},1"],
    ids=["a number repeated", "a gap"],
)
def test_a_small_message_cannot_stand_for_a_huge_tensor(description):
    with pytest.raises(Rejected, match="over the limit"):
        layout.parse(description, 1 << 20)


@pytest.mark.parametrize(
    "description",
    [
        None,
        ("float32:1:1",),
        "",
        "float32:1",
        "float32:1:1:",
        "float32:1:1:packed:packed",
        "float32:1,2:1",
        "float33:1:1",
        "float32:-1:1",
        "float32:1.0:1",
        "float32:1:x",
        f"float32:{1 << 62}:1",
        "float32:" + ",".join("1" * 65) + ":" + ",".join("1" * 65),
        "float32:01:1",
        "float32: 1:1",
        "float32:+1:1",
        "float32:1_0:1",
        "float32:\u0661:1",
        "float32:\ud800:1",
    ],
)
def test_a_description_that_fits_no_tensor_is_refused(description):
    with pytest.raises(Rejected, match="malformed|impossible"):
        layout.parse(description, 1 << 20)


@pytest.mark.parametrize("dtype", layout.DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 4), (1,) * 64])
def test_a_description_is_read_as_it_was_written(dtype, shape):
    how = layout.layout_of(layout.DTYPES[dtype], shape, torch.empty(shape).stride())
    assert layout.parse(how.text, 1 << 20) == how


def test_descriptions_of_views_are_read_as_they_were_written():
    tensor = torch.rand(4, 6)
    for view in (tensor.T, tensor[:, ::5], tensor[:1].expand(9, 6), tensor[:0]):
        how, _ = layout.describe(view)
        assert layout.parse(how.text, 1 << 20) == how


def test_a_description_that_holds_itself_over_and_over_is_refused_at_once():
    nested = ()
    for _ in range(100):
        nested = (nested, nested)
    with pytest.raises(Rejected, match="malformed"):
        layout.parse(nested, 1 << 20)
