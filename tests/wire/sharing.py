"""A service whose GPU is faked, a client of it, and what each says of their carrier."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import torch

from tests.helpers import endpoint, served
from tests.wire.pair import soon

BIG = 40_000  # elements; more than what is sent inline for being small


class Service:
    """What the server of a test exposes; counts its runs."""

    def __init__(self):
        self.runs = 0
        self.entered = threading.Event()
        self.may_return = threading.Event()
        self.on_run = lambda: None

    def exposed(self):
        return {call.__name__: call for call in (self.double, self.numbers, self.more, self.wait)}

    def double(self, call, tensor):
        self.runs += 1
        return tensor * 2

    def numbers(self, call):
        self.runs += 1
        self.on_run()
        return torch.arange(BIG)

    def more(self, call):
        """Of the GPU, and behind it of the host."""
        return [self.numbers(call), torch.zeros(100)]

    def wait(self, call):
        self.entered.set()
        assert self.may_return.wait(10)
        return torch.arange(BIG)


@contextmanager
def connected(service, exporter, importer, address):
    with served(service.exposed(), address, exporter=exporter) as server:
        with endpoint(server, importer=importer) as client:
            client.open(soon())
            yield server, client


def call(client, method, *args):
    return client.call(method, args, {}, 10.0)


def told(server):
    """Carrier and reason as the service's status has them."""
    [session] = server._sessions.to_data()["clients"]
    return session["carrier"], session["reason"]
