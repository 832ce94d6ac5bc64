"""Random state that goes to another process and back."""

from __future__ import annotations

import torch

from luna_mp.models import randomness

CPU = torch.device("cpu")


def test_what_is_drawn_after_it_is_installed_is_the_same():
    torch.manual_seed(3)
    state = randomness.capture(CPU)
    first = torch.randn(4)
    torch.manual_seed(4)
    randomness.install(state, CPU)
    assert torch.equal(torch.randn(4), first)


def test_drawing_moves_the_state():
    before = randomness.capture(CPU)
    torch.randn(1)
    assert not torch.equal(randomness.capture(CPU)["cpu"], before["cpu"])


def test_a_state_that_was_captured_stays_as_it_was():
    state = randomness.capture(CPU)
    before = state["cpu"].clone()
    torch.randn(1)
    assert torch.equal(state["cpu"], before)


def test_a_gpus_state_says_nothing_to_a_cpu():
    state = {**randomness.capture(CPU), "cuda": torch.zeros(16, dtype=torch.uint8)}
    randomness.install(state, CPU)
    assert torch.equal(randomness.capture(CPU)["cpu"], state["cpu"])
