"""Data crosses, code does not."""

from __future__ import annotations

import collections
import os
import pickle
import pickletools
import weakref

import numpy as np
import pytest
import torch

from luna_mp.errors import Rejected, Unsendable
from luna_mp.wire import codec


def no_tensor(_):
    raise AssertionError("no tensor was sent")


def crossed(value):
    return codec.loads(codec.Writer().dumps({"value": value}, no_tensor), no_tensor)["value"]


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        1 << 200,
        -0.0,
        float("inf"),
        "\ud800 lone surrogate",
        b"\x00",
        (1, (2, [3, (4,)])),
        {"a": {1: None, (2, 3): "x"}},
        {1, 2},
        frozenset({1}),
        bytearray(b"x"),
    ],
    ids=repr,
)
def test_data_survives_with_its_types(value):
    assert repr(crossed(value)) == repr(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"positive": [0, 1, print]}, r'args\["positive"\]\[2\]: builtin_function_or_method'),
        ([object()], r"args\[0\]: object"),
        ((1, collections.OrderedDict()), r"args\[1\]: OrderedDict"),
        ({"n": np.float32(1)}, r'args\["n"\]: float32'),
        ({(1, os): 2}, r"args, a key\[1\]: module"),
    ],
)
def test_what_is_not_data_is_refused_with_its_path(value, message):
    with pytest.raises(Unsendable, match=message):
        codec.Writer().dumps({"args": value}, no_tensor)


def test_message_after_one_that_was_refused_is_whole():
    writer = codec.Writer()
    with pytest.raises(Unsendable):
        writer.dumps({"args": ["some of it", print]}, no_tensor)
    assert codec.loads(writer.dumps({"value": 1}, no_tensor), no_tensor) == {"value": 1}


def test_tensors_of_a_message_are_not_kept():
    writer, tensor = codec.Writer(), torch.zeros(1)
    writer.dumps({"args": [tensor]}, lambda tensor: "token")
    gone = weakref.ref(tensor)
    del tensor
    assert gone() is None


def test_messages_with_and_without_tensors_follow_each_other():
    writer, tensor = codec.Writer(), torch.zeros(1)
    sent = [1, [tensor], 2, tensor, (tensor, 3), {4}, "x" * (1 << 15), tensor, tensor, None]
    written = [writer.dumps({"value": value}, lambda _: "token") for value in sent]
    assert [codec.loads(data, lambda _: tensor)["value"] for data in written] == sent


def test_message_that_is_refused_at_once_or_after_a_tensor_leaves_the_next_one_whole():
    writer = codec.Writer()
    for value in ([object()], [torch.zeros(1), object()], [object()]):
        with pytest.raises(Unsendable, match="object"):
            writer.dumps({"value": value}, lambda _: "token")
        assert codec.loads(writer.dumps({"value": 1}, no_tensor), no_tensor) == {"value": 1}


def test_tensor_in_two_messages_crosses_twice():
    writer, tensor, packed = codec.Writer(), torch.zeros(1), []
    for _ in range(2):
        writer.dumps({"args": [tensor, tensor]}, packed.append)
    assert len(packed) == 2


def test_deep_nesting_is_refused():
    value: list = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(Unsendable, match="nested too deeply"):
        codec.Writer().dumps({"args": value}, no_tensor)


class Attack:
    def __reduce__(self):
        return os.system, ("false",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_with_code_is_refused(protocol):
    with pytest.raises(Rejected, match="only data may cross"):
        codec.loads(pickle.dumps(Attack(), protocol), no_tensor)


def test_extension_codes_are_refused():
    with pytest.raises(Rejected):
        codec.loads(b"\x80\x02\x82\x01.", no_tensor)


def test_our_own_pickles_name_no_global():
    data = codec.Writer().dumps({"args": ({"a": [1, 2.0, "x", b"y", None]},)}, no_tensor)
    names = {opcode.name for opcode, _, _ in pickletools.genops(data)}
    assert not names & {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "REDUCE", "BUILD"}


def test_random_bytes_raise_nothing_but_rejected():
    generator = np.random.default_rng(0)
    seen = 0
    for size in range(1, 400):
        data = generator.bytes(size)
        # Two opcodes claim memory by a number alone; the size of a message bounds them elsewhere.
        data = data.replace(b"r", b"q").replace(b"\x96", b"q")
        try:
            codec.loads(data, no_tensor)
        except Rejected:
            seen += 1
    assert seen > 300
