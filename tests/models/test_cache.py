"""What was encoded before, within a bound."""

from __future__ import annotations

import torch

from luna_mp.models.base import Conditioning
from luna_mp.models.cache import Cache

SIZE = 400  # bytes of one entry


def entry():
    half = SIZE // 8
    return Conditioning(cond=torch.zeros(half), pooled=None, extras={"mask": torch.zeros(half)})


def test_what_was_put_in_is_found():
    cache, value = Cache(SIZE), entry()
    cache.put(("a",), value)
    assert cache.get(("a",)) is value
    assert cache.get(("b",)) is None


def test_the_least_used_makes_room():
    cache = Cache(2 * SIZE)
    for name in "ab":
        cache.put((name,), entry())
    cache.get(("a",))
    cache.put(("c",), entry())
    assert [name for name in "abc" if cache.get((name,))] == ["a", "c"]


def test_it_never_holds_more_than_its_bound():
    cache = Cache(3 * SIZE)
    for number in range(20):
        cache.put((number,), entry())
        assert cache.to_data()["bytes"] <= 3 * SIZE
    assert cache.to_data()["entries"] == 3


def test_the_same_prompt_counts_once():
    cache, value = Cache(2 * SIZE), entry()
    for each in (value, entry()):
        cache.put(("a",), each)
    assert cache.get(("a",)) is value
    assert cache.to_data()["bytes"] == SIZE


def test_what_is_larger_than_all_of_it_is_not_kept():
    cache = Cache(SIZE - 1)
    cache.put(("a",), entry())
    assert cache.to_data() == {"entries": 0, "bytes": 0, "hits": 0}


def test_hits_are_counted():
    cache = Cache(SIZE)
    cache.put(("a",), entry())
    cache.get(("a",))
    cache.get(("b",))
    assert cache.to_data()["hits"] == 1
