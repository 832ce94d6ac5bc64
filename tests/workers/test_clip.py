"""What the CLIP worker remembers, and what it refuses."""

from __future__ import annotations

import pytest

from luna_mp.errors import Rejected
from luna_mp.workers.clip import MAX_PROMPT, ClipWorker
from tests.workers.fakes import FakeCall, FakeClip, called, library

ENTRY_BYTES = 1024  # of one conditioning of FakeClip


def test_a_repeated_prompt_is_encoded_once():
    clip = FakeClip()
    worker = ClipWorker(library(clip), 10 * ENTRY_BYTES)
    first, second = (called(worker.encode, "fox")[0] for _ in range(2))
    assert first.equal(second)
    assert clip.asked == ["fox"]
    assert worker.status(FakeCall())["cache"] == {"entries": 1, "bytes": ENTRY_BYTES, "hits": 1}


def test_the_least_used_prompt_is_forgotten_first():
    clip = FakeClip()
    worker = ClipWorker(library(clip), 2 * ENTRY_BYTES)
    for text in ("a", "bb", "a", "ccc", "a", "bb"):
        called(worker.encode, text)
    assert clip.asked == ["a", "bb", "ccc", "bb"]


def test_nothing_is_remembered_where_there_is_no_room():
    clip = FakeClip()
    worker = ClipWorker(library(clip), 0)
    for _ in range(2):
        called(worker.encode, "a")
    assert clip.asked == ["a", "a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [(7, "a prompt is a int"), ("x" * (MAX_PROMPT + 1), f"{MAX_PROMPT + 1} characters; the limit")],
    ids=["number", "too long"],
)
def test_what_is_no_prompt_is_refused(text, message):
    with pytest.raises(Rejected, match=message):
        called(ClipWorker(library(FakeClip()), 0).encode, text)
