"""What tests share: waiting for a state, and servers of our own interfaces without a process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from luna_mp.calls import Calls, OnFault
from luna_mp.endpoint import Endpoint
from luna_mp.manager import LocalManager, RemoteManager, Server
from luna_mp.sessions import Sessions
from luna_mp.wire import handshake
from luna_mp.wire.channel import Channel
from luna_mp.wire.probe import Answerer, Importer

KEY = bytes(range(32))
LIMIT = 1 << 28


def wait_until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """The first true value of `condition`; fails when there is none in time."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{condition} was not true within {seconds} s"
        time.sleep(0.005)
    return value


def request(method: str, *args: Any) -> dict[str, Any]:
    """The message that asks for a call."""
    return {"method": method, "args": args, "kwargs": {}, "timeout": 10.0}


def calls_over(
    channel: Channel,
    exposed: dict[str, Callable[..., Any]],
    sessions: Sessions,
    exporter: Any = None,
    on_fault: OnFault = lambda fault: None,
) -> Calls:
    """The service's end of a connection, without its thread: the test answers call by call."""
    identity = handshake.identity("", LIMIT)
    session = sessions.join(identity, "local")
    answerer = Answerer(channel, identity, exporter)
    return Calls("vae", exposed, channel, session, sessions, answerer, on_fault)


@contextmanager
def served(
    exposed: dict[str, Callable[..., Any]],
    address: Any,
    key: bytes = KEY,
    limit: int = LIMIT,
    exporter: Any = None,
    on_fault: OnFault = lambda fault: None,
) -> Iterator[Server]:
    """A server in this process, on its own thread; it must end by itself."""
    manager = LocalManager if isinstance(address, str) else RemoteManager
    server = manager(
        "vae", exposed, address, key, Sessions(), limit, exporter, on_fault
    ).get_server()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.stop(grace=1.0)
        thread.join(5.0)
        assert not thread.is_alive()


@contextmanager
def endpoint(
    server: Server, key: bytes = KEY, importer: Importer | None = None
) -> Iterator[Endpoint]:
    """A client of that server."""
    client = Endpoint("vae", lambda: server.address, key, importer)
    try:
        yield client
    finally:
        client.close()
