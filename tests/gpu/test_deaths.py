"""Two hundred clients that die at random moments, on a service of the GPU.

The figures are in the log: `pytest tests/gpu/test_deaths.py --log-level=INFO -rP`.
"""

from __future__ import annotations

import pytest

from tests.deaths import Figures, assert_deaths_leave_nothing
from tests.victims import Plan

pytestmark = pytest.mark.gpu

LANES, EACH = 9, 25  # eight lanes share the GPU, one goes by TCP
SECONDS = 300.0

#: what may come without being a leak, which would be one for each of 200 deaths
ROOM = Figures(
    # The driver starts and opens some of its own when it likes.
    threads=2,
    descriptors=8,
    # A file of torch's counters, 80 kB, for 10,000 exports; it is mapped twice.
    mapped=256 << 10,
    files=128 << 10,
    allocated=0,
    # torch keeps a handle of cuBLAS and cuDNN for each thread that once computed beside others.
    taken=256 << 20,
)


@pytest.mark.timeout(600)
def test_two_hundred_killed_clients_leave_nothing_and_spoil_no_call(own):
    address = f"127.0.0.1:{own.ready['vae']['port']}"
    plan = Plan(carrier="cuda", address=address, lanes=LANES, edge=40)
    assert_deaths_leave_nothing(own, plan, EACH, SECONDS, ROOM)
