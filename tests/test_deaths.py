"""Clients that die at random moments, on a service of the CPU."""

from __future__ import annotations

import sys

import pytest

import luna_mp
from tests.deaths import Figures, assert_deaths_leave_nothing
from tests.victims import Plan

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks into /proc")

LANES, EACH = 4, 10
SECONDS = 60.0

NOTHING = Figures(threads=0, descriptors=0, mapped=0, files=0, allocated=0, taken=0)


def test_forty_killed_clients_leave_nothing_and_spoil_no_call(runtime_dir):
    with luna_mp.serve(vae="cpu", log_level="ERROR", runtime_dir=runtime_dir) as service:
        address = f"127.0.0.1:{service.ready['vae']['port']}"
        plan = Plan(carrier="shm", address=address, lanes=LANES, edge=8)
        assert_deaths_leave_nothing(service, plan, EACH, SECONDS, NOTHING)
