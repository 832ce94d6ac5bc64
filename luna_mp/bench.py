"""What `luna-mp bench` measures: what the wire costs, beside the plain way, in one run.

The service under test is a real server in a process of its own; only the model is missing. The
plain way is pickled bytes over a `multiprocessing.connection`, in another process of its own.
"""

from __future__ import annotations

import os
import pickle
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from luna_mp.client import connect
from luna_mp.config import ServiceConfig
from luna_mp.manager import LocalManager, RemoteManager
from luna_mp.sessions import Sessions
from luna_mp.spawning import command

__all__ = ("format_report", "run_bench")

RESULTS = {"1024² image": (1, 1024, 1024, 3), "2048² image": (1, 2048, 2048, 3)}
ROUNDS = 15
CALLS = 200  # in a row, each round
CONNECTIONS = 50
BOOT_SECONDS = 60.0


Way = Callable[[], Any]


class Limit(NamedTuple):
    """One promise: `row`'s `column` against a number, or against `factor` × another column."""

    text: str
    holds: Callable[[dict[str, dict[str, float]]], bool]


LIMITS = (
    Limit("bare call, local ≤ 0.1 ms", lambda r: r["bare call"]["local"] <= 0.1),
    Limit(
        "2048² image by shm at least 4 times as fast as pickled",
        lambda r: r["2048² image"]["pickled"] >= 4 * r["2048² image"]["local"],
    ),
    Limit("new TCP connection ≤ 5 ms", lambda r: r["new connection"]["tcp"] <= 5),
)


def run_bench() -> dict[str, Any]:
    """Medians in milliseconds, by what is measured and by way; ways are interleaved."""
    key = os.urandom(32)
    with tempfile.TemporaryDirectory(prefix="luna-mp-") as folder:
        path = str(Path(folder) / "sock")
        with _server(path, key) as port, _plain(str(Path(folder) / "plain"), key) as plain:
            rows = _measure({"local": path, "tcp": f"127.0.0.1:{port}"}, key, plain)
    limits = {limit.text: limit.holds(rows) for limit in LIMITS}
    return {"ok": all(limits.values()), "torch": torch.__version__, "ms": rows, "limits": limits}


def format_report(report: dict[str, Any]) -> str:
    """A Markdown table of the medians and the promises under it."""
    ways = ("local", "tcp", "pickled")
    lines = [f"| ms, median | {' | '.join(ways)} |", "|---" * 4 + "|"]
    for name, row in report["ms"].items():
        cells = (f"{row[way]:.3f}" if way in row else "" for way in ways)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [f"{'holds' if ok else 'FAILS'}: {text}" for text, ok in report["limits"].items()]
    return "\n".join(lines)


def _measure(
    addresses: dict[str, str], key: bytes, plain: connection.Connection
) -> dict[str, dict[str, float]]:
    clients = {way: connect(vae=address, authkey=key) for way, address in addresses.items()}
    ask = {way: client._endpoint("vae").call for way, client in clients.items()}

    def ways(method: str, *shape: int) -> dict[str, Way]:
        ours: dict[str, Way] = {way: partial(a, method, shape, {}, 60.0) for way, a in ask.items()}
        return {**ours, "pickled": partial(_plain_call, plain, shape)}

    def connecting(address: str) -> None:
        connect(vae=address, authkey=key).close()

    try:
        return {
            "bare call": _medians(ways("ping"), ROUNDS, in_a_row=CALLS),
            "new connection": _medians(
                {way: partial(connecting, a) for way, a in addresses.items()}, CONNECTIONS
            ),
            **{name: _medians(ways("make", *shape), ROUNDS) for name, shape in RESULTS.items()},
        }
    finally:
        for client in clients.values():
            client.close()


def _medians(ways: dict[str, Way], rounds: int, in_a_row: int = 1) -> dict[str, float]:
    """Milliseconds; the ways take turns, so that what else the machine does hits all alike."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for run in ways.values():
        run()  # the first time maps segments and warms caches
    for _ in range(rounds):
        for way, run in ways.items():
            for _ in range(in_a_row):
                start = time.perf_counter()
                run()
                times[way].append(1e3 * (time.perf_counter() - start))
    return {way: statistics.median(taken) for way, taken in times.items()}


def _plain_call(plain: connection.Connection, shape: tuple[int, ...]) -> Any:
    plain.send_bytes(pickle.dumps(shape))
    return pickle.loads(plain.recv_bytes())


@contextmanager
def _child(*arguments: str, key: bytes) -> Iterator[str]:
    """This module in a process of its own, until the with statement ends; yields what it says."""
    env = {**os.environ, "LUNA_MP_AUTHKEY": key.hex()}
    with subprocess.Popen(
        command("luna_mp.bench", *arguments),
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        try:
            yield child.stdout.readline().strip()
        finally:
            child.kill()


@contextmanager
def _server(path: str, key: bytes) -> Iterator[int]:
    with _child("serve", path, key=key) as port:
        yield int(port)


@contextmanager
def _plain(path: str, key: bytes) -> Iterator[connection.Connection]:
    with _child("plain", path, key=key), connection.Client(path, authkey=key) as plain:
        yield plain


def _make(_call: Any, *shape: int) -> torch.Tensor:
    """The same tensor each time: what it takes to make one is not the question."""
    if shape not in _made:
        _made[shape] = torch.rand(shape)
    return _made[shape]


_made: dict[tuple[int, ...], torch.Tensor] = {}


def _serve(path: str, key: bytes) -> None:
    exposed: dict[str, Callable[..., Any]] = {"make": _make, "ping": lambda call: None}
    sessions, limit = Sessions(), ServiceConfig.max_message
    remote = RemoteManager("vae", exposed, ("127.0.0.1", 0), key, sessions, limit).get_server()
    local = LocalManager("vae", exposed, path, key, sessions, limit).get_server()
    threading.Thread(target=remote.serve_forever, daemon=True).start()
    sys.stdout.write(f"{remote.address[1]}\n")
    sys.stdout.flush()
    local.serve_forever()


def _serve_plain(path: str, key: bytes) -> None:
    with connection.Listener(path, authkey=key) as listener:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        # Whoever asks is done before it ends this process.
        with listener.accept() as plain, suppress(EOFError):
            while True:
                shape = pickle.loads(plain.recv_bytes())
                plain.send_bytes(pickle.dumps(_make(None, *shape) if shape else None))


if __name__ == "__main__":
    # Ctrl-C is for the process that owns this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    {"serve": _serve, "plain": _serve_plain}[sys.argv[1]](
        sys.argv[2], bytes.fromhex(os.environ["LUNA_MP_AUTHKEY"])
    )
