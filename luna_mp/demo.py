"""What `luna-mp demo` runs: services, two client processes, and the same models in this process.

Each client is `python -m luna_mp.demo`, started like any worker: it finds the services by itself,
makes the calls by every address and says on standard output what came back, as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from luna_mp import runtime
from luna_mp.client import Luna, connect
from luna_mp.config import ROLES
from luna_mp.errors import BootFailed
from luna_mp.models.demo import demo_image
from luna_mp.spawning import command

__all__ = ("format_report", "run_demo")

PROMPT = "a red fox, film grain"
CLIENTS = 2
CLIENT_SECONDS = 300.0
COLUMNS = ("client", "call", "address", "carrier", "bytes", "ms", "same bits")

Call = Callable[[], Any]


def run_demo(picture: Path) -> dict[str, Any]:
    """Run it all; returns the report that `--json` prints. Raises `LunaError`, `BootFailed`.

    The services are the demo's own, with a runtime directory of their own.
    """
    from luna_mp.serving import serve

    with tempfile.TemporaryDirectory(prefix="luna-mp-") as directory:
        os.chmod(directory, 0o700)
        with serve(runtime_dir=directory, log_level="WARNING"):
            heard = _run_clients(directory, picture)
    expected = _in_process()
    calls = [
        {**row, "same_bits": row.pop("print") == expected[row["call"]]}
        for client in heard
        for row in client["calls"]
    ]
    is_identical = bool(calls) and all(row["same_bits"] for row in calls)
    return {
        "ok": is_identical and len(heard) == CLIENTS and picture.is_file(),
        "bit_identical": is_identical,
        "clients": len(heard),
        "carriers": heard[0]["carriers"],
        "picture": str(picture.absolute()),
        "calls": calls,
    }


def format_report(report: dict[str, Any]) -> str:
    """The table, one line for each call, and the verdict."""
    rows = [COLUMNS, *(_row(call) for call in report["calls"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    verdict = "every row holds" if report["ok"] else "NOT every row holds"
    return "\n".join([*lines, "", f"{verdict}; the decoded picture is {report['picture']}"])


def _row(call: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(call["client"]),
        call["call"],
        call["address"],
        call["carrier"],
        str(call["bytes"]),
        f"{call['ms']:.1f}",
        "yes" if call["same_bits"] else "NO",
    )


def _run_clients(directory: str, picture: Path) -> list[dict[str, Any]]:
    """Both at once, as two workers would be."""
    env = {**os.environ, "LUNA_MP_RUNTIME_DIR": directory}
    clients = [
        subprocess.Popen(
            command("luna_mp.demo", str(number), str(picture)), env=env, stdout=subprocess.PIPE
        )
        for number in range(1, CLIENTS + 1)
    ]
    try:
        return [_hear(client) for client in clients]
    finally:
        for client in clients:
            client.kill()
            client.communicate()


def _hear(client: subprocess.Popen[bytes]) -> dict[str, Any]:
    said, _ = client.communicate(timeout=CLIENT_SECONDS)
    if client.returncode:
        raise BootFailed(f"a client process ended with status {client.returncode}: see above")
    heard: dict[str, Any] = json.loads(said)
    return heard


def _in_process() -> dict[str, str]:
    """Prints of what the models give without any service, on the same device."""
    from luna_mp.devices import claim
    from luna_mp.models import ModelSpec, load_clip, load_vae

    device = str(claim("auto"))
    with torch.inference_mode():
        vae = load_vae(ModelSpec(), device)
        latent = vae.encode(demo_image()).cpu()
        results: dict[str, Any] = {
            "clip.encode": tuple(load_clip(ModelSpec(), device).encode(PROMPT)),
            "vae.encode": latent,
            "vae.decode": vae.decode(latent),
        }
        return {name: _print_of(result) for name, result in results.items()}


def _calls(luna: Luna) -> Iterator[tuple[str, str, Call]]:
    """Name, role and call; the decode takes what the encode gave."""
    latent: list[torch.Tensor] = []

    def encode() -> torch.Tensor:
        latent.append(luna.vae.encode(demo_image()))
        return latent[0]

    yield "clip.encode", "clip", lambda: tuple(luna.clip.encode(PROMPT))
    yield "vae.encode", "vae", encode
    yield "vae.decode", "vae", lambda: luna.vae.decode(latent[0])


def _print_of(result: Any) -> str:
    """A fingerprint of values, dtypes, shapes and strides; of the device only that it is ours."""
    told = hashlib.sha256()
    for tensor in _tensors(result):
        told.update(f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}".encode())
        told.update(bytes(tensor.cpu().contiguous().view(-1).view(torch.uint8).tolist()))
    return told.hexdigest()


def _tensors(result: Any) -> list[torch.Tensor]:
    found = result if isinstance(result, tuple) else (result,)
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


def _be_client(number: int, picture: Path) -> None:
    directory = runtime.runtime_dir()
    records = {role: runtime.read_records(directory, role)[0] for role in ROLES}
    tcp = {role: f"{record.host}:{record.port}" for role, record in records.items()}
    calls: list[dict[str, Any]] = []
    with connect() as local, connect(clip=tcp["clip"], vae=tcp["vae"]) as remote:
        for luna, address in ((local, "local"), (remote, "TCP")):
            for name, role, call in _calls(luna):
                start = time.perf_counter()
                result = call()
                seconds = time.perf_counter() - start
                calls.append(
                    {
                        "client": number,
                        "call": name,
                        "address": address,
                        "carrier": luna.carriers[role],
                        "bytes": sum(t.numel() * t.itemsize for t in _tensors(result)),
                        "ms": round(1e3 * seconds, 3),
                        "print": _print_of(result),
                    }
                )
        if number == 1:
            _save(result, picture)
        carriers = local.carriers
    sys.stdout.write(json.dumps({"carriers": carriers, "calls": calls}))


def _save(image: torch.Tensor, picture: Path) -> None:
    from PIL import Image

    pixels = image[0].mul(255).round().to(torch.uint8).cpu()
    Image.fromarray(pixels.contiguous().numpy()).save(picture, format="PNG")


if __name__ == "__main__":
    _be_client(int(sys.argv[1]), Path(sys.argv[2]))
