"""A service's side alone: `python -m tests.gpu.exporting` says what became of what it exported.

In a process of its own, which takes torch's counters with it when it ends.
"""

from __future__ import annotations

import mmap
import os
from functools import partial

import torch

from luna_mp.processes import born
from luna_mp.wire.carrier import Outgoing
from luna_mp.wire.counters import let_go
from luna_mp.wire.cuda import HOST, Exporter
from luna_mp.wire.leases import Owner
from luna_mp.wire.shm import HEADER, ShmCarrier, _pin, _Segment
from tests.gpu.clients import say

SIZE = 64 << 20  # bytes
CYCLES = 1_000_000_000  # of the GPU's clock, about half a second


class Exports:
    """Results of `SIZE` bytes, exported to this process."""

    def __init__(self) -> None:
        self.exporter = Exporter(torch.device("cuda", 0), 1 << 30)
        self.owner = Owner(os.getpid(), born(os.getpid()))
        self.carrier = self.exporter.carrier(self.owner, ShmCarrier(pin_sent=True))

    def made(self) -> torch.Tensor:
        return self.exporter.place(partial(torch.zeros, SIZE, device="cuda", dtype=torch.uint8))

    def export(self, out: Outgoing, cycles: int = 0) -> tuple[bytes, int, bool]:
        """Counter, slot, and whether to wait; the GPU is done with it but for `cycles`."""
        tensor = self.made()
        torch.cuda.synchronize()
        if cycles:
            torch.cuda._sleep(cycles)
        _, _, _, _, counter, slot, _, _, must_wait = self.carrier.pack(tensor, out)
        return counter, slot, must_wait

    def counted_by(self, results: int) -> list[tuple[str, int]]:
        """Counters of so many results at once, which come back."""
        used = [self.export(Outgoing())[:2] for _ in range(results)]
        for counter, slot in used:
            let_go(counter, slot)
        self.exporter.book.collect()
        return sorted((counter.decode(), slot) for counter, slot in used)

    def is_waited_for(self, cycles: int = 0) -> bool:
        """What a client is told of a result, which comes back."""
        counter, slot, must_wait = self.export(Outgoing(), cycles)
        let_go(counter, slot)
        self.exporter.book.collect()
        return must_wait

    def left_after(self, releases: int) -> int:
        """Results whose memory is still taken once a client let go of one so often."""
        before = torch.cuda.memory_allocated()
        counter, slot, _ = self.export(Outgoing())
        for _ in range(releases):
            let_go(counter, slot)
        self.exporter.book.collect()
        return results_since(before)

    def left_after_taking_back(self) -> int:
        """Results whose memory is still taken of a message that never left."""
        before, out = torch.cuda.memory_allocated(), Outgoing()
        self.export(out)
        out.take_back()
        self.exporter.book.collect()
        return results_since(before)

    def lies_where_it_was_made(self, is_given_up: bool) -> bool:
        """Whether no copy of it is exported, as of what lies in memory that was given up."""
        made = self.made()
        if is_given_up:
            self.exporter._renew_pool()
        number, *_ = self.carrier.pack(made, Outgoing())
        return self.exporter.book.get(number, self.owner).data_ptr() == made.data_ptr()

    def pool(self) -> int:
        """Number of the pool that a result lies in, which comes back."""
        out = Outgoing()
        _, _, (pool, _, _), *_ = self.carrier.pack(self.made(), out)
        out.take_back()
        self.exporter.book.collect()
        return int(pool)

    def pools(self) -> list[int]:
        """The same of two, and of one that is made once their memory was given up."""
        before = [self.pool() for _ in range(2)]
        self.exporter._renew_pool()
        return [*before, self.pool()]

    def is_done_after_taking_back_a_copy(self) -> bool:
        """Whether nothing that was queued is left to write to the segment."""
        out, tensor = Outgoing(to_host=True), torch.zeros(1 << 20, device="cuda")
        torch.cuda._sleep(CYCLES)
        assert self.carrier.pack(tensor, out)[0] == HOST
        assert not self.exporter.is_done()
        out.take_back()
        return self.exporter.is_done()


def results_since(before: int) -> int:
    """So many of `SIZE` were taken since; counters take some bytes, too, and come and go."""
    return round((torch.cuda.memory_allocated() - before) / SIZE)


def pinned_twice() -> tuple[bool, float]:
    """Whether a segment could be pinned once more, and what a kernel makes afterwards."""
    memory = mmap.mmap(-1, HEADER + SIZE)
    segment = _Segment(memory, pin=True)
    assert segment.is_pinned
    return _pin(segment), float((torch.ones(1, device="cuda") + 1).item())


if __name__ == "__main__":
    torch.zeros(1, device="cuda")
    exports = Exports()
    say(
        # First: after it there are as many to spare. The first of a place has one for itself.
        counters=[exports.counted_by(3) for _ in range(3)],
        waits={
            "done": any(exports.is_waited_for() for _ in range(100)),
            "not": exports.is_waited_for(CYCLES),
        },
        left={times: exports.left_after(times) for times in (0, 1, 2, 3)},
        taken_back=exports.left_after_taking_back(),
        copy_is_done=exports.is_done_after_taking_back_a_copy(),
        pinned_twice=pinned_twice(),
        pools=exports.pools(),
        as_made=[exports.lies_where_it_was_made(is_given_up) for is_given_up in (False, True)],
    )
    exports.exporter.close()
