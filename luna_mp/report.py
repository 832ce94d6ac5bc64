"""What `status` says, for people: pure text from the services' plain data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

__all__ = ("describe",)

MIB = 1 << 20


def describe(found: dict[str, dict[str, Any]]) -> str:
    """Text for the status of each service, by role."""
    return "\n".join(line for role, status in found.items() for line in _service(role, status))


def _service(role: str, status: dict[str, Any]) -> Iterator[str]:
    queue = status["queue"]
    yield (
        f"{role}: pid {status['pid']} on {status['device']}, up {status['uptime']:.0f} s, "
        f"at {', '.join(status['addresses'])}"
    )
    for model in status["models"]:
        yield f"  model {', '.join(model['paths'])}: {model['dtype']}, {_mib(model['bytes'])}"
    memory = {"process": status["rss"], **status["memory"]}
    yield "  memory " + ", ".join(f"{name} {_mib(size)}" for name, size in memory.items())
    yield f"  queue {queue['depth']} waiting, {queue['dropped']} dropped"
    for position, ticket in enumerate(queue["line"]):
        place = "running" if position == 0 else f"place {position}"
        who = f"{ticket['method']} of {ticket['client'][:8]}"
        yield f"    {place}: {who}, {ticket['waiting']:.1f} s"
    for method, total in queue["methods"].items():
        calls = total["calls"]
        yield (
            f"  {method}: {calls} calls, {1e3 * total['run_seconds'] / calls:.1f} ms running and "
            f"{1e3 * total['wait_seconds'] / calls:.1f} ms waiting on average"
        )
    for client in status["clients"]:
        yield f"  client {client['client'][:8]}: {_client(client)}"
    for pid, leased in status["leases"].items():
        yield f"  pid {pid} holds {_mib(leased['bytes'])} on the GPU in {leased['leases']} results"


def _client(client: dict[str, Any]) -> str:
    reason = f" (because {client['reason']})" if client["reason"] else ""
    idle = f", last {time.time() - client['last_call']:.0f} s ago" if client["last_call"] else ""
    return (
        f"pid {client['pid']} by {client['carrier']}{reason}, {client['calls']} calls, "
        f"{client['failures']} failed{idle}"
    )


def _mib(size: int) -> str:
    return f"{size / MIB:.0f} MiB"
