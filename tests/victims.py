"""Clients made to be killed: `python -m tests.victims PLAN`, the plan as JSON.

A nursery has torch imported and has opened no GPU. For each line of its standard input it forks
lanes, of which each forks one victim after the other, kills it at a random moment and reaps it.

    nursery ─┬─ lane ── victim, victim, victim, …
             ├─ lane ── victim, …
             └─ lane ── victim, …     this one's reach the service over TCP

Linux only. Whoever starts a nursery owns its process group, and kills that.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

from luna_mp import errors
from luna_mp.client import Luna, connect
from luna_mp.proxies import VaeProxy

SECONDS = 60.0  # for a victim to begin, which opens the GPU, and for it to end
LONGEST_LIFE = 0.3  # seconds from its begin to its death
HELD = 3  # results
CALLS = 8  # before a victim connects anew
LARGE = (1, 1024, 1024, 5)  # 20 MiB, and more channels than any model here takes


class Plan(NamedTuple):
    """What victims are like: all but those of one lane use `carrier`, that one `address`."""

    carrier: str
    address: str
    lanes: int
    #: along each edge of a latent
    edge: int


class Death(NamedTuple):
    pid: int
    #: what the victim was about when it was killed
    step: str


def main(plan: Plan) -> None:
    """A line in: [deaths in each lane, seed]. A line out: the deaths."""
    assert not torch.cuda.is_initialized(), "no fork of this process could use its GPU"
    for line in sys.stdin:
        each, seed = json.loads(line)
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(plan.lanes, mp_context=fork) as pool:
            lanes = list(pool.map(partial(lane, plan, each, seed), range(plan.lanes)))
        sys.stdout.write(json.dumps([death for deaths in lanes for death in deaths]) + "\n")
        sys.stdout.flush()


def lane(plan: Plan, each: int, seed: int, number: int) -> list[Death]:
    moments = random.Random(f"{seed}, {number}")
    is_remote = number == plan.lanes - 1
    return [die(plan, is_remote, moments.uniform(0, LONGEST_LIFE)) for _ in range(each)]


def die(plan: Plan, is_remote: bool, life: float) -> Death:
    """Bear a victim, and kill it so many seconds after it has begun."""
    fork = multiprocessing.get_context("fork")
    steps, marks = fork.Pipe(duplex=False)
    process = fork.Process(target=live, args=(plan, is_remote, life, marks))
    process.start()
    marks.close()
    try:
        if not steps.poll(SECONDS):
            raise TimeoutError(f"a victim did not begin within {SECONDS} s")
        # Not to wait for anything: when it ends is the random moment of the death.
        time.sleep(life)
    finally:
        process.kill()
        process.join(SECONDS)
    if process.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"a victim was not killed but ended with {process.exitcode}")
    with steps:
        *_, last = told(steps)
    assert process.pid is not None
    return Death(process.pid, last)


def told(steps: Connection) -> Iterator[str]:
    with suppress(EOFError):
        while True:
            yield steps.recv_bytes().decode()


def live(plan: Plan, is_remote: bool, seed: float, marks: Connection) -> None:
    """Connect and call until killed, and hold the last results; tell each step."""
    order = random.Random(seed)
    latent = torch.randn(1, 4, plan.edge, plan.edge, generator=torch.Generator().manual_seed(0))
    large = torch.zeros(LARGE)
    with connection(plan, is_remote) as luna:  # opens the GPU, which is no part of the loop
        image = luna.vae.decode(latent)
    calls: dict[str, Callable[[VaeProxy], object]] = {
        "decode": lambda vae: vae.decode(latent),
        "copy": lambda vae: vae.decode(latent, device="cpu"),
        "encode": lambda vae: vae.encode(image),
        "send": lambda vae: be_refused(vae, large),
    }
    held: deque[object] = deque(maxlen=HELD)
    while True:
        marks.send_bytes(b"connect")
        with connection(plan, is_remote) as luna:
            # Any of them may be the first: there is time for few.
            for step in order.choices(list(calls), k=CALLS):
                marks.send_bytes(step.encode())
                held.append(calls[step](luna.vae))


def be_refused(vae: VaeProxy, large: torch.Tensor) -> None:
    """Send a large input whole, and cost the others no work."""
    with suppress(errors.Rejected):
        vae.encode(large)


@contextmanager
def connection(plan: Plan, is_remote: bool) -> Iterator[Luna]:
    remote = {"vae": plan.address, "gpu": False}
    with connect(**(remote if is_remote else {})) as luna:
        expected = "inline" if is_remote else plan.carrier
        assert luna.carriers == {"vae": expected}, luna.reasons
        yield luna


if __name__ == "__main__":
    main(Plan(*json.loads(sys.argv[1])))
