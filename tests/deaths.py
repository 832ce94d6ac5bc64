"""Clients killed at random moments beside clients that work: what is left of the dead.

A rehearsal comes first: what it makes the service keep for good, such as kernels and handles, is
what a service keeps after any client.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from luna_mp.client import Luna
from luna_mp.serving import Serving
from tests.clients import client
from tests.helpers import wait_until
from tests.victims import Death, Plan

logger = logging.getLogger(__name__)

BYSTANDERS = (1, 2)  # seeds, so that none is sent what another is
REHEARSED = 2  # deaths in each lane
SEED = 20261123
LONGEST_CALL = 10.0  # seconds that a bystander may wait for one result, among all the others
SETTLE_SECONDS = 30.0
BOOT_SECONDS = 60.0  # for a client process to import torch, connect and open the GPU

SHARED_MEMORY = "/dev/shm"


class Figures(NamedTuple):
    """What a service has; the memory in bytes."""

    threads: int
    descriptors: int
    #: of segments and of files in /dev/shm, as far as it is mapped
    mapped: int
    #: its files in /dev/shm
    files: int
    #: what its tensors take on the GPU
    allocated: int
    #: what is taken of the GPU, by whomever
    taken: int

    def growth(self, since: Figures, room: Figures) -> dict[str, int]:
        """By name, what has grown by more than `room`."""
        more = zip(self._fields, self, since, room, strict=True)
        return {name: now - then for name, now, then, most in more if now - then > most}


class Watch:
    """What looks at one service from outside; as its only client, once all others have gone."""

    def __init__(self, service: Serving, luna: Luna) -> None:
        self._pid = service.ready["vae"]["pid"]
        self._process = psutil.Process(self._pid)
        self._luna = luna

    def settle(self) -> Figures:
        """The figures once the service knows of no other client, and leases nothing."""
        wait_until(self._is_alone, SETTLE_SECONDS)
        return self.figures()

    def settle_within(self, before: Figures, room: Figures) -> Figures:
        """The figures once nothing has grown by more than `room`, or when that takes too long."""
        end = time.monotonic() + SETTLE_SECONDS
        while (now := self.settle()).growth(before, room) and time.monotonic() < end:
            # The card gets memory back when the service has been idle for some seconds.
            time.sleep(0.05)
        return now

    def figures(self) -> Figures:
        memory = self._luna.status("vae")["memory"]
        return Figures(
            threads=self._process.num_threads(),
            descriptors=self._process.num_fds(),
            mapped=mapped(self._pid),
            files=sum(files_of(self._pid).values()),
            allocated=memory.get("allocated", 0),
            taken=memory.get("total", 0) - memory.get("free", 0),
        )

    def _is_alone(self) -> bool:
        status = self._luna.status("vae")
        assert status["pid"] == self._pid, "the service did not live through it"
        clients = {each["pid"] for each in status["clients"]}
        return clients == {os.getpid()} and not status["leases"] and not status["queue"]["line"]


def assert_deaths_leave_nothing(
    service: Serving, plan: Plan, each: int, seconds: float, room: Figures
) -> None:
    """`each` deaths in each lane, done within `seconds`; nothing grows by more than `room`."""
    # Without the GPU: who watches holds nothing there.
    with service.connect(gpu=False) as luna:
        watch = Watch(service, luna)
        play(plan, REHEARSED, seconds, watch)
        before = watch.settle()
        dead = play(plan, each, seconds, watch)
        after = watch.settle_within(before, room)
    logger.info("before: %s", before)
    logger.info("after:  %s", after)
    left = [files for death in dead if (files := files_of(death.pid))]
    logger.info("%d of the dead left files in %s: %s", len(left), SHARED_MEMORY, left[:3])
    assert not after.growth(before, room), f"before: {before}, after: {after}"


def play(plan: Plan, each: int, seconds: float, watch: Watch) -> list[Death]:
    """Let so many die in each lane while the bystanders work; who died."""
    with ExitStack() as stack:
        victims = stack.enter_context(nursery(plan))
        others = [stack.enter_context(client("bystander", plan.edge, n)) for n in BYSTANDERS]
        # They know what is right before the first death.
        for process in others:
            assert said(process, BOOT_SECONDS) == {"vae": plan.carrier}
        for process in others:
            tell(process)
        started = time.monotonic()
        tell(victims, [each, SEED + each])
        dead = [Death(*death) for death in said(victims, seconds)]
        steps = Counter(death.step for death in dead)
        logger.info("%d deaths in %.1f s: %s", len(dead), time.monotonic() - started, dict(steps))
        assert len(dead) == each * plan.lanes
        assert len(steps) > 1, "all died at the same step"
        for process in others:
            tell(process)
        for process in others:
            assert_worked_well(said(process, SETTLE_SECONDS))
        logger.info("with the bystanders: %s", watch.figures())
    return dead


def assert_worked_well(told: dict[str, Any]) -> None:
    """A bystander never waited long, so that it worked all the while; nothing was wrong."""
    logger.info("a bystander: %s", told)
    assert told["calls"] and not told["mismatches"], told
    assert told["longest"] < LONGEST_CALL, told


def mapped(pid: int) -> int:
    """Bytes of shared memory that a process maps, of files that have a name or had one."""
    total = 0
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, _, path = line.partition(" ")
        if "/memfd:luna-mp" in path or f" {SHARED_MEMORY}/" in path:
            start, end = span.split("-")
            total += int(end, 16) - int(start, 16)
    return total


def files_of(pid: int) -> dict[str, int]:
    """Names and bytes of what a process put into /dev/shm: torch's counters, the driver's own."""
    found = {}
    for pattern in (f"torch_{pid}_*", f"cuda.shm.*.{pid:x}.*"):
        found.update({path.name: path.stat().st_size for path in Path(SHARED_MEMORY).glob(pattern)})
    return found


@contextmanager
def nursery(plan: Plan) -> Iterator[subprocess.Popen[str]]:
    """A nursery in a session of its own, of which nothing is left at the end."""
    command = [sys.executable, "-m", "tests.victims", json.dumps(plan)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):  # it has ended, and so have all its victims
                os.killpg(process.pid, signal.SIGKILL)


def tell(process: subprocess.Popen[str], what: Any = None) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(what) + "\n")
    process.stdin.flush()


def said(process: subprocess.Popen[str], seconds: float) -> Any:
    """What it says next, which is one line of JSON."""
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], seconds)[0], f"nothing was said in {seconds} s"
    line = process.stdout.readline()
    assert line, f"a client ended with status {process.wait(SETTLE_SECONDS)}"
    return json.loads(line)
